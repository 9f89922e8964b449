#!/usr/bin/env python3
"""`peft` against PyTorch + transformers + HF PEFT on this machine, in turn: medians and ratios.

    python3 -m venv data/peers && data/peers/bin/pip install -r scripts/peers/requirements.txt
    cargo build --release && python3 scripts/bench.py --rounds 3 --steps 5       # every row; nothing else may run beside it
    python3 scripts/bench.py --rows lora full --patch 16 --batch 8 --rank 4      # another shape
    python3 scripts/bench.py --shapes --rounds 1 --steps 2                       # the LoRA step on every shape of SHAPES

Both sides read what scripts/peers/inputs.py makes in data/bench. Each round runs each row on both sides, the first side in turn;
figures are medians over the rounds. Raw figures go to benches/results/<name>.json after every round. PyTorch gets its pixels and
ids ready-made; `peft bench` decodes images beside its steps and counts only the steps. Rows whose method the binary does not
know are left out. `--list` names the rows and the shapes. With `--shapes` the rows, `lora` unless `--rows` names others, are
measured on several shapes, each of which changes one or two options; what it does not change is as the other options say.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "data/bench"
OPTIONS = ("rounds", "steps", "threads", "patch", "batch", "rank", "targets", "towers")
SIDES = ("ours", "theirs")
LABELS = "dog,cat,heart,clock,tree,house,car,boat,bird,cup"

# Steps of training. name: (what, the recipe's method, settings, flags of steps.py).
# {rank}, {alpha}, {targets}, {towers}, {batch} come from this script's options.
LORA = "{{lora: {{rank: {rank}, alpha: {alpha}, targets: [{targets}], towers: {towers}}}}}"
HOULSBY = "{{bottleneck: {{placement: houlsby, reduction: 16, towers: {towers}}}}}"
MAX, LONGEST = "task={classify: {pad: max}}", "task={classify: {pad: longest}}"
STEPS = {
    "lora": ("LoRA step, 77 tokens", LORA, [MAX], ["--method", "lora"]),
    "lora-longest": ("LoRA step, prompts trimmed; PyTorch 77 tokens", LORA, [LONGEST], ["--method", "lora"]),
    "lora-trimmed": ("LoRA step, prompts trimmed on both sides", LORA, [LONGEST], ["--method", "lora", "--pad", "longest"]),
    "full": ("full fine-tuning step", "full", [MAX], ["--method", "full"]),
    "dora": ("DoRA step", LORA.replace("lora", "dora"), [MAX], ["--method", "dora"]),
    "prefix": ("prefix step", "{{prefix: {{length: 8, towers: {towers}}}}}", [MAX], ["--method", "prefix"]),
    "bottleneck": ("bottleneck step", HOULSBY, [MAX], ["--method", "bottleneck"]),
    "ia3": ("IA3 step", "{{ia3: {{towers: {towers}}}}}", [MAX], ["--method", "ia3"]),
    "vpt": ("VPT-deep step, image tower", "{{vpt: {{length: 8}}}}", [MAX], ["--method", "vpt", "--towers", "vision"]),
    "tiny": (
        "builtin:tiny, LoRA step, batch 64", LORA, [MAX, "model=builtin:tiny", "train.batch=64"],
        ["--method", "lora", "--batch", "64", "--model", str(ROOT / "src/builtin/tiny")],
    ),
}
# Shapes that --shapes runs through. name: options that differ.
SHAPES = {
    "ViT-B/16": {"patch": 16},
    "batch 8": {"batch": 8},
    "batch 64": {"batch": 64},
    "rank 4": {"rank": 4},
    "rank 32": {"rank": 32},
    "fc1 and fc2": {"targets": "fc1,fc2"},
    "vision only": {"towers": "vision"},
    "one thread": {"threads": 1},
}
OTHERS = {
    "features": "image features, batch 64 (32 in peft)",
    "preprocess": "JPEG 500×375 to 224, one thread",
    "predict": "one image, cold start",
    "last2": "LoRA on the last 2 blocks, from the second epoch; against the first",
    "head": "linear head, after the first epoch; against a full forward",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a measurement")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="a subset")
    parser.add_argument("--shapes", nargs="*", metavar="NAME", help="measure on several shapes; all of them where none is named")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--python", type=pathlib.Path, default=ROOT / "data/peers/bin/python", help="of the peers' environment")
    parser.add_argument("--peft", type=pathlib.Path, default=ROOT / "target/release/peft")
    parser.add_argument("--out", type=pathlib.Path, help="benches/results/peers.json, with --shapes shapes.json")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--patch", type=int, default=32, help="of ViT-B")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8, help="alpha is twice that")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj")
    parser.add_argument("--towers", choices=["vision", "text", "both"], default="both")
    args = parser.parse_args()
    if unknown := set(args.rows or []) - {*STEPS, *OTHERS}:
        sys.exit(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join([*STEPS, *OTHERS])}")
    if unknown := set(args.shapes or []) - set(SHAPES):
        sys.exit(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    args.out = args.out or ROOT / f"benches/results/{'peers' if args.shapes is None else 'shapes'}.json"
    return args


def shaped(args):
    """The options of every shape that is wanted, by the shape's name."""
    if args.shapes is None:
        return {"": args}
    wanted = [name for name in SHAPES if not args.shapes or name in args.shapes]
    args.rows = args.rows or ["lora"]
    return {name: argparse.Namespace(**{**vars(args), **SHAPES[name]}) for name in wanted}


def process(command):
    """Output, wall seconds, processor seconds and peak MiB of a whole process."""
    command = list(map(str, command))
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        out = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\n{errors.read()}")
    return out, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


class Bench:
    """One measurement a method; each gives seconds (of a step or an image), images_per_second and peak_rss_mib."""

    def __init__(self, args):
        self.args = args
        self.model = DATA / f"vit-b-{args.patch}"
        self.floor = "--floor" in subprocess.run([args.peft, "bench", "--help"], capture_output=True, text=True).stdout
        self.versions = {}

    def recipe(self, method):
        a = self.args
        path = DATA / "recipe.yaml"
        method = method.format(rank=a.rank, alpha=2 * a.rank, targets=a.targets.replace(",", ", "), towers=a.towers)
        path.write_text(
            f"model: {self.model}\nmethod: {method}\ndata: {{ folder: {{ root: {DATA / 'images'} }} }}\n"
            f"task: {{ classify: {{}} }}\ntrain: {{ batch: {a.batch}, schedule: constant }}\n"
        )
        return path

    def knows(self, name):
        if name not in STEPS:
            return True
        command = [self.args.peft, "train", self.recipe(STEPS[name][1]), "--check", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode and "unknown variant" not in done.stderr:
            sys.exit(f"{name}: {done.stderr}")
        return done.returncode == 0

    def bench(self, method, settings, steps=None, floor=False):
        sets = [part for value in settings for part in ("--set", value)]
        command = [self.args.peft, "bench", self.recipe(method), *sets, "--steps", steps or self.args.steps]
        command += ["--threads", self.args.threads, "--json", "--quiet", *(["--floor"] if floor and self.floor else [])]
        found = json.loads(process(command)[0])
        if floor := found.get("floor"):
            found["floor_seconds"] = floor["seconds"]["median"]
        return {"seconds": found["step_seconds"]["median"], **found}

    def peers(self, *flags):
        a = self.args
        command = [a.python, ROOT / "scripts/peers/steps.py", "--steps", a.steps, "--threads", a.threads, "--batch", a.batch]
        command += ["--rank", a.rank, "--targets", a.targets, "--towers", a.towers, "--model", self.model, *flags]
        found = json.loads(process(command)[0])
        self.versions = found.pop("versions")
        return {"seconds": found["step_seconds"]["median"], **found}

    def embed(self, model, images, few, many, threads):
        """Two counts of images, so that the start cancels; the larger of wall and processor time, so that no thread hides."""
        found = []
        for count in (few, many):
            paths = DATA / "images.txt"
            paths.write_text("".join(f"{images[i % len(images)]}\n" for i in range(count)))
            command = [self.args.peft, "embed", "--model", model, "--images", paths, "--threads", threads, "--quiet"]
            found.append(process([*command, "--output", DATA / "features.safetensors"])[1:])
        (wall0, work0, _), (wall1, work1, peak) = found
        seconds = max(wall1 - wall0, (work1 - work0) / threads) / (many - few)
        return {"seconds": seconds, "images_per_second": 1 / seconds, "peak_rss_mib": peak}

    def step_row(self, name):
        _, method, settings, flags = STEPS[name]
        return lambda: self.bench(method, settings, floor=True), lambda: self.peers(*flags)

    def features(self):
        images = sorted((DATA / "prepared").glob("*.bmp"))
        most = 64 * (1 + self.args.steps)
        flags = ["--method", "features", "--batch", "64"]
        ours = partial(self.embed, self.model, images, 64, most, self.args.threads)
        return ours, lambda: self.per_image(self.peers(*flags))

    def preprocess(self):
        images = sorted((DATA / "images").rglob("*.jpg"))
        most = 32 + 64 * self.args.steps
        flags = ["--method", "preprocess", "--batch", "64", "--threads", "1", "--images", DATA / "images"]
        return partial(self.embed, DATA / "decode-only", images, 32, most, 1), lambda: self.per_image(self.peers(*flags))

    def predict(self):
        image = sorted((DATA / "images").rglob("*.jpg"))[0]
        command = [self.args.peft, "predict", "--model", self.model, "--labels", LABELS]
        command += [image, "--threads", self.args.threads]

        def ours():
            process(command)
            runs = [process(command) for _ in range(self.args.steps)]
            return {"seconds": statistics.median(r[1] for r in runs), "peak_rss_mib": max(r[3] for r in runs)}

        return ours, lambda: self.peers("--method", "predict", "--images", DATA / "images")

    def last2(self):
        """Steps of the second epoch on; a random flip keeps the baseline from caching anything."""
        method = LORA.replace("towers: {towers}", "towers: {towers}, layers: {{last: 2}}")
        steps = max(self.args.steps, 4 * -(-80 // self.args.batch))
        first = [LONGEST, "train.augment={flip: true}"]
        return lambda: self.per_image(self.bench(method, [LONGEST], steps)), lambda: self.per_image(self.bench(method, first))

    def head(self):
        settings, steps = ["task={classify: {head: linear}}"], 20 * self.args.steps
        return lambda: self.per_image(self.bench("none", settings, steps)), self.features()[0]

    @staticmethod
    def per_image(found):
        return {**found, "seconds": 1 / found["images_per_second"]}


def summary(rounds):
    """Medians over the rounds, and ratios of the medians."""
    def median(side, key):
        values = [r[side][key] for r in rounds if r[side].get(key) is not None]
        return statistics.median(values) if values else None

    def ratio(a, b):
        return a / b if a and b else None

    keys = ["seconds", "images_per_second", "peak_rss_mib", "floor_seconds"]
    ours, theirs = ({key: median(side, key) for key in keys} for side in SIDES)
    return {
        "ours": ours, "theirs": theirs, "ratio": ratio(ours["seconds"], theirs["seconds"]),
        "memory_ratio": ratio(ours["peak_rss_mib"], theirs["peak_rss_mib"]),
        "floor_multiple": ratio(ours["seconds"], ours["floor_seconds"]),
    }


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine(args):
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    # Clouds hide the model's name; family and model tell Zen 4 (25, 17) from Zen 5 (26, 2).
    fact = lambda key: next((line.split(":")[1].strip() for line in cpuinfo if line.split("\t")[0] == key), "")
    name = f"{fact('model name')}, family {fact('cpu family')}, model {fact('model')}" if cpuinfo else ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": name or platform.machine(), "cores": os.cpu_count(), "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "src", "adapters", "Cargo.lock")),
        "options": options(args),
    }


def options(args):
    return {key: getattr(args, key) for key in OPTIONS}


def cell(row, side):
    found, name = row[side], row["row"]
    whole = name in STEPS or name == "predict"
    speed = f"{found['seconds']:.3f} s" if whole else f"{found['images_per_second']:.1f} images/s"
    own = "peft: " if side == "theirs" and name in ("last2", "head") else ""
    return f"{own}{speed}, {found['peak_rss_mib']:.0f} MiB"


def table(rows):
    """`ratio` is time for the same work: 0.5 is twice as fast."""
    lines = ["| what | peft | PyTorch | ratio | memory ratio | floor multiple |", "|---|---|---|---|---|---|"]
    for row in rows.values():
        figures = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("ratio", "memory_ratio", "floor_multiple")]
        lines.append(f"| {row['what']} | {' | '.join([*(cell(row, side) for side in SIDES), *figures])} |")
    return "\n".join(lines)


def measurements(args):
    """key: (row, what it is, options, a measurement for each side), and the rows that the binary does not know."""
    what = {**{name: step[0] for name, step in STEPS.items()}, **OTHERS}
    found, left_out = {}, set()
    for shape, options in shaped(args).items():
        process([options.python, ROOT / "scripts/peers/inputs.py", DATA, "--patch", options.patch])
        bench = Bench(options)
        for name in [name for name in what if not options.rows or name in options.rows]:
            if not bench.knows(name):
                left_out.add(name)
                continue
            sides = bench.step_row(name) if name in STEPS else getattr(bench, name)()
            text = f"{what[name]}: {shape}" if shape else what[name]
            found[f"{name}, {shape}" if shape else name] = (name, text, bench, list(zip(SIDES, sides)))
    return found, sorted(left_out)


def main():
    args = arguments()
    if args.list:
        rows = {**{name: step[0] for name, step in STEPS.items()}, **OTHERS}
        shapes = {name: ", ".join(f"{k} {v}" for k, v in shape.items()) for name, shape in SHAPES.items()}
        return print("\n".join(f"{name:14}{text}" for name, text in [*rows.items(), *shapes.items()]))
    wanted, left_out = measurements(args)
    rounds, versions = {key: [] for key in wanted}, {}
    for i in range(args.rounds):
        for key, (name, _, bench, sides) in wanted.items():
            rounds[key].append({side: measure() for side, measure in (sides if i % 2 == 0 else sides[::-1])})
            versions = bench.versions or versions
            print(f"round {i + 1}/{args.rounds}  {key}  ratio {summary(rounds[key])['ratio']:.3f}", file=sys.stderr)
        rows = {
            key: {"row": name, "what": what, "options": options(bench.args), **summary(rounds[key]), "rounds": rounds[key]}
            for key, (name, what, bench, _) in wanted.items()
        }
        result = {**machine(args), "versions": versions, "left_out": left_out, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    if left_out:
        print(f"left out, not known to this binary: {', '.join(left_out)}", file=sys.stderr)


if __name__ == "__main__":
    main()
