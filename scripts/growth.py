#!/usr/bin/env python3
"""How cost grows: a step's time and memory over batch, rank, classes, images and threads, one at a time.

    cargo build --release && python3 scripts/growth.py       # about 10 minutes on 2 cores; needs data/bench (scripts/bench.py makes it)

LoRA on q, k, v of both towers of ViT-B/32 with random weights, 10 prompts trimmed to the longest, batch 32, rank 8, all cores;
the rows over images use builtin:tiny, so that data outweighs the model. Figures go to benches/results/growth.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "data/bench"
AXES = {
    "batch": [1, 8, 32, 128],
    "rank": [1, 4, 16, 64],
    "classes": [10, 100, 1000],
    "images": [1_000, 10_000, 100_000],
    "threads": [1, os.cpu_count()],
}


def table(path, images, classes):
    """Rows over the same few pictures: what grows is their number."""
    pictures = sorted((DATA / "images").rglob("*.jpg"))
    rows = ({"image": str(pictures[i % len(pictures)]), "label": f"class {i % classes}"} for i in range(images))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "val.jsonl").write_text("".join(json.dumps({"image": str(p), "label": f"class {i % classes}"}) + "\n"
                                                   for i, p in enumerate(sorted((DATA / "prepared").glob("*.bmp"))[:16])))


def measure(peft, steps, batch=32, rank=8, classes=10, images=1_000, threads=os.cpu_count(), model=DATA / "vit-b-32"):
    rows = DATA / "growth.jsonl"
    table(rows, images, classes)
    recipe = DATA / "growth.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: {{ lora: {{ rank: {rank}, alpha: {2 * rank} }} }}\n"
        f"data: {{ table: {{ path: {rows}, val: {rows.parent / 'val.jsonl'} }} }}\ntask: {{ classify: {{}} }}\n"
        f"train: {{ batch: {batch} }}\n"
    )
    done = subprocess.run([peft, "bench", recipe, "--steps", str(steps), "--threads", str(threads), "--json", "--quiet"],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    return {"seconds": found["step_seconds"]["median"], "images_per_second": found["images_per_second"],
            "data_seconds": found["data_seconds"], "peak_rss_mib": found["peak_rss_mib"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=pathlib.Path, default=ROOT / "target/release/peft")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/results/growth.json")
    args = parser.parse_args()
    found = {}
    print("| axis | value | step, s | images/s | MiB |\n|---|---|---|---|---|")
    for axis in args.axes:
        for value in AXES[axis]:
            options = {axis: value, **({"model": "builtin:tiny"} if axis == "images" else {})}
            row = found.setdefault(axis, {})[value] = measure(args.peft, args.steps, **options)
            print(f"| {axis} | {value} | {row['seconds']:.3f} | {row['images_per_second']:.1f} | {row['peak_rss_mib']:.0f} |", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
