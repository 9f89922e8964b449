"""Packs builtin:emoji and builtin:emoji-flat from the rendered icons: python packs.py [--data DIR] [--out DIR]

A pack is one line of JSON and then the PNG files, one behind the other; `offset` counts from the byte after the line.
The classes are the 20 largest subcategories; an item of another subcategory has the label null. A group (a concept with its
gender variants) lies in one split, the same one in both packs.
"""
import argparse
import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
SEED, SIZE, CLASSES, SHOTS = "emoji-splits-1", 64, 20, 16
SHARES = {"train": 0.40, "val": 0.10, "test": 0.50}
PACKS = {"emoji": "fluent-emoji-high-contrast", "emoji-flat": "fluent-emoji-flat"}


def chance(*key):
    return int.from_bytes(hashlib.sha256("\0".join([SEED, *key]).encode()).digest()[:8], "big")


def largest(items):
    """The class names of the largest subcategories, largest first, ties by the subcategory's own name."""
    counts = Counter((i["subcategory"], i["class"]) for i in items)
    order = sorted(counts, key=lambda key: (-counts[key], key))
    return [name for _, name in order[:CLASSES]]


def split_class(sizes):
    """Deals one class's groups in random order: to train up to its share and SHOTS, then to val, the rest to test."""
    total = sum(sizes.values())
    train = max(SHARES["train"] * total, SHOTS)
    val = (total - train) * SHARES["val"] / (1 - SHARES["train"])
    filled = Counter()
    splits = {}
    for group in sorted(sizes, key=chance):
        split = "train" if filled["train"] < train else "val" if filled["val"] < val else "test"
        splits[group] = split
        filled[split] += sizes[group]
    return splits


def split_groups(items, classes):
    members = defaultdict(Counter)
    for item in items:
        members[item["group"]][item["class"]] += 1
    by_class = defaultdict(dict)
    for group, counts in members.items():
        # A group over two subcategories counts where it has more members; groups outside the task are dealt as one class.
        name = max(sorted(counts), key=lambda c: counts[c])
        by_class[name if name in classes else None][group] = sum(counts.values())
    splits = {}
    for sizes in by_class.values():
        splits.update(split_class(sizes))
    return splits


def png(path):
    """On white; grey where the icon is, otherwise a palette (adaptive where it has more than 256 colours)."""
    icon = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(icon, ((SIZE - icon.width) // 2, (SIZE - icon.height) // 2))
    rgb = canvas.convert("RGB")
    grey = rgb.convert("L")
    if grey.convert("RGB").tobytes() == rgb.tobytes():
        image = grey
    else:
        image = rgb.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        error = sum(abs(a - b) for a, b in zip(image.convert("RGB").tobytes(), rgb.tobytes())) / (SIZE * SIZE * 3)
        assert error < 1.0, (path, error)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def pack(path, items, classes, splits, data):
    header, body = [], io.BytesIO()
    for item in items:
        content = png(data / item["image"])
        label = classes.index(item["class"]) if item["class"] in classes else None
        header.append({"id": item["id"], "name": item["name"], "label": label, "group": item["group"],
                       "split": splits[item["group"]], "heldout": item["heldout"], "offset": body.tell(), "len": len(content)})
        body.write(content)
    text = json.dumps({"size": SIZE, "classes": classes, "items": header}, separators=(",", ":"))
    path.write_bytes(text.encode() + b"\n" + body.getvalue())
    report(path, header, classes)


def report(path, header, classes):
    print(f"{path.name}: {len(header)} images, {path.stat().st_size / 1e6:.2f} MB, "
          f"{sum(i['heldout'] for i in header)} held out of pretraining, {len({i['name'] for i in header})} names")
    print(f"  {'class':28}" + "".join(f"{s:>7}" for s in SHARES) + f"{'groups':>8}{'heldout':>9}")
    for label, name in enumerate(classes):
        mine = [i for i in header if i["label"] == label]
        counts = Counter(i["split"] for i in mine)
        assert counts["train"] >= SHOTS, (name, counts)
        print(f"  {name:28}" + "".join(f"{counts[s]:7}" for s in SHARES)
              + f"{len({i['group'] for i in mine}):8}{sum(i['heldout'] for i in mine):9}")
    counts = Counter(i["split"] for i in header if i["label"] is not None)
    print(f"  {'all classes':28}" + "".join(f"{counts[s]:7}" for s in SHARES))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT / "data/emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "src/builtin")
    args = parser.parse_args()
    rows = [json.loads(line) for line in open(args.data / "eval.jsonl")]
    sets = {name: sorted((r for r in rows if r["set"] == style), key=lambda r: r["id"]) for name, style in PACKS.items()}
    classes = largest(sets["emoji"])
    assert set(classes) == set(largest(sets["emoji-flat"])), "the styles' largest subcategories differ"
    splits = split_groups(sets["emoji"], classes)
    for item in sets["emoji-flat"]:  # a concept that only the flat style has
        splits.setdefault(item["group"], "test")
    for name, items in sets.items():
        pack(args.out / f"{name}.pack", items, classes, splits, args.data)


main()
