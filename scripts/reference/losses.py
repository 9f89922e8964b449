#!/usr/bin/env python3
"""Trains the same steps with `peft train` and with PyTorch and compares the losses; exits 1 where they part by more than 1e-3.

    cargo build --release && peers/bin/python scripts/reference/losses.py [--steps 50] [--peft PATH] [CASE…]

The environment is that of scripts/peers/requirements.txt. A small random CLIP, 80 PNG images in ten classes that both sides
resize, crop and normalise, batches of 16 in the folder's order, AdamW at a constant rate. LoRA starts from an adapter that HF
PEFT saved, prefix, bottleneck and visual prompts from one in the format of README, full fine-tuning from the base. The loss has
to change by far more than the tolerance, or the case shows nothing.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/peers"))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from inputs import PREPROCESSOR, picture, tokenizer_files
from methods import attach, image_features, logits, text_features
from PIL import Image
from safetensors.torch import save_file
from steps import CLASSES, TEMPLATE
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)
TOLERANCE = 1e-3
BATCH, SIZE = 16, 32
# name: (the recipe's method, learning rate, attach's options)
CASES = {
    "lora": ("{lora: {rank: 4, alpha: 8, targets: [q_proj, k_proj, v_proj]}}", 1e-3, {"rank": 4}),
    "lora-mlp-vision": (
        "{lora: {rank: 4, alpha: 8, targets: [fc1, fc2], towers: vision}}", 1e-3,
        {"method": "lora", "rank": 4, "targets": ["fc1", "fc2"], "towers": "vision"},
    ),
    "full": ("full", 1e-4, {}),
    "prefix": ("{prefix: {length: 8}}", 1e-2, {}),
    "bottleneck": ("{bottleneck: {placement: houlsby, reduction: 16}}", 1e-3, {}),
    "vpt": ("{vpt: {length: 8}}", 1e-2, {}),
}


def make_base(out):
    """Weights larger than an initialisation, so that every path matters."""
    out.mkdir()
    start, end = tokenizer_files(out, 32)
    vocabulary = json.loads((out / "vocab.json").read_text())
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    text = {"num_hidden_layers": 3, "vocab_size": len(vocabulary), "max_position_embeddings": 32, "bos_token_id": start,
            "eos_token_id": end, "pad_token_id": end}
    vision = {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config={**shape, **text}, vision_config={**shape, **vision}, projection_dim=48))
    for parameter in clip.parameters():
        if parameter.dim() > 0:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    clip.save_pretrained(out)
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    (out / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **size}) + "\n")


def make_images(out):
    """train/<class>: 8 each; val and test: 2 each. A class has a tint, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for split, count in [("train", 8), ("val", 2), ("test", 2)]:
        for label, name in enumerate(CLASSES):
            directory = out / split / name
            directory.mkdir(parents=True)
            tint = Image.new("RGB", (56, 44), tuple(int(v) for v in np.random.default_rng(label).integers(0, 256, 3)))
            for i in range(count):
                Image.blend(picture(rng, 56, 44), tint, 0.4).save(directory / f"{i}.png")


def save_adapter(out, case, clip):
    """LoRA by HF PEFT itself; the others as README lists their tensors."""
    out.mkdir()
    tensors = {f"base_model.model.{n}": p.detach().clone() for n, p in clip.named_parameters() if p.requires_grad}
    config = {
        "prefix": {"length": 8}, "bottleneck": {"placement": "houlsby", "reduction": 16, "activation": "relu"},
        "vpt": {"length": 8, "dropout": 0.0},
    }[case]
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": case.upper(), "config": config}) + "\n")


def prepare(case, base, out):
    """The patched model, its small random start, and the adapter directory, if the method starts from one."""
    options = dict(CASES[case][2])
    method = options.pop("method", case)
    torch.manual_seed(1)
    clip = CLIPModel.from_pretrained(base).float()
    adapted = attach(clip, method, **options)
    if method == "full":
        return clip, None
    for name, parameter in clip.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "adapter_up" in name):
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    if adapted is not None:
        adapted.save_pretrained(out)
    else:
        save_adapter(out, case, clip)
    return clip, out


def theirs(case, clip, base, images, steps):
    """The losses of `steps` steps. Weight decay spares tensors below 2-D, as in `peft`."""
    pixels, labels = read_images(base, images)
    tokens = CLIPTokenizer.from_pretrained(base)([TEMPLATE.format(c) for c in sorted(CLASSES)], padding=True, return_tensors="pt")
    trained = [p for p in clip.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=CASES[case][1], betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(steps):
        rows = slice(step * BATCH % len(labels), step * BATCH % len(labels) + BATCH)
        classes = text_features(clip, tokens.input_ids)
        loss = cross_entropy(logits(clip, image_features(clip, pixels[rows]), classes), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def read_images(base, images):
    """Pixels [N, 3, H, W] and labels [N] in the folder's order: classes sorted, then files."""
    processor = CLIPImageProcessorPil.from_pretrained(base)
    paths = [(path, label) for label, name in enumerate(sorted(CLASSES)) for path in sorted((images / "train" / name).iterdir())]
    opened = [Image.open(path).convert("RGB") for path, _ in paths]
    return processor(opened, return_tensors="pt").pixel_values, torch.tensor([label for _, label in paths])


def ours(peft, case, adapter, base, images, run, steps):
    method, lr, _ = CASES[case]
    recipe = run.with_suffix(".yaml")
    recipe.write_text(
        f"model: {base}\nmethod: {method}\ndata: {{ folder: {{ root: {images} }} }}\n"
        f'task: {{ classify: {{ templates: ["{TEMPLATE}"] }} }}\n'
        f"train: {{ batch: {BATCH}, lr: {lr}, optimizer: adamw, schedule: {{ constant: {{ warmup: 0.0 }} }}, shuffle: false,\n"
        "  evaluate_every: 1000 }\n"
    )
    settings = [f"train.steps={steps}", *([f"train.init_adapter={adapter}"] if adapter else [])]
    sets = [argument for value in settings for argument in ("--set", value)]
    done = subprocess.run([peft, "train", recipe, *sets, "--output", run, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: peft train failed\n{done.stderr}")
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--peft", type=pathlib.Path, default=ROOT / "target/release/peft")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        sys.exit(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        base, images = scratch / "base", scratch / "images"
        make_base(base)
        make_images(images)
        print("| case | steps | first loss | last loss | largest difference | at step |\n|---|---|---|---|---|---|")
        for case in args.cases or CASES:
            clip, adapter = prepare(case, base, scratch / f"{case}-start")
            expected = theirs(case, clip, base, images, args.steps)
            found = ours(args.peft, case, adapter, base, images, scratch / case, args.steps)
            if len(found) != len(expected):
                sys.exit(f"{case}: expected {len(expected)} losses, found {len(found)}")
            apart = [abs(a - b) for a, b in zip(found, expected)]
            if max(expected) - min(expected) < 100 * TOLERANCE:
                sys.exit(f"{case}: the loss hardly moves ({min(expected):.4f} to {max(expected):.4f}): the case shows nothing")
            worst = max(worst, *apart)
            at = apart.index(max(apart)) + 1
            print(f"| {case} | {args.steps} | {expected[0]:.4f} | {expected[-1]:.4f} | {max(apart):.1e} | {at} |", flush=True)
    print(f"largest difference {worst:.1e}, tolerance {TOLERANCE:g}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
