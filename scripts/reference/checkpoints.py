"""Checks `peft` against open_clip, transformers and HF PEFT on checkpoints of real size with random weights.

    python scripts/reference/checkpoints.py target/release/peft [ViT-B-32 …]

For each architecture: a state dict (`.pt`, with --arch), a hub-style directory (safetensors and open_clip_config.json), an
archive as OpenAI's (TorchScript, half precision, no tokeniser), another image size; features by `peft embed` against open_clip,
`peft convert` read by transformers, `peft merge --to open_clip` read by open_clip, a CLIP-LoRA file by HF PEFT.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import open_clip
import torch
from open_clip.factory import get_model_config, load_checkpoint
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

PEFT = pathlib.Path(sys.argv[1]).resolve()
TEXTS = ["a photo of a cat.", "Zürich, 2024: it's raining", "red", "a diagram of two people at work"]
failed = 0


def run(*args):
    out = subprocess.run([PEFT, *map(str, args)], capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(f"{args}: exit {out.returncode}\n{out.stderr}")
    return out


def report(what, ours, theirs, limit=1e-4):
    global failed
    worst = max((ours[k] - theirs[k]).abs().max().item() for k in theirs)
    failed += not worst < limit
    print(f"{'ok  ' if worst < limit else 'FAIL'} {what}: {worst:.1e}", flush=True)


class World:
    def __init__(self, dir):
        self.dir = pathlib.Path(dir)
        rng = np.random.default_rng(0)
        self.images = []
        # Less than twice the model's size: beyond, the resizer trades single pixels' last bit for speed.
        for i, (w, h) in enumerate([(300, 224), (224, 400), (440, 330)]):
            path = self.dir / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (h // 16, w // 16, 3), dtype=np.uint8)).resize((w, h)).save(path)
            self.images.append(path)
        (self.dir / "images.txt").write_text("\n".join(map(str, self.images)))
        (self.dir / "texts.txt").write_text("\n".join(TEXTS))

    def embed(self, model, *options):
        run("embed", "--model", model, "--images", self.dir / "images.txt", "--texts", self.dir / "texts.txt",
            "--output", self.dir / "out.safetensors", *options)
        return load_file(self.dir / "out.safetensors")

    @torch.no_grad()
    def open_clip(self, model, size):
        transform = open_clip.image_transform(size, is_train=False)
        pixels = torch.stack([transform(Image.open(p)) for p in self.images])
        return {"image_embeds": model.encode_image(pixels).float(), "text_embeds": model.encode_text(open_clip.tokenize(TEXTS)).float()}

    @torch.no_grad()
    def transformers(self, model, dir):
        transform = open_clip.image_transform(model.config.vision_config.image_size, is_train=False)
        pixels = torch.stack([transform(Image.open(p)) for p in self.images])
        tokens = CLIPTokenizer.from_pretrained(dir)(TEXTS, padding=True, return_tensors="pt")
        out = model(pixel_values=pixels, **tokens)
        return {k: getattr(out, k) for k in ["image_embeds", "text_embeds"]}


def unit(features):
    return {k: v / v.norm(dim=-1, keepdim=True) for k, v in features.items()}


def loaded(dir):
    model, info = CLIPModel.from_pretrained(dir, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def openai_archive(model, path, size):
    model = model.half()
    # No buffer there, so that it is not in the state dict.
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask
    for key, value in [("input_resolution", size), ("context_length", 77), ("vocab_size", 49408)]:
        model.__dict__.pop(key, None)
        model.register_buffer(key, torch.tensor(value))
    torch.jit.script(model).save(str(path))


def clip_lora(model, path, rank=4, alpha=8):
    """As CLIP-LoRA's `save_lora` writes it; the update goes into `model`, too."""
    weights = {}
    for i, block in enumerate([*model.transformer.resblocks, *model.visual.transformer.resblocks]):
        width, weights[f"layer_{i}"] = block.attn.embed_dim, {}
        for row, name in enumerate(["q_proj", "k_proj", "v_proj"]):
            a, b = torch.randn(rank, width) / width**0.5, torch.randn(width, rank) * 0.1
            weights[f"layer_{i}"][name] = {"w_lora_A": a, "w_lora_B": b}
            block.attn.in_proj_weight.data[row * width : (row + 1) * width] += b @ a * (alpha / math.sqrt(rank))
    metadata = {"r": rank, "alpha": alpha, "encoder": "both", "params": ["q", "k", "v"], "position": "all"}
    torch.save({"weights": weights, "metadata": metadata}, path)


def check(world, arch):
    torch.manual_seed(0)
    cfg = get_model_config(arch)
    size, patch, quick = cfg["vision_cfg"]["image_size"], cfg["vision_cfg"]["patch_size"], cfg.get("quick_gelu", False)
    model = open_clip.create_model(arch, pretrained=None).eval()
    theirs = world.open_clip(model, size)

    pt = world.dir / "state.pt"
    torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, pt)
    report(f"{arch}: state dict with --arch", world.embed(pt, "--arch", arch), theirs)

    hub = world.dir / "hub"
    hub.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, hub / "open_clip_model.safetensors")
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    report(f"{arch}: directory with open_clip_config.json", world.embed(hub), theirs)

    larger = size + 2 * patch
    other = open_clip.create_model(arch, pretrained=None, force_image_size=larger).eval()
    load_checkpoint(other, pt)
    report(f"{arch}: {larger} px", world.embed(pt, "--arch", arch, "--image-size", larger), world.open_clip(other, larger))

    run("convert", hub, "--output", world.dir / "hf", "--force")
    hf = loaded(world.dir / "hf")
    report(f"{arch}: converted, read by transformers", world.transformers(hf, world.dir / "hf"), unit(theirs))
    run("merge", "--model", world.dir / "hf", "--output", world.dir / "back", "--to", "open_clip", "--force")
    back = open_clip.create_model(f"local-dir:{world.dir / 'back'}").eval()
    report(f"{arch}: and back, read by open_clip", world.open_clip(back, size), theirs, 1e-6)

    clip_lora(back, world.dir / "lora.pt")
    updated = world.open_clip(back, size)
    report(f"{arch}: CLIP-LoRA's file", world.embed(hub, "--adapter", world.dir / "lora.pt"), updated)
    run("convert", world.dir / "lora.pt", "--output", world.dir / "adapter", "--force")
    report(f"{arch}: converted, by HF PEFT", world.transformers(PeftModel.from_pretrained(hf, world.dir / "adapter").eval(),
                                                              world.dir / "hf"), unit(updated))

    if quick:
        archive = world.dir / "openai.pt"
        openai_archive(model, archive, size)
        official = open_clip.load_openai_model(str(archive), precision="fp32").eval()
        theirs = world.open_clip(official, size)
        report(f"{arch}: OpenAI's archive", world.embed(archive), theirs)
        run("convert", archive, "--output", world.dir / "hf16", "--dtype", "f16", "--force")
        report(f"{arch}: converted to f16, read by transformers", world.transformers(loaded(world.dir / "hf16"), world.dir / "hf16"),
               unit(theirs), 2e-3)


with tempfile.TemporaryDirectory() as dir:
    world = World(dir)
    for arch in sys.argv[2:] or ["ViT-B-32", "ViT-B-32-quickgelu"]:
        check(world, arch)
sys.exit(failed > 0)
