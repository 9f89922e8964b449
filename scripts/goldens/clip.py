"""Goldens of the CLIP towers: small random models, inputs and what transformers computes.

    python scripts/goldens/clip.py          # writes tests/data/clip/<case>/

Each case is a model directory as transformers saves it (weights only, no tokenizer) with a
`golden.safetensors`: pixels, ids, and the features and logits that `CLIPModel` gives in f32.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/clip"

BASE = dict(
    text=dict(hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=60,
              max_position_embeddings=12, bos_token_id=57, eos_token_id=58, pad_token_id=0),
    vision=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=8),
    projection_dim=16,
)

CASES = {
    # name: (changes to text, to vision, projection, how the weights are saved)
    "quick": ({}, {}, 16, "safetensors"),
    "gelu": (dict(hidden_act="gelu"), dict(hidden_act="gelu"), 10, "safetensors"),
    "odd_patches": (dict(max_position_embeddings=20), dict(image_size=28, patch_size=7, num_attention_heads=4), 16, "shards"),
    # Floor division leaves a margin of pixels that no patch covers.
    "margin": ({}, dict(image_size=26, patch_size=8), 16, "pickle"),
    "legacy_eos": (dict(eos_token_id=2, bos_token_id=0), {}, 16, "safetensors"),
    "eps": (dict(layer_norm_eps=1e-3), dict(layer_norm_eps=1e-6), 16, "f16"),
    "bf16": ({}, {}, 16, "bf16"),
}


def ids(config, legacy):
    """Rows of different lengths; in one, the end of text comes twice."""
    end = 59 if legacy else config.text_config.eos_token_id
    rows = [[57, 5, 9, 31, end], [57, end], [57, 7, 7, 12, 40, 41, 2, end], [57, 3, end, 8, end]]
    length = max(map(len, rows))
    return torch.tensor([row + [end if not legacy else 0] * (length - len(row)) for row in rows])


def build(name, text, vision, projection, container, seed):
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={**BASE["text"], **text}, vision_config={**BASE["vision"], **vision}, projection_dim=projection
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        # Larger than an initialisation, so that every path matters.
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    if container == "f16":
        model.half()
    if container == "bf16":
        model.bfloat16()
    if container == "pickle":
        out.mkdir(parents=True)
        model.config.save_pretrained(out)
        # As old releases saved it: with a buffer, a parameter and a tensor that lies transposed.
        state = model.state_dict()
        state["text_model.embeddings.position_ids"] = torch.arange(config.text_config.max_position_embeddings)[None]
        state["visual_projection.weight"] = state["visual_projection.weight"].t().contiguous().t()
        state["text_projection.weight"] = torch.nn.Parameter(state["text_projection.weight"])
        torch.save(state, out / "pytorch_model.bin")
    else:
        model.save_pretrained(out, max_shard_size="30KB" if container == "shards" else "5GB")
    model.float()
    size = config.vision_config.image_size
    pixels = torch.randn(3, 3, size, size)
    tokens = ids(config, config.text_config.eos_token_id == 2)
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels).pooler_output)
        texts = model.text_projection(model.text_model(tokens).pooler_output)
        logits = model(input_ids=tokens, pixel_values=pixels).logits_per_image
        mask = torch.ones_like(tokens)
        mask[0, 1] = 0
        masked = model.text_projection(model.text_model(tokens, attention_mask=mask).pooler_output)
    save_file(
        {
            "pixels": pixels, "ids": tokens.to(torch.int64), "image_features": images.contiguous(),
            "text_features": texts.contiguous(), "logits": logits.contiguous(),
            "mask": mask.to(torch.int64), "masked_text_features": masked.contiguous(),
        },
        out / "golden.safetensors",
    )


def initialisation():
    """Mean and deviation of each tensor of a fresh model, for our random initialisation."""
    torch.manual_seed(99)
    config = CLIPConfig(
        text_config={**BASE["text"], "hidden_size": 64, "intermediate_size": 160, "vocab_size": 90},
        vision_config={**BASE["vision"], "hidden_size": 96, "intermediate_size": 128}, projection_dim=80,
    )
    model = CLIPModel(config)
    out = OUT / "init"
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    stats = {n: [round(p.mean().item(), 4), round(p.std(correction=0).item(), 4)] for n, p in model.named_parameters()}
    (out / "init.json").write_text(json.dumps(stats, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    initialisation()
    for seed, (name, case) in enumerate(CASES.items()):
        build(name, *case, seed)
    total = sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file())
    print(json.dumps({"cases": list(CASES), "bytes": total}))
