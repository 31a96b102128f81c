"""What pre-training brings to segmentation and detection, at equal budgets and over several seeds.

    python -m benchmarks.dense_study segment --data CAMVID --out runs/camvid --pixel runs/mim/pixel-codebook-{seed} \
        --control runs/mim/control-codebook-{seed} --perceptual runs/mim/perceptual-codebook-{seed} \
        --recipe camvid --set "--max-steps 300"
    python -m benchmarks.dense_study detect --data NUCLEI --out runs/nuclei ... --recipe nuclei
    python -m benchmarks.dense_study segment --out runs/camvid --table

Arms are backbones, runs of `pretrain` with {seed} in their names; `scratch` is the pixel arm's network with random
weights. Everything else is equal. `benchmarks/pretraining_study.py` trains such runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

from benchmarks.runs import command, records, side_by_side, table

ARMS = ("scratch", "pixel codebook", "control codebook", "perceptual codebook")
TITLES = {
    "segment": {"miou": "mIoU, %", "mean_accuracy": "mean accuracy, %", "pixel_accuracy": "pixel accuracy, %"},
    "detect": {"box_ap": "box AP, %", "box_ap50": "box AP50, %", "mask_ap": "mask AP, %", "mask_ap50": "mask AP50, %"},
}


def run_arm(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train one arm, unless it is done."""
    name = f"{arm.replace(' ', '-')}-{seed}"
    out, result = Path(arguments.out) / name, Path(arguments.out) / f"{name}.json"
    if result.exists():
        return
    given = {"pixel": arguments.pixel, "control": arguments.control, "perceptual": arguments.perceptual}
    backbone = given["pixel" if arm == "scratch" else arm.split()[0]].format(seed=seed)
    words = [arguments.task, arguments.recipe, "--data", arguments.data, "--backbone", backbone, "--seed", str(seed)]
    words += ["--weights", "random"] if arm == "scratch" else []
    command(*words, "--out", str(out), "--overwrite", *arguments.set)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if any(key.startswith("evaluation/") for key in line))
    found = {key.removeprefix("evaluation/"): value for key, value in last.items() if key.startswith("evaluation/")}
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    result.write_text(json.dumps({"arm": arm, "seed": seed, **found}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TITLES))
    parser.add_argument("--data", default="")
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--pixel", default="", help="pretrain run with {seed} in its name")
    parser.add_argument("--control", default="", help="the same")
    parser.add_argument("--perceptual", default="", help="the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", default="", type=str.split, help="further flags, in one string")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    given = {"scratch": arguments.pixel, "pixel codebook": arguments.pixel}
    given |= {"control codebook": arguments.control, "perceptual codebook": arguments.perceptual}
    if not arguments.table:
        arms = [arm for arm in ARMS if given[arm]]
        side_by_side((partial(run_arm, a, s, arguments) for s in arguments.seeds for a in arms), arguments.processes)
    print(table(records(out), ["arm"], TITLES[arguments.task], lambda key: ARMS.index(key[0])))


if __name__ == "__main__":
    main()
