#!/usr/bin/env python3
"""Whether memory stays flat: trains a small recipe for many steps and watches its resident set.

    cargo build --release && python3 scripts/soak.py       # 5 000 steps of builtin:tiny on 80 icons, a few minutes on 2 cores

Fails where the median of the last fifth of the samples is more than 2 % above that of the second fifth; the first fifth is
warming up (decoded images, the allocator's pages). Epochs are short, so that validation and checkpoints come often.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = """\
model: builtin:tiny
method: {{ lora: {{ rank: 4 }} }}
data: {{ builtin: emoji, shots: 4 }}
task: {{ classify: {{}} }}
train: {{ steps: {steps}, batch: 8, lr: 1.0e-3, augment: {{ flip: true }}, evaluate_every: {every}, checkpoint_steps: 100 }}
output: {output}
"""


def resident(pid):
    """KiB, or nothing once the process is gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)


def watch(child, seconds):
    samples = []
    while child.poll() is None:
        if (now := resident(child.pid)) is not None:
            samples.append(now / 1024)
        time.sleep(seconds)
    return samples


def fifths(samples):
    size = len(samples) // 5
    return [statistics.median(samples[i * size:(i + 1) * size]) for i in range(5)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=pathlib.Path, default=ROOT / "target/release/peft")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=20, help="epochs between validations")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--growth", type=float, default=0.02, help="what is tolerated, as a share")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = pathlib.Path(folder) / "soak.yaml"
        recipe.write_text(RECIPE.format(steps=args.steps, every=args.every, output=pathlib.Path(folder) / "run"))
        child = subprocess.Popen([args.peft, "train", recipe, "--quiet"], stdout=subprocess.DEVNULL)
        samples = watch(child, args.interval)
        if child.returncode:
            sys.exit(f"the run failed with exit code {child.returncode}")
    if len(samples) < 25:
        sys.exit(f"only {len(samples)} samples: more --steps or a shorter --interval")
    medians = fifths(samples)
    growth = medians[4] / medians[1] - 1
    print(json.dumps({"steps": args.steps, "samples": len(samples), "peak_mib": round(max(samples), 1),
                      "medians_mib": [round(m, 1) for m in medians], "growth": round(growth, 4)}))
    if growth > args.growth:
        sys.exit(f"memory grew by {100 * growth:.1f} % from the second fifth to the last, more than {100 * args.growth:.1f} %")


if __name__ == "__main__":
    main()
