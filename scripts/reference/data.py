#!/usr/bin/env python3
"""Random sets, written by `datasets` and `webdataset`, read by them and by us: every row has to be the same.

    python scripts/reference/data.py [--rows 2000] [--seed 0]

Run from the repository's root. Images are JPEG and PNG of many sizes, texts of many lengths and scripts, cells that are
empty; shards and row groups have random sizes, Parquet random codecs. Ours come from the test `dump` of tests/sets.rs, which
lists a set and streams it through a small buffer.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pyarrow.parquet as pq
import webdataset as wds
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

datasets.disable_progress_bars()
CLASSES = [f"class {i}" for i in range(17)]
LETTERS = list("abcdefghij äöüß 猫犬鳥 🙂🦉 \"',;|\t")


def picture(rng):
    size = rng.integers(1, 90, 2)
    out = io.BytesIO()
    pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, ["PNG", "JPEG"][rng.integers(2)])
    return out.getvalue()


def text(rng, longest=200):
    return "x" + "".join(rng.choice(LETTERS, rng.integers(0, longest))).strip() + "x"


def sha(data):
    return hashlib.sha256(data).hexdigest()


def ours(source, columns):
    env = {**os.environ, "PEFT_SET": json.dumps({source: columns})}
    command = ["cargo", "test", "-q", "--test", "sets", "dump", "--", "--ignored", "--nocapture"]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    rows = [json.loads(line[4:]) for line in out.stdout.splitlines() if line.startswith("row ")]
    streamed = [json.loads(line[7:]) for line in out.stdout.splitlines() if line.startswith("stream ")]
    return rows, streamed


def compare(name, want, source, columns):
    got, streamed = ours(source, columns)
    key = lambda row: row["sha256"]
    for kind, rows in [("listed", got), ("streamed", streamed)]:
        assert len(rows) == len(want), (name, kind, len(rows), len(want))
        for a, b in zip(sorted(rows, key=key), sorted(want, key=key)):
            assert {k: a[k] for k in b} == b, (name, kind, a, b)
        print(f"{name}, {kind}: {len(rows)} rows are the same")


def parquet(rng, count, out):
    features = Features(
        {
            "picture": datasets.Image(),
            "label": ClassLabel(names=CLASSES),
            "caption": Value("string"),
            "answers": List(Value("string")),
            "score": Value("float64"),
        }
    )
    done = 0
    while done < count:
        rows = [
            {
                "picture": {"bytes": picture(rng), "path": None},
                "label": int(rng.integers(-1, len(CLASSES))),
                "caption": text(rng) if rng.random() < 0.9 else None,
                "answers": [text(rng, 10) for _ in range(rng.integers(0, 5))],
                "score": float(rng.normal()),
            }
            for _ in range(min(count - done, int(rng.integers(1, 300))))
        ]
        file = out / f"part-{done:06}.parquet"
        part = Dataset.from_list(rows, features=features)
        part.to_parquet(file, batch_size=int(rng.integers(1, 200)))
        if rng.random() < 0.7:
            # As somebody else may have written it.
            codec, version = ["snappy", "zstd", "gzip", "lz4", "none"][rng.integers(5)], ["1.0", "2.0"][rng.integers(2)]
            options = {"compression": codec, "data_page_version": version, "data_page_size": int(rng.integers(100, 100_000))}
            pq.write_table(pq.read_table(file), file, row_group_size=int(rng.integers(1, 200)), **options)
        done += len(rows)
    table = datasets.load_dataset("parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(out / "cache"))
    table = table.cast_column("picture", datasets.Image(decode=False))
    names = table.features["label"]
    want = [
        {
            "sha256": sha(r["picture"]["bytes"]),
            "label": None if r["label"] == -1 else names.int2str(r["label"]),
            "texts": [r["caption"].strip()] if r["caption"] else [],
            "answers": [a.strip() for a in r["answers"]],
            "value": r["score"],
        }
        for r in table
    ]
    compare("parquet", want, "parquet", {"path": f"{out}/part-*.parquet", "image": "picture", "text": "caption", "value": "score"})


def webdataset(rng, count, out):
    with wds.ShardWriter(f"{out}/part-%06d.tar", maxcount=int(rng.integers(20, 200)), verbose=0) as sink:
        for i in range(count):
            data = picture(rng)
            sample = {"__key__": f"{text(rng, 3).replace('.', '')}/{'long' * int(rng.integers(0, 50))}{i:06}"}
            sample["jpg" if data[:2] == b"\xff\xd8" else "png"] = data
            sample["cls"] = int(rng.integers(len(CLASSES)))
            sample["json"] = {"value": float(rng.normal()), "answers": [text(rng, 10) for _ in range(rng.integers(0, 5))]}
            if rng.random() < 0.9:
                sample["txt"] = text(rng)
            sink.write(sample)
    want = []
    for sample in wds.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False):
        meta = json.loads(sample["json"])
        want.append(
            {
                "sha256": sha(sample["jpg"] if "jpg" in sample else sample["png"]),
                "label": CLASSES[int(sample["cls"])],
                "texts": [sample["txt"].decode().strip()] if "txt" in sample else [],
                "answers": [a.strip() for a in meta["answers"]],
                "value": meta["value"],
            }
        )
    compare("webdataset", want, "webdataset", {"path": f"{out}/part-*.tar", "classes": CLASSES})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for number, check in enumerate([parquet, webdataset]):
        with tempfile.TemporaryDirectory() as out:
            check(np.random.default_rng([args.seed, number]), args.rows, Path(out))


if __name__ == "__main__":
    main()
