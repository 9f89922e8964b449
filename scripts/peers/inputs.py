#!/usr/bin/env python3
"""Makes what the benchmarks read; what is already there stays.

    peers/bin/python scripts/peers/inputs.py data/bench [--patch 16]

vit-b-<patch>/   CLIP ViT-B with random weights in HF layout; the tokeniser is the embedded base's, smaller than the vocabulary
decode-only/     a CLIP of one patch and width 8: what its features cost is the decoding of the images
images/          80 JPEG images of 500×375 in ten classes, with the detail of photographs
prepared/        128 images of 224×224 without compression: decoding them costs next to nothing
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image
from steps import CLASSES
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging

logging.disable_progress_bar()
TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "src/builtin/tiny"
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": 224},
    "resample": 3, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tokenizer_files(out, context):
    """The embedded tokeniser with another context length. Returns the ids of start and end."""
    for name in ["vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json"]:
        shutil.copy(TOKENIZER / name, out)
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": context}, indent=1) + "\n")
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    return vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]


def checkpoint(out, text, vision, projection=512):
    """Appears under its name when it is complete."""
    if out.exists():
        return
    part = out.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    start, end = tokenizer_files(part, 77)
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=projection)
    CLIPModel(config).save_pretrained(part)
    (part / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1) + "\n")
    part.rename(out)


def picture(rng, width, height):
    """Structure at every scale, coarse strongest, so that a JPEG has about a photograph's size."""
    total = np.zeros((height, width, 3))
    for cells, strength in [(4, 70), (16, 30), (64, 12), (width, 4)]:
        grid = rng.normal(0, 1, (max(1, cells * height // width), cells, 3))
        planes = [Image.fromarray(grid[..., c].astype(np.float32)) for c in range(3)]
        planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        total += strength * np.stack(planes, axis=-1)
    return Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--patch", type=int, default=32)
    args = parser.parse_args()
    checkpoint(args.out / f"vit-b-{args.patch}", {}, {"patch_size": args.patch})
    narrow = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checkpoint(args.out / "decode-only", {**narrow, "vocab_size": 3000}, {**narrow, "patch_size": 224}, projection=8)
    rng = np.random.default_rng(0)
    for i in range(80):
        path = args.out / "images" / CLASSES[i % len(CLASSES)] / f"{i:02}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(rng, 500, 375).save(path, quality=92)
    for i in range(128):
        path = args.out / "prepared" / f"{i:03}.bmp"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(rng, 224, 224).save(path)


if __name__ == "__main__":
    main()
