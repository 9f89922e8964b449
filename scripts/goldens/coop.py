#!/usr/bin/env python3
"""Which images CoOp's and CLIP-LoRA's code draws: writes tests/data/coop/draws.json.

Needs Python alone; run from the repository's root. The splits are made up (a few classes of different sizes, labels
interleaved); the draw is that of CoOp's Dassl (`DatasetBase.generate_fewshot_dataset`): `random.seed`, then `random.sample`
of each class in the order in which the split names them, `random.choices` where it has too few. CoOp draws training first,
CLIP-LoRA validation first; for ImageNet CLIP-LoRA draws both at once.
"""

import json
import random
from pathlib import Path

# Python draws from a list up to 21 (85 for 16 of them), by rejection beyond; both sides of both limits are here.
TRAIN, VAL = [30, 7, 3, 200, 85, 86, 21, 22], [9, 2, 5, 40, 21, 22, 3, 3]


def split(counts, prefix):
    """[[path, label, class name], …], the classes in turn, from the last to the first."""
    items = []
    for i in range(max(counts)):
        for label in reversed(range(len(counts))):
            if i < counts[label]:
                items.append([f"{prefix}/c{label}/{i:03}.jpg", label, f"class {label}"])
    return items


def by_label(items):
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return groups.values()


def few(items, k):
    out = []
    for group in by_label(items):
        out += random.sample(group, k) if len(group) >= k else random.choices(group, k=k)
    return out


def at_once(items, k):
    """CLIP-LoRA's ImageNet; classes with too few images do not occur there."""
    train, val = [], []
    for group in by_label(items):
        if len(group) >= k + min(4, k):
            drawn = random.sample(group, k + min(4, k))
            train, val = train + drawn[:k], val + drawn[k:]
    return train, val


def main():
    data = {"train": split(TRAIN, "a"), "val": split(VAL, "b"), "test": split([1] * len(TRAIN), "t")}
    paths = lambda items: [path for path, _, _ in items]
    draws = []
    for seed in [1, 3, 2**40 + 7]:
        for shots in [1, 4, 16]:
            random.seed(seed)
            train = few(data["train"], shots)
            val = few(data["val"], min(shots, 4))
            draws.append({"draw": "coop", "seed": seed, "shots": shots, "train": paths(train), "val": paths(val)})
            random.seed(seed)
            val = few(data["val"], min(shots, 4))
            train = few(data["train"], shots)
            draws.append({"draw": "clip-lora", "seed": seed, "shots": shots, "train": paths(train), "val": paths(val)})
    large = [item for label in (0, 3) for item in sorted(data["train"]) if item[1] == label]
    random.seed(1)
    train, val = at_once(large, 16)
    imagenet = {"seed": 1, "shots": 16, "train": paths(train), "val": paths(val)}
    out = Path("tests/data/coop/draws.json")
    out.write_text(json.dumps({"split": data, "draws": draws, "imagenet": imagenet}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
