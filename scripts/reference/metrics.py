#!/usr/bin/env python3
"""Recomputes every metric of finished runs from their predictions with scikit-learn, SciPy and torchmetrics; exits 1 where one differs.

    peers/bin/pip install -r scripts/reference/requirements.txt
    peft train recipes/tasks/match.yaml && peers/bin/python scripts/reference/metrics.py runs/match
    peers/bin/python scripts/reference/metrics.py --retrieve target/release/peft   # trains on pictures that it draws, compares embeddings

A run of `classify`, `match`, `answer` or `regress` says with each prediction how sure it is; that is enough. What a temperature did is
undone first, since two calibration errors are reported, with it and without. A retrieval has no scores in its predictions: `--retrieve`
embeds the test split with `peft embed` and ranks that.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional import retrieval as tm
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15
FAILED = []


def check(what, ours, theirs, tolerance=1e-6):
    ok = abs(ours - theirs) <= tolerance
    print(f"{'same' if ok else 'DIFFERS':8} {what:50} {ours:.9f} {theirs:.9f}")
    if not ok:
        FAILED.append(what)


def read(run):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    report, card = json.loads((run / "report.json").read_text()), run / "adapter/peft.json"
    return lines, report, json.loads(card.read_text()).get("scalars", {}) if card.exists() else {}


def of_one(lines, report, scalars):
    """One class each: scores are probabilities after the temperature."""
    names = report["classes"]
    truth = np.array([names.index(line["label"]) for line in lines])
    guess = np.array([names.index(line["prediction"]) for line in lines])
    fitted = np.array([line["scores"] for line in lines], dtype=np.float64)
    plain = fitted ** scalars.get("temperature", 1.0)
    plain /= plain.sum(1, keepdims=True)
    onehot = np.eye(len(names))[truth]
    present = onehot.any(0)
    error = lambda p: float(multiclass_calibration_error(torch.tensor(p), torch.tensor(truth), len(names), n_bins=BINS, norm="l1"))
    return {
        "accuracy": sk.accuracy_score(truth, guess),
        "top5_accuracy": sk.top_k_accuracy_score(truth, plain, k=5, labels=range(len(names))) if len(names) > 5 else 1.0,
        "macro_f1": sk.f1_score(truth, guess, average="macro", labels=np.unique(np.concatenate([truth, guess]))),
        "mean_average_precision": sk.average_precision_score(onehot[:, present], plain[:, present], average="macro"),
        "calibration_error": error(plain),
        "calibration_error_fitted": error(fitted),
    }


def of_several(lines, report, scalars):
    """Any number of labels: scores are independent probabilities after the temperature."""
    names = report["classes"]
    several = lambda key: np.array([[name in (line[key] or "").split("|") for name in names] for line in lines])
    truth, guess = several("label"), several("prediction")
    fitted = np.array([line["scores"] for line in lines], dtype=np.float64).clip(1e-12, 1 - 1e-12)
    plain = 1 / (1 + ((1 - fitted) / fitted) ** scalars.get("temperature", 1.0))
    present = truth.any(0)
    # torchmetrics takes the class that is likelier; here every label is a case of yes.
    error = lambda p: sum(
        abs((p[b] - truth[b]).sum()) for b in (np.ceil(p * BINS).clip(1, BINS) == i for i in range(1, BINS + 1))
    ) / p.size
    return {
        "accuracy": sk.accuracy_score(truth, guess),
        "micro_f1": sk.f1_score(truth, guess, average="micro", zero_division=0),
        "macro_f1": sk.f1_score(truth, guess, average="macro", zero_division=0),
        "mean_average_precision": sk.average_precision_score(truth[:, present], plain[:, present], average="macro"),
        "calibration_error": error(plain),
        "calibration_error_fitted": error(fitted),
    }


def of_match(lines, report, scalars):
    yes = report["classes"][1]
    truth, guess = np.array([line["label"] == yes for line in lines]), np.array([line["prediction"] == yes for line in lines])
    scores = np.array([line["scores"][1] for line in lines])
    check("the stored threshold makes the predictions", float(((scores >= scalars["threshold"]) == guess).mean()), 1.0)
    return {
        "accuracy": sk.accuracy_score(truth, guess), "precision": sk.precision_score(truth, guess), "recall": sk.recall_score(truth, guess),
        "f1": sk.f1_score(truth, guess), "roc_auc": sk.roc_auc_score(truth, scores), "average_precision": sk.average_precision_score(truth, scores),
    }


def of_answers(lines, report, scalars):
    del report, scalars
    right = [line["label"] == line["prediction"] for line in lines]
    return {"accuracy": float(np.mean(right))}  # VQA accuracy: scripts/reference/vqa.py


def of_numbers(lines, report, scalars):
    del report, scalars
    truth, found = (np.array([float(line[key]) for line in lines]) for key in ("label", "prediction"))
    return {
        "mae": sk.mean_absolute_error(truth, found), "rmse": sk.root_mean_squared_error(truth, found),
        "pearson": stats.pearsonr(truth, found).statistic, "spearman": stats.spearmanr(truth, found).statistic,
    }


def run(path):
    lines, report, scalars = read(path)
    several = any("|" in (line["label"] or "") for line in lines)
    by = {"classify": of_several if several else of_one, "match": of_match, "answer": of_answers, "regress": of_numbers}
    for name, value in by[report["task"]](lines, report, scalars).items():
        ours = report["after"]["metrics"][name]
        # Scores are in single precision, so one may fall on the other side of a bin's edge.
        check(f"{path.name} {name}", ours, value, 2.0 / len(lines) if "calibration" in name else 1e-6)


def draw(root, count):
    """Pictures of coloured shapes with two captions each; several are alike."""
    from PIL import Image, ImageDraw

    draw, rows = random.Random(0), []
    for i in range(count):
        colour, shape = draw.choice(["red", "green", "blue", "yellow"]), draw.choice(["circle", "square"])
        image = Image.new("RGB", (64, 64), "white")
        at = draw.randint(4, 20)
        box = (at, at, at + 36, at + 36)
        getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")(box, fill=colour)
        image.save(root / f"{i}.png")
        rows.append((f"{i}.png", f"a {colour} {shape}", f"{colour}-{shape}", "train" if i % 4 else "test"))
    text = "".join(f"{i},{t},{label},{split}\n" for i, t, label, split in rows)
    (root / "rows.csv").write_text("image,text,label,split\n" + text)
    return [row for row in rows if row[3] == "test"]


def embed(peft, root, run, rows):
    from safetensors.torch import load_file

    (root / "images.txt").write_text("".join(f"{root / row[0]}\n" for row in rows))
    texts = list(dict.fromkeys(row[1] for row in rows))
    (root / "texts.txt").write_text("".join(f"{t}\n" for t in texts))
    subprocess.run([peft, "embed", "--model", "builtin:tiny", "--adapter", run / "adapter", "--images", root / "images.txt", "--texts",
                    root / "texts.txt", "--output", root / "e.safetensors", "--normalize", "--quiet", "--json"], check=True, capture_output=True)
    found = load_file(root / "e.safetensors")
    return found["image_embeds"].double(), found["text_embeds"].double(), texts


def ranks(prefix, scores, positive, left_out=None):
    """Over queries: torchmetrics for average precision and hits, the rank of the best positive."""
    each = {"mean_average_precision": [], "median_rank": [], **{f"recall_at_{k}": [] for k in (1, 5, 10)}, "map_at_r": []}
    for q, (row, own) in enumerate(zip(scores, positive)):
        keep = torch.ones_like(own) if left_out is None else torch.arange(len(own)) != q
        row, own = row[keep], own[keep]
        if not own.any():
            continue
        each["mean_average_precision"].append(sk.average_precision_score(own, row))
        each["median_rank"].append(1 + int((row > row[own].max()).sum()))
        for k in (1, 5, 10):
            each[f"recall_at_{k}"].append(float(tm.retrieval_hit_rate(row, own, top_k=k)))
        r = int(own.sum())
        each["map_at_r"].append(float(tm.retrieval_average_precision(row, own, top_k=r)) * float(tm.retrieval_precision(row, own, top_k=r)))
    return {prefix + name: float(np.median(v) if name == "median_rank" else np.mean(v)) for name, v in each.items()}


def retrieve(peft):
    root = pathlib.Path(tempfile.mkdtemp())
    rows = draw(root, 160)
    for pairs in ("texts", "labels"):
        column = "text: text" if pairs == "texts" else "label: label"
        recipe = root / f"{pairs}.yaml"
        recipe.write_text(f"model: builtin:tiny\nmethod: {{lora: {{rank: 4}}}}\ndata: {{table: {{path: {root}/rows.csv, {column}, split: split}}}}\n"
                          f"task: {{retrieve: {{pairs: {pairs}}}}}\ntrain: {{steps: 3, batch: 8, lr: 1.0e-4}}\n")
        out = root / pairs
        subprocess.run([peft, "train", recipe, "--output", out, "--quiet", "--json"], check=True, capture_output=True)
        images, texts, names = embed(peft, root, out, rows)
        ours = json.loads((out / "report.json").read_text())["after"]["metrics"]
        labels = [row[2] for row in rows]
        if pairs == "texts":
            own = torch.tensor([[row[1] == name for name in names] for row in rows])
            theirs = {**ranks("image_to_text_", images @ texts.T, own), **ranks("text_to_image_", texts @ images.T, own.T)}
        else:
            own = torch.tensor([[a == b for b in labels] for a in labels])
            theirs = ranks("", images @ images.T, own, left_out=True)
        for name in sorted(set(ours) & set(theirs)):
            check(f"retrieve {pairs} {name}", ours[name], theirs[name], 1e-4)
        unchecked = set(ours) - set(theirs) - {"recall_mean"}
        if unchecked:
            FAILED.append(f"unchecked {unchecked}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=pathlib.Path)
    parser.add_argument("--retrieve", metavar="PEFT", help="the program, to train two small retrievals with")
    arguments = parser.parse_args()
    for path in arguments.runs:
        run(path)
    if arguments.retrieve:
        retrieve(pathlib.Path(arguments.retrieve).resolve())
    print(f"{len(FAILED)} differ" + "".join(f"\n  {what}" for what in FAILED))
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
