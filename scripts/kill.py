#!/usr/bin/env python3
"""Random SIGKILLs: a run that is killed and resumed until it ends has to end in the bits of one that was left alone.

    cargo build --release && python3 scripts/kill.py          # 50 kills of the quickstart, some minutes

An undisturbed run comes first. Then runs are killed at random moments, from their start to their end, and gone on with by
--resume; one that ends before it is killed is compared and another begins. What is compared: every byte of adapter/, of
metrics.jsonl and of predictions.jsonl. The last line says how it went; the exit code is 1 where anything differs.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def files(run):
    """What has to be the same, by name."""
    paths = [*sorted((run / "adapter").rglob("*")), run / "metrics.jsonl", run / "predictions.jsonl"]
    # peft.json holds the recipe, and so the place of the run.
    return {str(p.relative_to(run)): p.read_bytes().replace(str(run).encode(), b"RUN") for p in paths if p.is_file()}


def start(args, run):
    command = [args.peft, "train", args.recipe, "--output", run, "--resume", "--quiet", "--threads", str(args.threads)]
    for change in args.set:
        command += ["--set", change]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    said = process.communicate()[1]
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {said.decode()}")


def steps(run):
    """Lines of metrics.jsonl; a kill may leave half of the last."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(run, expected):
    found = files(run)
    bad = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    bad += [str(p.relative_to(run)) for p in run.rglob(".*")]
    if bad:
        print(f"{run.name} differs: {', '.join(bad)}")
    return not bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=pathlib.Path, default=ROOT / "target/release/peft")
    parser.add_argument("--recipe", type=pathlib.Path, default=ROOT / "recipes/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        began = time.monotonic()
        finish(start(args, root / "whole"))
        seconds = time.monotonic() - began
        expected, total = files(root / "whole"), steps(root / "whole")
        kills, ended, good, reached = 0, 0, 0, []
        while kills < args.kills:
            run = root / f"run{ended}"
            process = start(args, run)
            try:
                process.wait(draw.uniform(0, seconds / 2))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                reached.append(steps(run))
                continue
            finish(process)
            ended, good = ended + 1, good + same(run, expected)
        run = root / f"run{ended}"
        finish(start(args, run))
        ended, good = ended + 1, good + same(run, expected)
        print(f"{kills} kills between steps {min(reached)} and {max(reached)} of {total}: {good} of {ended} runs end in the same bits "
              f"(undisturbed: {seconds:.1f} s)")
        sys.exit(0 if good == ended else 1)


if __name__ == "__main__":
    main()
