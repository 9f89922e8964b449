#!/usr/bin/env python3
"""Reads a run's event file with TensorBoard's own reader and compares it with metrics.jsonl and report.json; exits 1 where they differ.

    peers/bin/python scripts/reference/events.py RUN…       (pip install tensorboard)

A run that was stopped and resumed has each step once: events of steps that came again are purged by the reader.
"""

import json
import pathlib
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def differing(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((run / "report.json").read_text())
    wanted = {f"train/{key}": [(s["step"], s[key]) for s in steps] for key in ("loss", "lr", "grad_norm")}
    wanted["train/epoch_loss"] = [(e["step"], e["train_loss"]) for e in report["epochs"]]
    evaluations = [("val", e["step"], e["val"]) for e in report["epochs"] if e.get("val")]
    for step, key in ((0, "before"), (report["steps"], "after")):
        evaluations.append((report["split"], step, report[key]))
    for split, step, found in evaluations:
        for name, value in {"loss": found["loss"], **found["metrics"]}.items():
            wanted.setdefault(f"{split}/{name}", []).append((step, value))
    if set(events.Tags()["scalars"]) != set(wanted):
        yield f"tags {sorted(events.Tags()['scalars'])}, expected {sorted(wanted)}"
    for tag, values in wanted.items():
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        if [s for s, _ in found] != [s for s, _ in values]:
            yield f"{tag}: steps {[s for s, _ in found]}, expected {[s for s, _ in values]}"
        elif any(abs(a - b) > 1e-6 * max(1, abs(b)) for (_, a), (_, b) in zip(found, values)):
            yield f"{tag}: values differ"


def main():
    wrong = [f"{run}: {what}" for run in map(pathlib.Path, sys.argv[1:]) for what in differing(run)]
    print("\n".join(wrong) or f"{len(sys.argv) - 1} runs agree")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
