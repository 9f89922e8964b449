#!/usr/bin/env python3
"""scikit-learn's figures of pairs whose probabilities are equal in f32: tests/data/matching.json.

    python scripts/goldens/matching.py      (the environment of scripts/goldens/requirements.txt)

Scores are cosines times 100, as `match` has them with fusion `cosine` at CLIP's logit scale. The threshold is the score at which
`precision_recall_curve` has the largest F1, the highest of those that share it; the accuracy is `accuracy_score` at it.
"""

import json
import pathlib

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_recall_curve, roc_auc_score

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/matching.json"


def case(rng, count, centres, spread, steps=None):
    """Pairs that fit around one cosine, others around another."""
    fits = rng.random(count) < 0.4
    cosines = np.where(fits, centres[0], centres[1]) + spread * rng.standard_normal(count)
    scores = (cosines * 100).astype(np.float32)
    if steps:
        # Some scores are equal.
        scores = (np.round(scores / steps) * steps).astype(np.float32)
    # What JSON holds is what is computed with.
    scores = np.array([float(f"{s:.6g}") for s in scores], np.float32)
    saturated = (1 / (1 + np.exp(-scores))).astype(np.float32)
    precision, recall, thresholds = precision_recall_curve(fits, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-30)
    best = max(range(len(thresholds)), key=lambda i: (round(f1[i], 12), thresholds[i]))
    chosen = scores >= thresholds[best]
    return {
        "logits": [float(f"{s:.6g}") for s in scores],
        "fits": [bool(f) for f in fits],
        "roc_auc": roc_auc_score(fits, scores),
        "average_precision": average_precision_score(fits, scores),
        "threshold": float(f"{thresholds[best]:.6g}"),
        "f1": f1_score(fits, chosen),
        "accuracy": accuracy_score(fits, chosen),
        # What probabilities in f32 would give.
        "saturated_roc_auc": roc_auc_score(fits, saturated),
    }


def main():
    rng = np.random.default_rng(0)
    cases = [
        case(rng, 60, (0.36, 0.22), 0.04),
        case(rng, 60, (0.80, 0.60), 0.10),
        case(rng, 60, (0.30, 0.28), 0.05, steps=1.5),
        case(rng, 60, (-0.20, -0.35), 0.06),
    ]
    OUT.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
