#!/usr/bin/env python3
"""Prompt and feature methods as their authors' code has them, on transformers' CLIP: goldens in tests/data/few_shot.

    python scripts/reference/few_shot.py       # the environment of scripts/goldens/requirements.txt

Rebuilt small from KaiyangZhou/CoOp (trainers/coop.py, cocoop.py), muzairkhattak/multimodal-prompt-learning (trainers/maple.py,
clip/model.py), KMnP/vpt (vit_prompt/vit.py), gaopengcuhk/CLIP-Adapter (clip_adapter.py), gaopengcuhk/Tip-Adapter (main.py,
utils.py) and astra-vision/ProLIP (methods/ProLIP.py). Every case is an adapter directory in the format that README lists, with
random weights, and golden.safetensors: class prompts with a template of two words ("ids"; "names": class, first token, tokens),
images, and what the authors' forward pass makes of them.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, normalize, one_hot, relu
from transformers import CLIPConfig, CLIPModel

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/few_shot"
BEGIN, END, STOP, X = 57, 58, 9, 40
TEMPLATE = [20, 21]
NAMES = [[5], [6, 7, 8], [11, 12], [13]]
ROOM = 14


def make_base():
    torch.manual_seed(2)
    config = CLIPConfig(
        text_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=60,
                         max_position_embeddings=ROOM, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=0),
        vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, image_size=16, patch_size=8),
        projection_dim=12,
    )
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    clip.logit_scale.data.fill_(2.0)
    clip.save_pretrained(OUT / "base")
    return CLIPModel.from_pretrained(OUT / "base", attn_implementation="eager").eval()


def tokenised(words):
    """[C, ROOM] ids of `words` NAME. between begin and end, as clip.tokenize pads them."""
    rows = [[BEGIN, *words, *name, STOP, END] for name in NAMES]
    return torch.tensor([row + [0] * (ROOM - len(row)) for row in rows])


def encode_text(clip, prompts, ids, deep=(), n_ctx=0):
    """CoOp's TextEncoder; with `deep`, MaPLe's blocks, which replace the context of the block before."""
    text = clip.text_model
    x = prompts + text.embeddings.position_embedding.weight[: prompts.shape[1]]
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    for block, layer in enumerate(text.encoder.layers):
        if 0 < block <= len(deep):
            context = deep[block - 1].expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], context, x[:, 1 + n_ctx:]], dim=1)
        x = hidden(layer(x, attention_mask=mask))
    x = text.final_layer_norm(x)
    return clip.text_projection(x[torch.arange(len(ids)), ids.argmax(dim=-1)])


def hidden(out):
    return out[0] if isinstance(out, tuple) else out


def embed_images(clip, pixels):
    return clip.vision_model.embeddings(pixels)


def encode_images(clip, x, before=lambda block, x: x):
    """`x` behind the first norm; `before` changes what enters a block."""
    for block, layer in enumerate(clip.vision_model.encoder.layers):
        x = hidden(layer(before(block, x), attention_mask=None))
    return clip.visual_projection(clip.vision_model.post_layernorm(x[:, 0]))


def plain_images(clip, pixels):
    return encode_images(clip, clip.vision_model.pre_layrnorm(embed_images(clip, pixels)))


def plain_texts(clip):
    ids = tokenised(TEMPLATE)
    return encode_text(clip, clip.text_model.embeddings.token_embedding(ids), ids)


def logits(clip, images, texts):
    return clip.logit_scale.exp() * normalize(images, dim=-1) @ normalize(texts, dim=-1).t()


def random(*shape, std=0.5):
    return std * torch.randn(*shape)


def vpt(clip, pixels, length, deep):
    """PromptedTransformer: tokens after the class token, before the first block; deep ones take the place of those before."""
    blocks = len(clip.vision_model.encoder.layers)
    prompts = [random(length, 24) for _ in range(blocks if deep else 1)]

    def before(block, x):
        if block == 0:
            return torch.cat((x[:, :1], prompts[0].expand(len(x), -1, -1), x[:, 1:]), dim=1)
        if deep:
            return torch.cat((x[:, :1], prompts[block].expand(len(x), -1, -1), x[:, 1 + length:]), dim=1)
        return x

    images = encode_images(clip, clip.vision_model.pre_layrnorm(embed_images(clip, pixels)), before)
    tensors = {f"vision_model.encoder.layers.{i}.prompt": p for i, p in enumerate(prompts)}
    config = {"length": length} if deep else {"length": length, "depth": 1}
    return config, tensors, images, plain_texts(clip)


def coop(clip, pixels, n_ctx, position="end", specific=False):
    """PromptLearner.forward: prefix, context, suffix; X stands where the context will be."""
    context = random(len(NAMES), n_ctx, 16) if specific else random(n_ctx, 16)
    ids = tokenised([X] * n_ctx)
    embedding = clip.text_model.embeddings.token_embedding(ids)
    prefix, suffix = embedding[:, :1], embedding[:, 1 + n_ctx:]
    ctx = context if specific else context.expand(len(NAMES), -1, -1)
    rows = []
    for i, name in enumerate(NAMES):
        own, rest, half = suffix[i, : len(name)], suffix[i, len(name):], n_ctx // 2
        parts = {
            "end": [ctx[i], own, rest],
            "middle": [ctx[i, :half], own, ctx[i, half:], rest],
            "front": [own, ctx[i], rest],
        }[position]
        rows.append(torch.cat([prefix[i], *parts]))
    texts = encode_text(clip, torch.stack(rows), ids)
    config = {"n_ctx": n_ctx, "position": position, "class_specific": specific, **({"classes": len(NAMES)} if specific else {})}
    return config, {"text_model.embeddings.coop.ctx": context}, plain_images(clip, pixels), texts


def cocoop(clip, pixels, n_ctx):
    """CustomCLIP.forward of cocoop.py: texts [B, C, P]."""
    context, w1, b1, w2, b2 = random(n_ctx, 16), random(3, 12), random(3), random(16, 3), random(16)
    images = plain_images(clip, pixels)
    bias = linear(relu(linear(normalize(images, dim=-1), w1, b1)), w2, b2)
    ids = tokenised([X] * n_ctx)
    embedding = clip.text_model.embeddings.token_embedding(ids)
    prefix, suffix = embedding[:, :1], embedding[:, 1 + n_ctx:]
    texts = []
    for shift in bias:
        ctx = (context + shift).expand(len(NAMES), -1, -1)
        texts.append(encode_text(clip, torch.cat([prefix, ctx, suffix], dim=1), ids))
    part = "text_model.embeddings.cocoop."
    tensors = {"ctx": context, "meta_net.linear1.weight": w1, "meta_net.linear1.bias": b1,
               "meta_net.linear2.weight": w2, "meta_net.linear2.bias": b2}
    return {"n_ctx": n_ctx, "reduction": 4}, {part + k: v for k, v in tensors.items()}, images, torch.stack(texts)


def maple(clip, pixels, n_ctx, depth):
    """MultiModalPromptLearner, VisionTransformer_MaPLe and ResidualAttentionBlock_MaPLe. The template's further words stay."""
    contexts = [random(n_ctx, 16) for _ in range(depth)]
    couplings = [(random(24, 16), random(24)) for _ in range(depth)]
    coupled = [linear(c, w, b) for c, (w, b) in zip(contexts, couplings)]
    ids = tokenised(TEMPLATE)
    embedding = clip.text_model.embeddings.token_embedding(ids)
    prompts = torch.cat([embedding[:, :1], contexts[0].expand(len(NAMES), -1, -1), embedding[:, 1 + n_ctx:]], dim=1)
    texts = encode_text(clip, prompts, ids, contexts[1:], n_ctx)

    def before(block, x):
        if 0 < block < depth:
            return torch.cat([x[:, : x.shape[1] - n_ctx], coupled[block].expand(len(x), -1, -1)], dim=1)
        return x

    x = embed_images(clip, pixels)
    x = torch.cat([x, coupled[0].expand(len(x), -1, -1)], dim=1)
    images = encode_images(clip, clip.vision_model.pre_layrnorm(x), before)
    tensors = {}
    for i, (context, (w, b)) in enumerate(zip(contexts, couplings)):
        tensors[f"text_model.encoder.layers.{i}.maple.ctx"] = context
        tensors[f"vision_model.encoder.layers.{i}.maple.proj.weight"] = w
        tensors[f"vision_model.encoder.layers.{i}.maple.proj.bias"] = b
    return {"n_ctx": n_ctx, "depth": depth}, tensors, images, texts


def clip_adapter(clip, pixels, ratio):
    tensors, out = {}, []
    for tower, features in [("vision_model", plain_images(clip, pixels)), ("text_model", plain_texts(clip))]:
        down, up = random(4, 12), random(12, 4)
        adapted = relu(linear(relu(linear(features, down)), up))
        out.append(ratio * adapted + (1 - ratio) * features)
        tensors |= {f"{tower}.feature_adapter.down.weight": down, f"{tower}.feature_adapter.up.weight": up}
    return {"ratio": ratio, "reduction": 3, "towers": "both"}, tensors, *out


def prolip(clip, pixels, scale):
    weight = clip.visual_projection.weight + random(12, 24, std=0.1)
    loss = scale * torch.nn.MSELoss(reduction="sum")(weight, clip.visual_projection.weight)
    start = clip.visual_projection.weight.data.clone()
    clip.visual_projection.weight.data = weight
    images = plain_images(clip, pixels)
    clip.visual_projection.weight.data = start
    return {"lambda": scale}, {"visual_projection.weight": weight}, images, plain_texts(clip), {"regulariser": loss}


def tip_logits(clip, features, keys, values, classifier, alpha, beta):
    affinity = features @ keys.t()
    return clip.logit_scale.exp() * features @ classifier.t() + (-(beta - beta * affinity)).exp() @ values * alpha


def tip_adapter(clip, pixels, alpha, beta):
    """run_tip_adapter and search_hp, with the model's own scale where the authors write 100."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    keys = normalize(random(len(labels), 12), dim=-1)
    values = one_hot(labels).float()
    images, texts = plain_images(clip, pixels), plain_texts(clip)
    classifier = normalize(texts, dim=-1)
    features = normalize(images, dim=-1)
    found = tip_logits(clip, features, keys, values, classifier, alpha, beta)
    val = normalize(random(40, 12), dim=-1)
    val_labels = torch.randint(0, 4, (40,))
    best, best_alpha, best_beta = 0, 0, 0
    for b in [i * (7 - 0.1) / 200 + 0.1 for i in range(200)]:
        for a in [i * (3 - 0.1) / 20 + 0.1 for i in range(20)]:
            hits = int((tip_logits(clip, val, keys, values, classifier, a, b).argmax(-1) == val_labels).sum())
            if hits > best:
                best, best_alpha, best_beta = hits, a, b
    extra = {"logits": found, "val_features": val, "val_labels": val_labels, "searched": torch.tensor([best_alpha, best_beta])}
    part = "vision_model.cache."
    tensors = {part + "keys": keys, part + "labels": labels.float(), part + "alpha_beta": torch.tensor([alpha, beta])}
    return {"entries": len(labels), "classes": len(NAMES)}, tensors, images, texts, extra


CASES = {
    "vpt_shallow": (vpt, dict(length=3, deep=False)),
    "vpt_deep": (vpt, dict(length=2, deep=True)),
    "coop_end": (coop, dict(n_ctx=4)),
    "coop_middle": (coop, dict(n_ctx=5, position="middle", specific=True)),
    "coop_front": (coop, dict(n_ctx=1, position="front")),
    "cocoop": (cocoop, dict(n_ctx=3)),
    "maple": (maple, dict(n_ctx=1, depth=3)),
    "maple_shallow": (maple, dict(n_ctx=2, depth=1)),
    "clip_adapter": (clip_adapter, dict(ratio=0.3)),
    "prolip": (prolip, dict(scale=0.25)),
    "tip_adapter": (tip_adapter, dict(alpha=1.5, beta=2.5)),
}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    clip = make_base()
    ids = tokenised(TEMPLATE)
    names = torch.tensor([[i, 1 + len(TEMPLATE), len(name)] for i, name in enumerate(NAMES)])
    with torch.no_grad():
        for seed, (case, (build, options)) in enumerate(CASES.items()):
            torch.manual_seed(100 + seed)
            pixels = torch.randn(3, 3, 16, 16)
            config, tensors, images, texts, *extra = build(clip, pixels, **options)
            golden = {"pixels": pixels, "ids": ids, "names": names, "image_features": images, "text_features": texts}
            if texts.dim() == 2:
                golden["logits"] = logits(clip, images, texts)
            else:
                golden["logits"] = torch.stack([logits(clip, i[None], t)[0] for i, t in zip(images, texts)])
            golden |= extra[0] if extra else {}
            out = OUT / case
            out.mkdir()
            save_file({k: v.contiguous() for k, v in golden.items()}, out / "golden.safetensors")
            saved = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
            save_file(saved, out / "adapter_model.safetensors", metadata={"format": "pt"})
            kind = {"peft_type": build.__name__.upper(), "base_model_name_or_path": "base", "config": config}
            (out / "adapter_config.json").write_text(json.dumps(kind, indent=2) + "\n")
    print("wrote", ", ".join(CASES))


if __name__ == "__main__":
    main()
