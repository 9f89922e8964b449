#!/usr/bin/env python3
"""The tables of README: methods on `builtin:emoji`, what they reach and what they forget. Only the standard library.

    cargo build --release
    python3 scripts/results.py --jobs 2                            # "What it reaches", about 15 minutes on 2 cores
    python3 scripts/results.py --methods --base DIR --jobs 2       # "Every method", about 30 minutes; DIR: CLIP ViT-B/32, any weights
    python3 scripts/results.py --methods --search --jobs 2         # how its learning rates were found, about 40 minutes

For each method the learning rate is chosen among four by the mean validation accuracy of three seeds (validation has 82 images,
so that one seed alone would choose by chance); the chosen rate's three runs are tested. `flat` is the zero-shot accuracy on the held-out coloured style afterwards: what was forgotten.
Each run has one thread, `--jobs` of them go side by side. Runs go to runs/results/, the figures to benches/results/emoji.json. Finished runs are kept, so an interrupted script goes on.

`--methods` is `peft compare` over recipes/methods with three seeds, each recipe at its own rate, plus what `peft train --check` says of
the parameters on DIR, and 200 steps at the pace of `peft bench`. `--search` tries three rates for each recipe, half a power of ten
apart, with seed 0 and by validation (accuracy, then loss): its own, the next above, then the one on the better side.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEFT = ROOT / "target/release/peft"
RUNS = ROOT / "runs/results"
RECIPE = ROOT / "recipes/quickstart.yaml"
SEEDS = [0, 1, 2]

METHODS = {
    # name: (method, learning rates, further settings)
    "linear probe": ("none", [0.01, 0.03, 0.1, 0.3], ["task={classify: {head: linear}}", "train.augment={}", "train.epochs=100"]),
    "LoRA": (None, [1e-3, 2e-3, 4e-3, 8e-3], []),
    "prefix": ("{prefix: {length: 8}}", [2e-2, 4e-2, 8e-2, 1.6e-1], []),
    "bottleneck": ("{bottleneck: {reduction: 16}}", [4e-3, 8e-3, 1.6e-2, 3.2e-2], []),
    "full": ("full", [1e-4, 2e-4, 4e-4, 8e-4], []),
}


def peft(*arguments):
    done = subprocess.run([PEFT, *map(str, arguments), "--json", "--quiet", "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stderr}")
    return json.loads(done.stdout)


def sets(values):
    return [argument for value in values for argument in ("--set", value)]


def train(name, method, lr, more, seed):
    run = RUNS / f"{name.replace(' ', '-')}-{lr:g}-{seed}"
    values = [f"train.lr={lr}", f"train.seed={seed}", *more]
    if method is not None:
        values.append(f"method={method}")
    summary = peft("train", RECIPE, *sets(values), "--output", run, "--resume")
    report = json.loads((run / "report.json").read_text())
    best = report["epochs"][report["best_epoch"] - 1]["val"]
    return {
        "run": run, "lr": lr, "seed": seed, "val": best["metrics"]["accuracy"], "val_loss": best["loss"],
        "test": summary["after"]["accuracy"], "before": summary["before"]["accuracy"],
        "parameters": summary["trainable_parameters"], "bytes": summary["adapter_bytes"], "seconds": summary["seconds"],
    }


def flat(adapter=None):
    values = ["data.builtin=emoji-flat", "data.shots=null"]
    return peft("eval", RECIPE, *sets(values), *(["--adapter", adapter] if adapter else []))["accuracy"]


# In the table's order: whether it folds into plain weights, whether HF PEFT has it.
RECIPES = {
    "full": (True, False), "bare": (True, False), "lora": (True, True), "lora_plus": (True, True), "dora": (True, True),
    "pissa": (True, True), "olora": (True, True), "adalora": (True, True), "vera": (True, True), "loha": (True, True),
    "lokr": (True, True), "ia3": (True, True), "ln_tuning": (True, True), "bitfit": (True, False), "svd": (True, False),
    "prefix": (False, False), "bottleneck": (False, False), "compacter": (False, False), "vpt": (False, False),
    "coop": (False, False), "cocoop": (False, False), "maple": (False, False), "mixed": (False, False),
    "clip_adapter": (False, False), "prolip": (True, False), "tip_adapter": (False, False), "tip_adapter_f": (False, False),
    "linear_probe": (False, False), "linear_probe_text": (False, False),
}


def recipe(name):
    return ROOT / f"recipes/methods/{name}.yaml"


def step_seconds(name):
    # A bench of few steps has no room for AdaLoRA's schedule, which costs nothing.
    values = ["method={adalora: {init_r: 12, target_r: 8}}"] if name == "adalora" else []
    return peft("bench", recipe(name), *sets(values), "--steps", 10)["step_seconds"]["median"]


def methods(base, jobs):
    output = RUNS.parent / "methods-compare"
    recipes = [recipe(name) for name in RECIPES]
    options = ["--seeds", len(SEEDS), "--jobs", jobs, "--threads", jobs, "--output", output, "--reference", "full", "--json"]
    subprocess.run([PEFT, "compare", *map(str, [*recipes, *options])], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (group,) = json.loads((output / "compare.json").read_text())["groups"]
    # The recipe that a row comes from is in its runs' names.
    rows = {pathlib.Path(row["runs"][0]["run"]).name.split("-")[0]: row for row in group["rows"]}
    table = {}
    print("| method | on ViT-B/32 | on builtin:tiny | file, kB | folds | HF PEFT | lr | test accuracy, % | emoji-flat zero-shot, % | 200 steps, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (folds, hf) in RECIPES.items():
        row, lr = rows[name], rows[name]["lr"] if name != "tip_adapter" else None
        checked = peft("train", recipe(name), "--check", *sets([f"model={base}"])) if base else {}
        found = {
            "lr": lr, "test": row["test"], "forget": row["forget"], "delta_bytes": row["delta_bytes"],
            "trainable_parameters": row["trainable_parameters"], "vit_b_32": checked.get("trainable_parameters"),
            "step_seconds": step_seconds(name) if lr else None,
        }
        table[name] = found
        vit = "" if found["vit_b_32"] is None else f"{found['vit_b_32']}"
        seconds = f"{200 * found['step_seconds']:.0f}" if lr else "0"
        cells = [
            f"`{name}`", vit, f"{found['trainable_parameters']}", f"{found['delta_bytes'] / 1000:.0f}", "yes" if folds else "no",
            "yes" if hf else "", f"{lr:g}" if lr else "", percent(found["test"]), percent(found["forget"]), seconds,
        ]
        print(f"| {' | '.join(cells)} |")
    out = {"zero_shot": group["zero_shot"], "forget": group["forget"], "methods": table}
    (ROOT / "benches/results/methods.json").write_text(json.dumps(out, indent=1) + "\n")


def rates(name):
    """Validation accuracy and loss by rate, three rates."""
    middle = peft("train", recipe(name), "--check")["recipe"]["train"]["lr"]
    found = {}

    def better(a, b):
        for k in (a, b):
            if k not in found:
                lr = float(f"{middle * 10 ** (k / 2):.1e}")
                run = RUNS.parent / "methods-search" / f"{name}-{lr:g}"
                peft("train", recipe(name), *sets([f"train.lr={lr}"]), "--output", run, "--resume")
                report = json.loads((run / "report.json").read_text())
                best = report["epochs"][report["best_epoch"] - 1]["val"]
                found[k] = (best["metrics"]["accuracy"], -best["loss"], lr)
        return found[a][:2] > found[b][:2]

    better(2, 1) if better(1, 0) else better(-1, 0)
    best = max(found.values())
    return f"{name}: {best[2]:g} of " + ", ".join(f"{lr:g} ({100 * accuracy:.1f} %)" for _, (accuracy, _, lr) in sorted(found.items()))


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def spread(values):
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}


def percent(figure):
    # Tip-Adapter's cache knows its own classes only, so nothing else can be asked of it.
    return "" if figure is None else f"{100 * figure['mean']:.1f} ± {100 * figure['sd']:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", action="store_true", help="the table of every method")
    parser.add_argument("--search", action="store_true", help="with --methods: their learning rates")
    parser.add_argument("--base", help="with --methods: a base whose trained parameters are counted, too")
    arguments = parser.parse_args()
    side_by_side = ThreadPoolExecutor(arguments.jobs).map
    if arguments.search:
        return print(*side_by_side(rates, [name for name in RECIPES if name != "tip_adapter"]), sep="\n")
    if arguments.methods:
        return methods(arguments.base, arguments.jobs)
    base_flat = flat()
    zero_shot = peft("eval", RECIPE)
    support = [row["support"] for row in zero_shot["classification"]["classes"]]
    majority = max(support) / sum(support)
    results = {"majority": majority, "zero_shot": zero_shot["accuracy"], "zero_shot_flat": base_flat, "methods": {}}
    for name, (method, rates, more) in METHODS.items():
        trials = [list(side_by_side(partial(train, name, method, lr, more), SEEDS)) for lr in rates]
        runs = max(trials, key=lambda t: (mean(t, "val"), -mean(t, "val_loss")))
        forgets = [base_flat] * len(runs) if method == "none" else [flat(r["run"] / "adapter") for r in runs]
        results["methods"][name] = {
            "lr": runs[0]["lr"], "trials": {f"{t[0]['lr']:g}": mean(t, "val") for t in trials},
            "test": spread([r["test"] for r in runs]), "flat": spread(forgets), "parameters": runs[0]["parameters"],
            "bytes": runs[0]["bytes"],
            "seconds": statistics.median(r["seconds"] for r in runs),
        }
        print(name, percent(results["methods"][name]["test"]), file=sys.stderr)
    out = ROOT / "benches/results/emoji.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print("| method | lr | trained parameters | adapter | test accuracy, % | emoji-flat zero-shot, % | seconds |")
    print("|---|---|---|---|---|---|---|")
    print(f"| majority class | | | | {100 * majority:.1f} | | |")
    print(f"| zero-shot | | | | {100 * results['zero_shot']:.1f} | {100 * base_flat:.1f} | |")
    for name, r in results["methods"].items():
        size = f"{r['bytes'] / 1000:.0f} kB"
        print(f"| {name} | {r['lr']:g} | {r['parameters']} | {size} | {percent(r['test'])} | {percent(r['flat'])} | {r['seconds']:.0f} |")


if __name__ == "__main__":
    main()
