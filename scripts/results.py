#!/usr/bin/env python3
"""The table of README: every method on `builtin:emoji`, what it reaches and what it forgets.

    cargo build --release && python3 scripts/results.py --jobs 2     # about 15 minutes on 2 cores; only the standard library

For each method the learning rate is chosen among four by the mean validation accuracy of three seeds (validation has 82 images,
so that one seed alone would choose by chance); the chosen rate's three runs are tested. `flat` is the zero-shot accuracy on the held-out coloured style afterwards: what was forgotten.
Each run has one thread, `--jobs` of them go side by side. Runs go to runs/results/, the figures to benches/results/emoji.json. Finished runs are kept, so an interrupted script goes on.
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


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def spread(values):
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}


def percent(figure):
    return f"{100 * figure['mean']:.1f} ± {100 * figure['sd']:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    side_by_side = ThreadPoolExecutor(parser.parse_args().jobs).map
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
