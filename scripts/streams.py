#!/usr/bin/env python3
"""Memory of streamed training by the number of rows: a million take what a thousand take.

    python scripts/streams.py [--binary target/release/peft] [--rows 1000 100000 1000000] [--format webdataset parquet]

Writes shards of 20 x 20 PNGs (PyPI: pyarrow, pillow, numpy; tars by the standard library) into a scratch directory, trains
`builtin:tiny` for a few steps with `stream: true` and prints the largest resident set (the report's `peak_rss_mib`, which is
the kernel's VmHWM), seconds until the first step and seconds of a step. The training split alone grows.
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ["red", "green", "blue"]
SHARD = 50_000
RECIPE = """
model: builtin:tiny
method: {{ lora: {{ rank: 4 }} }}
data: {{ {source}: {{ path: {path}, stream: {stream}, buffer: 10000 }} }}
task: {{ classify: {{ templates: ["a {{}} thing"] }} }}
train: {{ steps: 20, batch: 32, lr: 1.0e-3, evaluate_every: 1000000, augment: {{ flip: true }} }}
output: {out}
"""


def pictures():
    rng, out = np.random.default_rng(0), []
    for i in range(300):
        pixels = rng.integers(0, 60, (20, 20, 3))
        pixels[..., i % 3] += 150
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        out.append(file.getvalue())
    return out


def tar(path, numbers, images):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            for extension, data in [("png", images[i % 300]), ("cls", CLASSES[i % 3].encode())]:
                info = tarfile.TarInfo(f"{i:09}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def parquet(path, numbers, images):
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(numbers), 1000):
            part = numbers[start : start + 1000]
            rows = [{"bytes": images[i % 300], "path": None} for i in part]
            writer.write_table(pa.table([pa.array(rows, schema[0].type), pa.array([CLASSES[i % 3] for i in part])], schema=schema))


def run(binary, source, rows, stream, images):
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write, extension = {"webdataset": (tar, "tar"), "parquet": (parquet, "parquet")}[source]
        (scratch / "set").mkdir()
        write(scratch / "set" / f"validation-0.{extension}", range(99), images)
        write(scratch / "set" / f"test-0.{extension}", range(99), images)
        for start in range(0, rows, SHARD):
            write(scratch / "set" / f"train-{start // SHARD:05}.{extension}", range(start, min(rows, start + SHARD)), images)
        recipe = RECIPE.format(source=source, path=scratch / "set", stream=stream, out=scratch / "run")
        (scratch / "recipe.yaml").write_text(recipe)
        start = time.time()
        subprocess.run([binary, "train", scratch / "recipe.yaml", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        total = time.time() - start
        report = json.loads((scratch / "run" / "report.json").read_text())
        size = sum(f.stat().st_size for f in (scratch / "set").iterdir()) / 2**20
        return report["peak_rss_mib"], size, total - report["step_seconds"], report["step_seconds"] / report["steps"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/peft")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--format", nargs="+", default=["webdataset", "parquet"])
    parser.add_argument("--listed", action="store_true", help="with stream: false beside it")
    args = parser.parse_args()
    images = pictures()
    print("| source | rows | streamed | shards, MiB | peak, MiB | other seconds | seconds a step |\n|---|---|---|---|---|---|---|")
    for source in args.format:
        for rows in args.rows:
            for stream in ["true", "false"] if args.listed else ["true"]:
                peak, size, other, step = run(args.binary, source, rows, stream, images)
                print(f"| {source} | {rows} | {stream} | {size:.0f} | {peak:.0f} | {other:.1f} | {step:.3f} |", flush=True)


if __name__ == "__main__":
    main()
