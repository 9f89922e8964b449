"""A contact sheet of random images per style, to be looked at: python sheet.py [--data DIR] [--out FILE]"""
import argparse
import json
import random
from pathlib import Path

from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "data/emoji")
parser.add_argument("--out", type=Path, default=Path("sheet.png"))
args = parser.parse_args()

rows = [json.loads(l) for name in ("train", "val", "eval") for l in open(args.data / f"{name}.jsonl")]
styles = sorted({Path(r["image"]).parent.name for r in rows})
rng = random.Random(0)
sheet = Image.new("RGB", (40 * 64 // 2, len(styles) * 128), "white")
for y, style in enumerate(styles):
    for i, row in enumerate(rng.sample([r for r in rows if Path(r["image"]).parent.name == style], 40)):
        image = Image.open(args.data / row["image"]).convert("RGBA")
        sheet.paste(image, (i % 20 * 64, y * 128 + i // 20 * 64), image)
sheet.save(args.out)
