#!/usr/bin/env python3
"""Times PyTorch + transformers + HF PEFT on one scenario; prints one JSON document.

    python3 -m venv peers && peers/bin/pip install -r scripts/peers/requirements.txt     # torch's CPU build is enough
    peers/bin/python scripts/peers/steps.py --method lora --batch 32 --steps 4 --threads 2

f32, AdamW, cross-entropy over the scaled cosine of image features with those of ten class prompts; a step is forward, backward
and update; the text tower runs in every step where it is trained and once where it is not. CLIP ViT-B/32 with random weights,
or --model DIR; pixels and ids are random. Other methods: `features` (images to features, no gradients), `predict` (a fresh
process that imports, loads --model and classifies one image, whole-process seconds), `preprocess` (JPEG to normalised pixels,
the fastest of three usual ways). One step is not counted.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

CLASSES = ["dog", "cat", "heart", "clock", "tree", "house", "car", "boat", "bird", "cup"]
TEMPLATE = "a photo of a {}."
TRAINED = ["lora", "full", "dora", "prefix", "bottleneck", "ia3", "vpt"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*TRAINED, "features", "predict", "preprocess"], default="lora")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--steps", type=int, default=4, help="steps that are counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pad", choices=["max", "longest"], default="max", help="prompts to the context, or to --tokens")
    parser.add_argument("--tokens", type=int, default=8, help="length of the longest prompt")
    parser.add_argument("--rank", type=int, default=8, help="alpha is twice that")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj")
    parser.add_argument("--towers", choices=["vision", "text", "both"], default="both")
    parser.add_argument("--last", type=int, help="only the last blocks of each tower")
    parser.add_argument("--model", help="a directory in HF layout")
    parser.add_argument("--images", help="a directory of JPEG images, for predict and preprocess")
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def peak_rss_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def versions():
    names = ["torch", "torchvision", "transformers", "peft", "numpy", "pillow"]
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def timed(step, count):
    step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def load(args):
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel.from_pretrained(args.model).float() if args.model else CLIPModel(CLIPConfig())


def prompts(args, config):
    """Random ids of the wanted length: start, words, end, padded with the end."""
    import torch

    length = config.max_position_embeddings if args.pad == "max" else args.tokens
    ids = torch.full((len(CLASSES), length), config.eos_token_id)
    ids[:, 0] = config.bos_token_id
    ids[:, 1 : args.tokens - 1] = torch.randint(1, config.bos_token_id, (len(CLASSES), args.tokens - 2))
    return ids


def training(args):
    import torch
    from methods import attach, image_features, logits, text_features
    from torch.nn.functional import cross_entropy

    clip = load(args)
    attach(clip, args.method, args.rank, args.targets.split(","), args.towers, args.last)
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=args.fused or None)
    size = clip.config.vision_config.image_size
    pixels = torch.randn(args.batch, 3, size, size)
    ids, labels = prompts(args, clip.config.text_config), torch.arange(args.batch) % len(CLASSES)
    frozen = None
    if args.towers == "vision":
        with torch.no_grad():
            frozen = text_features(clip, ids)

    def step():
        classes = text_features(clip, ids) if frozen is None else frozen
        loss = cross_entropy(logits(clip, image_features(clip, pixels), classes), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, args.steps), {"trainable_parameters": sum(p.numel() for p in trained)}


def features(args):
    import torch
    from methods import image_features

    clip = load(args).eval()
    size = clip.config.vision_config.image_size
    pixels = torch.randn(args.batch, 3, size, size)

    @torch.inference_mode()
    def step():
        image_features(clip, pixels)

    return timed(step, args.steps), {}


def jpegs(args):
    found = sorted(pathlib.Path(args.images or sys.exit("--images DIR is needed")).rglob("*.jpg"))
    return found or sys.exit(f"{args.images}: holds no .jpg")


def preprocess(args):
    import torch
    from PIL import Image
    from torchvision import transforms
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    paths = jpegs(args)
    paths = [paths[i % len(paths)] for i in range(args.batch)]
    settings = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    fast, pil = CLIPImageProcessor(**settings), CLIPImageProcessorPil(**settings)
    openai = transforms.Compose([
        transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize(fast.image_mean, fast.image_std),
    ])

    def opened(path):
        with Image.open(path) as image:
            return image.convert("RGB")

    ways = {
        "torchvision transforms on Pillow images": lambda: torch.stack([openai(opened(p)) for p in paths]),
        "CLIPImageProcessor": lambda: fast([opened(p) for p in paths], return_tensors="pt"),
        "CLIPImageProcessorPil": lambda: pil([opened(p) for p in paths], return_tensors="pt"),
    }
    seconds = {name: timed(way, args.steps) for name, way in ways.items()}
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    rates = {name: args.batch / statistics.median(s) for name, s in seconds.items()}
    return seconds[best], {"way": best, "ways_images_per_second": rates}


def predict_once(args):
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(args.threads)
    clip, tokenizer = CLIPModel.from_pretrained(args.model).eval(), CLIPTokenizer.from_pretrained(args.model)
    pixels = CLIPImageProcessorPil.from_pretrained(args.model)(Image.open(jpegs(args)[0]), return_tensors="pt")
    ids = tokenizer([TEMPLATE.format(c) for c in CLASSES], padding=True, return_tensors="pt")
    with torch.inference_mode():
        chances = clip(**ids, **pixels).logits_per_image.softmax(1)[0]
    print(CLASSES[chances.argmax()], f"{chances.max():.3f}", file=sys.stderr)


def predict(args):
    """Imports nothing heavy itself: a child's peak counts what its parent held at the fork."""
    if not args.model:
        sys.exit("--method predict needs --model")
    command = [sys.executable, __file__, *sys.argv[1:], "--once"]
    peaks = []

    def step():
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"the classifying process failed; run it alone: {' '.join(command[1:])}")
        peaks.append(usage.ru_maxrss / 1024)

    args.batch = 1
    return timed(step, args.steps), {"peak_rss_mib": max(peaks)}


def main():
    args = arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.once:
        return predict_once(args)
    if args.method != "predict":
        import torch

        torch.set_num_threads(args.threads)
    run = {"features": features, "predict": predict, "preprocess": preprocess}.get(args.method, training)
    seconds, more = run(args)
    median = statistics.median(seconds)
    print(json.dumps({
        "method": args.method, "batch": args.batch, "step_seconds": {"median": median, "min": min(seconds)},
        "images_per_second": args.batch / median, "peak_rss_mib": peak_rss_mib(), "threads": args.threads, "steps": args.steps,
        "versions": versions(), **more,
    }, indent=1))


if __name__ == "__main__":
    main()
