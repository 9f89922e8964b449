"""Captions one a row, as Flickr8k has them, in Parquet and in a tar: 20 images, five rows each, in turns.

python scripts/goldens/captions.py
"""

import io
from pathlib import Path

import datasets
import webdataset
from PIL import Image

OUT = Path(__file__).parents[2] / "tests/data/sets/captions"


def png(i):
    out = io.BytesIO()
    # Equal sizes, so that only the bytes tell images apart.
    Image.new("RGB", (8, 8), (12 * i, 255 - 12 * i, 7)).save(out, "png")
    return out.getvalue()


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [(i, f"caption {c} of {i}") for c in range(5) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = [{"image": {"bytes": png(i), "path": f"{k}.png"}, "text": text} for k, (i, text) in enumerate(rows)]
    datasets.Dataset.from_list(table, features=features).to_parquet(OUT / "captions.parquet")
    with webdataset.TarWriter(str(OUT / "captions.tar"), mtime=0) as out:
        for k, (i, text) in enumerate(rows):
            out.write({"__key__": f"{k:04}", "png": png(i), "txt": text})


if __name__ == "__main__":
    main()
