#!/usr/bin/env python3
"""Recomputes what `peft compare` says from its runs' predictions and files with scikit-learn; exits 1 where a figure differs.

    peft compare recipes/quickstart.yaml --methods full,lora,prefix,bottleneck --seeds 3
    peers/bin/python scripts/reference/compare.py runs/quickstart-compare

Checked for each row: accuracy, macro F1, top-5 accuracy and log loss of every run against its predictions; confusion matrices of
report.json; mean and sample standard deviation; the paired difference to the reference for each seed and over all of them, exactly,
and its interval against SciPy's bootstrap within 4 standard errors of a percentile; trained parameters counted in the safetensors
files; bytes of the delta; the Pareto front; the chosen learning rate of a search; the same figures in compare.csv.
"""

import csv
import json
import pathlib
import sys

import numpy as np
from safetensors import safe_open
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, top_k_accuracy_score

CHECKS = []


def check(what, ours, theirs, tolerance=1e-6):
    CHECKS.append((what, abs(ours - theirs) <= tolerance, ours, theirs))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_dir(out, run):
    path = pathlib.Path(run)
    return path if path.exists() else out / path.name


def metrics_of(lines, classes):
    truth, guess = [line["label"] for line in lines], [line["prediction"] for line in lines]
    found = {"accuracy": accuracy_score(truth, guess), "macro_f1": f1_score(truth, guess, average="macro")}
    scores = np.array([line["scores"] for line in lines], dtype=np.float64)
    index = [classes.index(label) for label in truth]
    if len(classes) > 5:
        found["top5_accuracy"] = top_k_accuracy_score(index, scores, k=5, labels=range(len(classes)))
    found["loss"] = log_loss(index, scores / scores.sum(1, keepdims=True), labels=range(len(classes)))
    return found


def trained(adapter):
    total = 0
    for file in adapter.rglob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            total += sum(int(np.prod(tensors.get_slice(k).get_shape())) for k in tensors.keys())
    return total


def row_of(out, group, row):
    """Predictions by seed; figures of the runs are checked on the way."""
    by_seed, values, place = {}, {}, f"{group['name']} {row['method']}"
    for run in row["runs"]:
        if run["failed"] is not None:
            continue
        directory = run_dir(out, run["run"])
        lines, report = read(directory / "predictions.jsonl"), json.loads((directory / "report.json").read_text())
        by_seed[run["seed"]] = lines
        if group["task"] == "classify":
            found = metrics_of(lines, group["classes"])
            for name, value in found.items():
                values.setdefault(name, []).append(value)
                # Scores are stored in single precision.
                check(f"{place} seed {run['seed']} {name}", report["after"]["loss"] if name == "loss" else report["after"]["metrics"][name], value,
                      1e-4 if name == "loss" else 1e-9)
            matrix = confusion_matrix([l["label"] for l in lines], [l["prediction"] for l in lines], labels=group["classes"])
            check(f"{place} seed {run['seed']} confusion", int((matrix != np.array(report["after"]["classification"]["confusion"])).sum()), 0)
        if not any("prefix" in json.dumps(m) and "reparameterise" in json.dumps(m) for m in row["options"]):
            check(f"{place} parameters", row["trainable_parameters"], trained(directory / "adapter"))
        size = sum(f.stat().st_size for f in (directory / "adapter").rglob("*") if f.is_file())
        check(f"{place} seed {run['seed']} delta bytes", report["adapter_bytes"], size)
    for name, found in values.items():
        check(f"{place} mean {name}", row["metrics"][name]["mean"], np.mean(found), 1e-4 if name == "loss" else 1e-9)
        if len(found) > 1:
            check(f"{place} sd {name}", row["metrics"][name]["sd"], np.std(found, ddof=1), 1e-4 if name == "loss" else 1e-9)
    if values:
        check(f"{place} test", row["test"]["mean"], np.mean(values[group["metric"]]), 1e-9)
    return by_seed


def hits(lines):
    return {line["id"]: float(line["label"] == line["prediction"]) for line in lines}


def interval(place, ours, samples):
    theirs = bootstrap((samples,), np.mean, n_resamples=10000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    # The spread of a percentile of 10000 resamples is some 3 % of their standard deviation.
    # Means of examples stand a lattice apart; another draw may end on the next point of it.
    tolerance = 4 * 0.03 * np.std(samples) / np.sqrt(len(samples)) + 1.01 / len(samples)
    check(f"{place} low", ours[0], theirs.low, tolerance)
    check(f"{place} high", ours[1], theirs.high, tolerance)


def difference(group, row, ours, reference):
    if row["difference"] is None:
        return
    place, paired = f"{group['name']} {row['method']} difference", {}
    for seed in sorted(set(ours) & set(reference)):
        a, b = hits(ours[seed]), hits(reference[seed])
        assert a.keys() == b.keys(), f"{place}: test examples differ"
        paired[seed] = np.array([a[i] - b[i] for i in sorted(a)])
    for entry in row["difference"]["seeds"]:
        check(f"{place} seed {entry['seed']}", entry["mean"], paired[entry["seed"]].mean(), 1e-9)
        interval(f"{place} seed {entry['seed']}", entry["interval"], paired[entry["seed"]])
    mean = np.mean(list(paired.values()), axis=0)
    check(place, row["difference"]["mean"], mean.mean(), 1e-9)
    interval(place, row["difference"]["interval"], mean)


def front(group):
    points = [(r["trainable_parameters"], r["test"]["mean"], r["pareto"], r["method"]) for r in group["rows"] if r["test"]]
    for n, v, marked, name in points:
        beaten = any(m <= n and w >= v and (m < n or w > v) for m, w, _, _ in points)
        check(f"{group['name']} {name} front", float(marked), float(not beaten))


def search(group, row):
    if row["search"]:
        chosen = [t for t in row["search"] if t["chosen"]]
        check(f"{group['name']} {row['method']} one is chosen", len(chosen), 1)
        check(f"{group['name']} {row['method']} chosen", chosen[0]["validation"], max(t["validation"] or -1 for t in row["search"]))
        check(f"{group['name']} {row['method']} lr", row["lr"], chosen[0]["lr"])


def main():
    out = pathlib.Path(sys.argv[1])
    comparison = json.loads((out / "compare.json").read_text())
    table = {(line["group"], line["method"]): line for line in csv.DictReader((out / "compare.csv").open())}
    for group in comparison["groups"]:
        predictions = {row["method"]: row_of(out, group, row) for row in group["rows"]}
        for row in group["rows"]:
            if comparison["reference"] in predictions:
                difference(group, row, predictions[row["method"]], predictions[comparison["reference"]])
            search(group, row)
            if row["test"]:
                check(f"{group['name']} {row['method']} csv", float(table[group["name"], row["method"]]["test_mean"]), row["test"]["mean"])
        front(group)
    wrong = [c for c in CHECKS if not c[1]]
    for what, _, ours, theirs in wrong:
        print(f"{what}: {ours}, expected {theirs}")
    print(f"{len(CHECKS)} figures, {len(wrong)} differ")
    sys.exit(bool(wrong) or not CHECKS)


if __name__ == "__main__":
    main()
