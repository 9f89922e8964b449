"""Trains the byte-level BPE of builtin:tiny and writes its tokenizer and configs: python tokenizer.py [--data DIR] [--out DIR]

The files are in HF layout; the script loads them back with transformers and refuses ids that differ.
"""
import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).parents[2]
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, CONTEXT = 3000, 32
# CLIP's own pattern, so the file behaves like openai/clip-vit-base-patch32's.
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Words of common prompts, so that users' own labels and templates do not fall apart into letters.
PROMPTS = """a photo of a {}. a bad photo of the {}. an icon of a {}. an emoji of a {}. a black and white icon of a {}.
a drawing of a {}. a sketch of a {}. a painting of the {}. a cartoon {}. a close-up photo of a {}. a low resolution photo of
many {}. a bright dark clean dirty small large big little old new good weird nice picture of my {}. this is an image of one {}.
a satellite photo, a type of {}, a texture, a centered photo, a monochrome pictogram, a flat colour color icon, a line art symbol,
an outline, it shows what is in the picture: yes or no, with without and the on in at by from to for it its it's they are was were"""


def corpus(data):
    for name in ("train", "val"):
        for line in open(data / f"{name}.jsonl"):
            yield from json.loads(line)["text"]
    for line in open(data / "eval.jsonl"):
        yield json.loads(line)["name"]
    classes = json.load(open(Path(__file__).parent / "classes.json")).values()
    yield from (f"an icon of a {name}" for _ in range(20) for name in classes)
    yield from PROMPTS.split("\n") * 20


def train(data):
    bpe = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(corpus(data), trainer)
    return rebuild(json.loads(bpe.to_str()), letters)


def rebuild(trained, letters):
    """CLIP's order of ids: bytes, bytes with </w>, merges, start, end."""
    merges = [tuple(m) for m in trained["model"]["merges"]]
    symbols = [*letters, *(c + "</w>" for c in letters)]
    known = set(symbols)
    for a, b in merges:
        if a + b not in known:
            known.add(a + b)
            symbols.append(a + b)
    vocabulary = {token: i for i, token in enumerate([*symbols[: VOCABULARY - 2], START, END])}
    kept = [m for m in merges if "".join(m) in vocabulary]
    trained["model"].update(vocab=vocabulary, merges=[list(m) for m in kept])
    bpe = Tokenizer.from_str(json.dumps(trained))
    bpe.add_special_tokens([START, END])
    bpe.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe, vocabulary, kept


def config(vocabulary):
    ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 192, "attention_dropout": 0.0}
    vision = {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, "num_channels": 3, "hidden_size": 192,
              "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    text = {"model_type": "clip_text_model", "vocab_size": len(vocabulary), "max_position_embeddings": CONTEXT, "hidden_size": 128,
            "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512, **ids}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 192, "logit_scale_init_value": 2.6592,
            "text_config": {**text, **common}, "vision_config": {**vision, **common}}


def write(out, bpe, vocabulary, merges):
    """Images with transparency belong on white: the PNGs of the data sets keep alpha, which plain CLIP drops."""
    out.mkdir(parents=True, exist_ok=True)
    dump = lambda name, value: (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    (out / "tokenizer.json").write_text(bpe.to_str() + "\n")
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    dump("special_tokens_map.json", {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END})
    dump("tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "do_lower_case": True,
                                   "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END})
    dump("config.json", config(vocabulary))
    dump("preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": 64},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})


def verify(out, data):
    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs = CLIPTokenizer.from_pretrained(out)
    texts = [*dict.fromkeys(corpus(data)), "", " ", "It's A Café — naïve 数字 42!", "😀 <b>hi</b>", "<|endoftext|> x", "a\tb\n\nc  d", "ǅ ß İ", "e\u0301"]
    for text in texts:
        a, b = ours.encode(text).ids, theirs(text)["input_ids"]
        assert a == b, (text, a, b)
    bare = out / ".bare"
    bare.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (bare / name).write_bytes((out / name).read_bytes())
    slow = CLIPTokenizer.from_pretrained(bare)
    different = [t for t in texts if slow(t)["input_ids"] != ours.encode(t).ids]
    for file in bare.iterdir():
        file.unlink()
    bare.rmdir()
    model = CLIPModel(CLIPConfig.from_pretrained(out))
    print(json.dumps({"texts": len(texts), "differ_without_tokenizer_json": different[:5], "vocabulary": len(theirs),
                      "parameters": sum(p.numel() for p in model.parameters())}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT / "data/emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "src/builtin/tiny")
    args = parser.parse_args()
    write(args.out, *train(args.data))
    verify(args.out, args.data)


main()
