#!/usr/bin/env python3
"""What each input, the fusion and LoRA are worth: README's table of tasks on image and text.

    cargo build --release && python3 scripts/tasks.py --jobs 2       # about half an hour on 2 cores; only the standard library
    python3 scripts/tasks.py --only match --seeds 0
    python3 scripts/tasks.py --table                                  # of the last figures again

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

# recipe: (metric, {row: what is set}); `zero-shot` is evaluated and not trained, `whole` is the recipe as it is.
TASKS = {
    "match": ("accuracy", {
        "image only": ["task.match.inputs=image"], "text only": ["task.match.inputs=text"],
        "zero-shot": ["method=none", "fusion=cosine"], "fusion alone": ["method=none"],
    }),
    "classify-both": ("accuracy", {
        "image only": ["task={classify: {inputs: image, head: linear}}", "fusion=null"], "text only": ["task.classify.inputs=text"],
        "zero-shot": ["task={classify: {templates: ['an icon of a {}']}}", "fusion=null"], "fusion alone": ["method=none"],
    }),
    "answer": ("accuracy", {
        "image only": ["task.answer.inputs=image"], "text only": ["task.answer.inputs=text"],
        "zero-shot": ["method=none", "task={answer: {choose: given}}", "fusion=cosine"], "fusion alone": ["method=none"],
    }),
    "retrieve": ("recall_mean", {"zero-shot": []}),
    "retrieve-images": ("mean_average_precision", {"zero-shot": []}),
    "regress": ("mae", {"fusion alone": ["method=none"]}),
}
ROWS = ["image only", "text only", "zero-shot", "fusion alone", "whole"]


def rows(recipe):
    return [(row, TASKS[recipe][1].get(row, [])) for row in ROWS if row == "whole" or row in TASKS[recipe][1]]


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
    labels = [json.loads(line).get("label") for line in (run / "predictions.jsonl").read_text().splitlines()]
    print(recipe, row, seed, summary["after"], file=sys.stderr)
    return {
        "recipe": recipe, "row": row, "seed": seed, "test": summary["after"], "seconds": summary["seconds"],
        "parameters": summary["trainable_parameters"], "bytes": summary["adapter_bytes"],
        "majority": constant(labels) if TASKS[recipe][0] == "mae" else max(collections.Counter(labels).values()) / len(labels),
    }


def spread(values, metric):
    scale = 1 if metric == "mae" else 100
    sd = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{sd}"


def constant(labels):
    """The error of the best single number."""
    numbers = sorted(map(float, labels))
    return statistics.mean(abs(n - statistics.median(numbers)) for n in numbers)


def print_table(found, recipes):
    print("| recipe | metric | always the same | image only | text only | frozen, zero-shot | fusion and head alone | as it is, LoRA | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for recipe in recipes:
        metric = TASKS[recipe][0]
        own = [f for f in found if f["recipe"] == recipe]
        at = lambda row: [f for f in own if f["row"] == row]
        cells = [spread([f["test"][metric] for f in at(row)], metric) if at(row) else "" for row in ROWS]
        same = "" if recipe.startswith("retrieve") else spread([at("whole")[0]["majority"]], metric)
        seconds = statistics.median(f["seconds"] for f in at("whole"))
        unit = metric if metric == "mae" else f"{metric}, %"
        print(f"| `{recipe}` | {unit} | {same} | {' | '.join(cells)} | {seconds:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(TASKS), help="a recipe; may be repeated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true", help="print the table of the last figures and run nothing")
    arguments = parser.parse_args()
    recipes = arguments.only or list(TASKS)
    out = ROOT / "benches/results/tasks.json"
    before = json.loads(out.read_text()) if out.exists() else []
    if arguments.table:
        return print_table(before, recipes)
    seeds = [int(s) for s in arguments.seeds.split(",")]
    # What does not train is the same for every seed.
    jobs = [(r, row, values, s) for r in recipes for row, values in rows(r) for s in seeds if row != "zero-shot" or s == seeds[0]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(measure, jobs))
    kept = [f for f in before if f["recipe"] not in recipes]
    for f in found:
        f["test"].pop("classification", None)
    out.write_text(json.dumps(kept + found, indent=1) + "\n")
    print_table(found, recipes)


if __name__ == "__main__":
    main()
