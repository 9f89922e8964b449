"""Goldens of checkpoints in other layouts: small random models of open_clip and what it computes for an image and texts.

    python scripts/goldens/checkpoints.py   # writes tests/data/open_clip/<case>/

Each case holds a checkpoint as users have it, a small tokenizer, and `golden.safetensors`: features of `image.png` and of the
lines of `texts.txt` by open_clip's own transform and model, in f32.
"""

import argparse
import collections
import json
import math
import pathlib
import shutil

import numpy as np
import torch
from open_clip.factory import load_checkpoint
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/open_clip"
TEXTS = ["a photo of a cat", "red", "two words here", "x"]
VOCAB = 62


def tokenizer(out):
    """Single letters, inside a word and at its end."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [t + "</w>" for t in letters] + list("0123456") + [".</w>", "<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == VOCAB
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (out / "merges.txt").write_text("#version: 0.2\n")


def ids(out, context):
    """Padded with 0, as open_clip pads."""
    encode = CLIPTokenizer(vocab=str(out / "vocab.json"), merges=str(out / "merges.txt"))
    rows = [encode(text)["input_ids"][:context] for text in TEXTS]
    assert all(row[-1] == VOCAB - 1 for row in rows), rows
    return torch.tensor([row + [0] * (context - len(row)) for row in rows])


def model_cfg(vision=(), text=(), embed=12, **more):
    vision = {"image_size": 24, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, **dict(vision)}
    text = {"context_length": 20, "vocab_size": VOCAB, "width": 12, "heads": 3, "layers": 2, **dict(text)}
    return {"embed_dim": embed, **more, "vision_cfg": vision, "text_cfg": text}


def build(cfg, custom=False, seed=0):
    torch.manual_seed(seed)
    model = (CustomTextCLIP if custom else CLIP)(**{k: v for k, v in cfg.items() if k != "custom_text"}).eval()
    for parameter in model.parameters():
        # Larger than an initialisation, so that every path matters.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def golden(out, model, cfg, preprocess=None, name="golden.safetensors"):
    """What open_clip computes; `cfg` has the image size."""
    size = cfg["vision_cfg"]["image_size"]
    transform = image_transform_v2(PreprocessCfg(**{**(preprocess or {}), "size": size}), is_train=False)
    pixels = transform(Image.open(OUT / "image.png"))[None]
    with torch.no_grad():
        features = {
            "image_embeds": model.encode_image(pixels),
            "text_embeds": model.encode_text(ids(out, cfg["text_cfg"]["context_length"])),
        }
    save_file({k: v.float().contiguous() for k, v in features.items()}, out / name)


def config_file(out, cfg, preprocess=None):
    json_config = {"model_cfg": cfg, "preprocess_cfg": preprocess or {}}
    (out / "open_clip_config.json").write_text(json.dumps(json_config, indent=1))


def openai():
    """A TorchScript archive in half precision with OpenAI's three buffers; heads are 64 wide."""
    out = OUT / "openai"
    cfg = model_cfg({"width": 64, "head_width": 64, "layers": 1, "mlp_ratio": 0.5},
                    {"width": 64, "heads": 1, "layers": 1, "mlp_ratio": 0.5}, quick_gelu=True)
    model = build(cfg, seed=1).half()
    # What the archive holds, computed in f32.
    golden(out, model.float(), cfg)
    model.half()
    for key, value in [("input_resolution", 24), ("context_length", 20), ("vocab_size", VOCAB)]:
        model.__dict__.pop(key, None)
        model.register_buffer(key, torch.tensor(value))
    torch.jit.script(model).save(str(out / "model.pt"))


def gelu32():
    """`ViT-B-32`'s kind: patches of 32, GELU, safetensors with a configuration beside it, half precision."""
    out = OUT / "gelu32"
    cfg = model_cfg({"image_size": 64, "patch_size": 32, "width": 8, "head_width": 4}, embed=10)
    model = build(cfg, seed=2).half().float()
    golden(out, model, cfg)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    config_file(out, cfg)


def quick16():
    """Patches of 16, quick GELU, another mean, squashed images, `.bin` as hub repositories have it."""
    out = OUT / "quick16"
    cfg = model_cfg({"image_size": 32, "patch_size": 16, "width": 12, "head_width": 4, "mlp_ratio": 2.5}, quick_gelu=True)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
    model = build(cfg, seed=3)
    golden(out, model, cfg, preprocess)
    torch.save(model.state_dict(), out / "open_clip_pytorch_model.bin")
    config_file(out, cfg, preprocess)


def resized():
    """A training checkpoint whose grid and context are smaller than the configuration's, and a smaller grid still."""
    out = OUT / "resized"
    trained = build(model_cfg({"layers": 1}, {"context_length": 14, "layers": 1}), seed=4)
    state = {f"module.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, out / "epoch_3.pt")
    for size, name in [(40, "golden.safetensors"), (16, "golden16.safetensors")]:
        cfg = model_cfg({"layers": 1, "image_size": size}, {"layers": 1})
        model = build(cfg, seed=5)
        load_checkpoint(model, out / "epoch_3.pt")
        golden(out, model, cfg, name=name)
        if size == 40:
            config_file(out, cfg)


def custom():
    """A text tower that is a module of its own, pooled at a named end token, tanh GELU, another epsilon."""
    out = OUT / "custom"
    kwargs = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    cfg = model_cfg({"layers": 1, **kwargs}, {"layers": 1, "pool_type": "eos", "eos_id": VOCAB - 1, **kwargs}, custom_text=True)
    model = build(cfg, custom=True, seed=6)
    golden(out, model, cfg)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    config_file(out, cfg)


def transformers_sizes():
    """transformers' own interpolation: a model in HF layout, images of 40 and 16 pixels."""
    out = OUT / "hf"
    torch.manual_seed(7)
    text = dict(hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=3, vocab_size=VOCAB,
                max_position_embeddings=20, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    # As `openai/clip-vit-base-patch32` has it on its main branch.
    torch.save(model.state_dict(), out / "pytorch_model.bin")
    for size in [40, 16]:
        transform = image_transform_v2(PreprocessCfg(size=size), is_train=False)
        with torch.no_grad():
            pixels = transform(Image.open(OUT / "image.png"))[None]
            vision = model.vision_model(pixels, interpolate_pos_encoding=True)
            features = model.visual_projection(vision.pooler_output)
        save_file({"image_embeds": features.contiguous()}, out / f"golden{size}.safetensors")


def clip_lora():
    """What CLIP-LoRA's `save_lora` writes for the model of `quick16`, and the features with its update, α/√r · B A."""
    out = OUT / "clip_lora"
    cfg = json.loads((OUT / "quick16/open_clip_config.json").read_text())
    model = build(cfg["model_cfg"], seed=3)
    torch.manual_seed(8)
    rank, alpha, weights = 2, 3, {}
    names = {"q": "q_proj", "v": "v_proj", "o": "proj"}
    blocks = [*model.transformer.resblocks, *model.visual.transformer.resblocks]
    for i, block in enumerate(blocks):
        width, attention = block.attn.embed_dim, block.attn
        layer = {}
        for row, part in enumerate(["q", "k", "v", "o"]):
            if part not in names:
                continue
            a, b = torch.randn(rank, width), torch.randn(width, rank)
            layer[names[part]] = {"w_lora_A": a, "w_lora_B": b}
            target = attention.out_proj.weight if part == "o" else attention.in_proj_weight[row * width : (row + 1) * width]
            target.data += b @ a * (alpha / math.sqrt(rank))
        weights[f"layer_{i}"] = layer
    metadata = {"r": rank, "alpha": alpha, "encoder": "both", "params": list(names), "position": "all"}
    torch.save({"weights": weights, "metadata": metadata}, out / "lora_weights.pt")
    golden(out, model, cfg["model_cfg"], cfg["preprocess_cfg"])


def training():
    """What training scripts save around quick16's and OpenAI's weights: wrappers, prefixes, averages, an optimiser, plain values."""
    out = OUT / "training"
    out.mkdir(parents=True)
    state = torch.load(OUT / "quick16/open_clip_pytorch_model.bin")
    wrapped = {f"_orig_mod.module.clip_model.{k}": v for k, v in state.items()}
    wrapped["_orig_mod.module.classifier.weight"] = torch.ones(2, 3)
    moments = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    average = {"visual.proj": torch.zeros(12, 12)}
    torch.save(
        {"epoch": 3, "ema": average, "model_state_dict": wrapped, "optimizer_state_dict": moments, "best": 0.5, "name": None},
        out / "last.pt",
    )
    openai = dict(torch.jit.load(str(OUT / "openai/model.pt")).state_dict())
    for key in ["input_resolution", "context_length", "vocab_size"]:
        openai[key] = int(openai[key])
    torch.save({f"module.{k}" if torch.is_tensor(v) else k: v for k, v in openai.items()}, out / "openai.pt")
    for name in ["vocab.json", "merges.txt", "open_clip_config.json"]:
        shutil.copy(OUT / "quick16" / name, out / name)


class Unknown(dict):
    """A class of a script's own, as Lightning's `AttributeDict`."""


def namespaces():
    """What scripts save beside weights that no tensor needs: a namespace of arguments, paths, numpy's numbers, objects of their own."""
    out = OUT / "training"
    arguments = argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("runs/1"), seed=1 << 90, tags={"a", "b"}, nested=argparse.Namespace(x=1))
    beside = {
        "epoch": 3, "args": arguments, "hyper_parameters": Unknown(lr=0.1), "best": np.float64(0.5), "size": torch.Size([2, 3]),
        "device": torch.device("cpu"), "rng": torch.get_rng_state(), "dtype": torch.float32, "log": collections.defaultdict(list, a=[1]),
    }
    state = torch.load(OUT / "quick16/open_clip_pytorch_model.bin")
    for protocol in [2, 4]:
        torch.save({**beside, "state_dict": state}, out / f"args{protocol}.pt", pickle_protocol=protocol)
    # A directory of transformers' whose weights are a training checkpoint with a head.
    state = torch.load(OUT / "hf/pytorch_model.bin")
    state = {f"module.{name}": value for name, value in state.items()} | {"module.classifier.weight": torch.ones(2, 3)}
    torch.save({"epoch": 3, "args": arguments, "model_state_dict": state}, out / "pytorch_model.bin")


def transformers5():
    """A directory as transformers 5 saves it: `processor_config.json` alone says how images become pixels."""
    out, source = OUT / "transformers5", OUT / "quick16"
    tokenizer = CLIPTokenizer(vocab=str(source / "vocab.json"), merges=str(source / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = VOCAB - 1
    text = {**sizes, "vocab_size": VOCAB, "max_position_embeddings": 20, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 20, "patch_size": 10}, projection_dim=12)
    torch.manual_seed(9)
    model = CLIPModel(config).eval()
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(out)
    model.save_pretrained(out)
    assert not (out / "preprocessor_config.json").exists()
    pixels = images(Image.open(OUT / "image.png"), return_tensors="pt")["pixel_values"]
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        projected = {
            "image_embeds": model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
            "text_embeds": model.text_projection(model.text_model(**encoded).pooler_output),
        }
    save_file({k: v.contiguous() for k, v in projected.items()}, out / "golden.safetensors")


def crops():
    """Sums of what torchvision's Resize and CenterCrop to 24 pixels make of images of many shapes."""
    transform = image_transform_v2(PreprocessCfg(size=24), is_train=False).transforms
    rows = []
    for width in range(17, 47, 2):
        for height in range(16, 47, 3):
            y, x, c = np.mgrid[0:height, 0:width, 0:3]
            image = Image.fromarray(((x * 7 + y * 13 + c * 31 + x * y) % 256).astype(np.uint8))
            done = np.asarray(transform[1](transform[0](image))).astype(np.int64).ravel()
            rows.append([width, height, int((done * (np.arange(done.size) % 1009 + 1)).sum())])
    (OUT / "crops.json").write_text(json.dumps(rows, separators=(",", ":")))


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((45, 30), Image.Resampling.BICUBIC).save(OUT / "image.png")
    for case in ["openai", "gelu32", "quick16", "resized", "custom", "hf", "clip_lora"]:
        tokenizer(OUT / case)
    for make in [openai, gelu32, quick16, resized, custom, transformers_sizes, clip_lora, training, namespaces, transformers5, crops]:
        make()
    (OUT / "clip_lora/vocab.json").unlink()
    (OUT / "clip_lora/merges.txt").unlink()


if __name__ == "__main__":
    main()
