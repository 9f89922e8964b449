#!/usr/bin/env python3
"""Small sets as Hugging Face `datasets`, pyarrow and `webdataset` write them, and what they read from them again: writes
tests/data/sets.

Run from the repository's root. `expected.json` holds, for each set, what the library that wrote it reads: texts, class names
and the sha256 of every image's bytes, in order.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from webdataset.tariterators import base_plus_ext

OUT = Path("tests/data/sets")
CLASSES, TAGS = ["cat", "dog", "owl"], ["big", "small", "wild"]


def picture(i, format="PNG"):
    rng = np.random.default_rng(i)
    out = io.BytesIO()
    colour = [[220, 40, 30], [40, 210, 50], [30, 50, 230]][i % 3]
    pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def sha(data):
    return hashlib.sha256(data).hexdigest()


FEATURES = Features(
    {
        "image": datasets.Image(),
        "label": ClassLabel(names=CLASSES),
        "tags": List(ClassLabel(names=TAGS)),
        "caption": Value("string"),
        "alternatives": List(Value("string")),
        "question": Value("string"),
        "answers": List({"answer": Value("string"), "answer_id": Value("int32")}),
        "score": Value("float32"),
        "fits": Value("bool"),
        "concept": Value("string"),
        "unused": Value("binary"),
    }
)


def row(i):
    return {
        "image": {"bytes": picture(i), "path": f"{i:03}.png"},
        "label": i % 3,
        "tags": [t for t in range(3) if (i >> t) & 1],
        "caption": f"a {CLASSES[i % 3]}, number {i}; naïve “text”",
        "alternatives": [f"picture {i}", f"{CLASSES[i % 3]} {i}"],
        "question": f"what is number {i}?",
        "answers": [{"answer": CLASSES[i % 3], "answer_id": 1}, {"answer": f"number {i}", "answer_id": 2}],
        "score": i / 10,
        "fits": i % 2 == 0,
        "concept": f"g{i // 2}",
        "unused": bytes([255, i]),
    }


def read_back(files):
    with tempfile.TemporaryDirectory() as cache:
        table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache, keep_in_memory=True)
        table = table.cast_column("image", datasets.Image(decode=False))
        return rows_of(table)


def rows_of(table):
    label, tags = table.features["label"], table.features["tags"].feature
    return [
        {
            "sha256": sha(r["image"]["bytes"]),
            "label": label.int2str(r["label"]),
            "labels": [tags.int2str(t) for t in r["tags"]],
            "texts": r["alternatives"],
            "caption": r["caption"],
            "question": r["question"],
            "answers": [a["answer"] for a in r["answers"]],
            "value": round(r["score"], 6),
            "fits": r["fits"],
            "group": r["concept"],
        }
        for r in table
    ]


def hugging_face(expected):
    """Shards named as on the hub, row groups of four."""
    out = OUT / "hf"
    out.mkdir(parents=True)
    for name, numbers in [
        ("train-00000-of-00002", range(0, 10)),
        ("train-00001-of-00002", range(10, 18)),
        ("test-00000-of-00001", range(18, 24)),
    ]:
        part = Dataset.from_list([row(i) for i in numbers], features=FEATURES)
        part.to_parquet(out / f"{name}.parquet", batch_size=4)
    for split in ["train", "test"]:
        expected[f"hf/{split}"] = read_back(sorted(str(p) for p in out.glob(f"{split}-*")))


def codecs(expected):
    """What pyarrow can write: codecs, page versions, dictionaries, images as bare bytes, cells that are empty."""
    out = OUT / "codecs"
    out.mkdir(parents=True)
    for name, options in {
        "none": {"compression": "none", "use_dictionary": False},
        "snappy": {"compression": "snappy", "data_page_size": 200},
        "zstd": {"compression": "zstd", "data_page_version": "2.0"},
        "gzip": {"compression": "gzip", "write_page_index": True},
        "lz4": {"compression": "lz4", "data_page_version": "2.0", "use_dictionary": False},
        "brotli": {"compression": "brotli"},
    }.items():
        columns = {
            "image": pa.array([picture(i) for i in range(6)], pa.binary()),
            "text": pa.array([f"text {i}" if i != 4 else None for i in range(6)], pa.large_string() if name == "zstd" else pa.string()),
            "label": pa.array([CLASSES[i % 3] for i in range(6)]).dictionary_encode(),
        }
        pq.write_table(pa.table(columns), out / f"{name}.parquet", row_group_size=4, **options)
    expected["codecs"] = [{"sha256": sha(picture(i)), "label": CLASSES[i % 3], "texts": [f"text {i}"] if i != 4 else []} for i in range(6)]
    # An image that is missing, one that is a path, one that is there.
    image = pa.array(
        [{"bytes": None, "path": None}, {"bytes": None, "path": "7.png"}, {"bytes": picture(1), "path": "1.png"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": image, "text": ["only text", "a path", "bytes"]}), out / "sparse.parquet")
    (out / "7.png").write_bytes(picture(7))


def webdataset(expected):
    out = OUT / "wds"
    out.mkdir(parents=True)
    with wds.ShardWriter(f"{out}/shard-%06d.tar", maxcount=4, verbose=0, mtime=0) as sink:
        for i in range(10):
            sample = {"__key__": f"part.1/{i:04}", ["png", "jpg"][i % 2]: picture(i, ["PNG", "JPEG"][i % 2]), "cls": i % 3}
            sample["json"] = {"question": f"what is {i}?", "value": i / 4, "id": f"n{i}"}
            if i != 5:
                sample["txt"] = f"a {CLASSES[i % 3]}"
            sample["seg.png"] = picture(100)
            sink.write(sample)
    for shard in sorted(out.glob("*.tar")):
        for sample in wds.WebDataset(str(shard), shardshuffle=False, handler=wds.reraise_exception):
            image = sample.get("png", sample.get("jpg"))
            expected.setdefault("wds", []).append(
                {
                    "shard": shard.name,
                    "key": sample["__key__"],
                    "sha256": sha(image),
                    "label": CLASSES[int(sample["cls"])],
                    "texts": [sample["txt"].decode()] if "txt" in sample else [],
                    "question": json.loads(sample["json"])["question"],
                    "value": json.loads(sample["json"])["value"],
                }
            )


NAMES = ["0001.jpg", "0001.seg.png", "a.b/0001.jpg", "plain", "./0001.txt", "IMG_2022.05.01.png", "v1.2/x/IMG.01.jpg", "a/b.c/d.e.f"]
NAMES += ["a..png", "a/.b/c.png", "x.tar/y", "photo.JPG", "dir.v2/plain", ".hidden.png", "été.cls", "a b.c d.png"]


def keys():
    """Key and extension of members, as webdataset's own function has them."""
    rows = [[name, *base_plus_ext(name)] for name in NAMES]
    (OUT / "keys.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    expected = {}
    hugging_face(expected)
    codecs(expected)
    webdataset(expected)
    keys()
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
