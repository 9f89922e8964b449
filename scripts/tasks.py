#!/usr/bin/env python3
"""What each input, the fusion and LoRA are worth: README's table of tasks on image and text.

    cargo build --release && python3 scripts/tasks.py --jobs 2       # about half an hour on 2 cores; only the standard library
    python3 scripts/tasks.py --only match --seeds 0

For each recipe of recipes/tasks: the most frequent verdict, the image alone, the text alone, the frozen base without training, the
fusion and head alone on the frozen base, and the recipe as it is, each with three seeds. Runs go to runs/tasks-table/ and are kept, so
an interrupted script goes on; the figures go to benches/results/tasks.json.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEFT = ROOT / "target/release/peft"
RUNS = ROOT / "runs/tasks-table"

# recipe: (metric, {row: what is set}); `zero-shot` is evaluated and not trained.
TASKS = {
    "match": ("accuracy", ["task.match.{}", "fusion=cosine"]),
    "answer": ("accuracy", ["task.answer.{}", "task={answer: {choose: given}}", "fusion=cosine"]),
}


def rows(recipe):
    _, (key, *zero_shot) = TASKS[recipe]
    yield "image only", [key.format("inputs=image")]
    yield "text only", [key.format("inputs=text")]
    yield "zero-shot", ["method=none", *zero_shot]
    yield "fusion alone", ["method=none"]
    yield "LoRA + fusion", []


def peft(*arguments):
    done = subprocess.run([PEFT, *map(str, arguments), "--json", "--quiet", "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(job):
    recipe, row, values, seed = job
    path = ROOT / f"recipes/tasks/{recipe}.yaml"
    sets = [a for v in [*values, f"train.seed={seed}"] for a in ("--set", v)]
    if row == "zero-shot":
        found = peft("eval", path, *sets)
        return {"recipe": recipe, "row": row, "seed": seed, "test": found}
    run = RUNS / f"{recipe}-{row.replace(' ', '-')}-{seed}"
    summary = peft("train", path, *sets, "--output", run, "--resume")
    labels = [json.loads(line)["label"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    print(recipe, row, seed, summary["after"], file=sys.stderr)
    return {
        "recipe": recipe, "row": row, "seed": seed, "test": summary["after"], "seconds": summary["seconds"],
        "parameters": summary["trainable_parameters"], "bytes": summary["adapter_bytes"],
        "majority": max(collections.Counter(labels).values()) / len(labels),
    }


def spread(values):
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * sd:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(TASKS), help="a recipe; may be repeated")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    recipes = arguments.only or list(TASKS)
    seeds = [int(s) for s in arguments.seeds.split(",")]
    # What does not train is the same for every seed.
    jobs = [(r, row, values, s) for r in recipes for row, values in rows(r) for s in seeds if row != "zero-shot" or s == seeds[0]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(measure, jobs))
    out = ROOT / "benches/results/tasks.json"
    before = json.loads(out.read_text()) if out.exists() else []
    kept = [f for f in before if f["recipe"] not in recipes]
    for f in found:
        f["test"].pop("classification", None)
    out.write_text(json.dumps(kept + found, indent=1) + "\n")
    print("| task | metric | majority | image only | text only | zero-shot, frozen | fusion alone | LoRA + fusion | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in recipes:
        metric = TASKS[recipe][0]
        own = [f for f in found if f["recipe"] == recipe]
        cells = [spread([f["test"][metric] for f in own if f["row"] == row]) for row, _ in rows(recipe)]
        cells[2] = cells[2].split(" ")[0]
        whole = [f for f in own if f["row"] == "LoRA + fusion"]
        majority = 100 * statistics.mean(f["majority"] for f in whole)
        seconds = statistics.median(f["seconds"] for f in whole)
        print(f"| `{recipe}` | {metric}, % | {majority:.1f} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
