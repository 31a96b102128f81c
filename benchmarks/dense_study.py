"""The effect of pre-training on segmentation and detection, at equal budgets and over several seeds.

    python -m benchmarks.dense_study segment --data CAMVID --out runs/camvid --pixel runs/mim/pixel-codebook-{seed} \
        --control runs/mim/control-codebook-{seed} --perceptual runs/mim/perceptual-codebook-{seed} \
        --recipe camvid --set "--max-steps 300"
    python -m benchmarks.dense_study detect --data NUCLEI --out runs/nuclei ... --recipe nuclei
    python -m benchmarks.dense_study segment --out runs/camvid --table

The arms are backbones: runs of `pretrain` with {seed} in their names. `scratch` is the network of the pixel arm with
random weights, which learn without layer decay. Everything else is equal. `benchmarks/pretraining_study.py` trains such
runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path

from benchmarks.runs import command, differences, records, run_parallel, study_parser, table

ARMS = ("scratch", "pixel codebook", "control codebook", "perceptual codebook")
TITLES = {
    "segment": {"miou": "mIoU, %", "mean_accuracy": "mean accuracy, %", "pixel_accuracy": "pixel accuracy, %"},
    "detect": {"box_ap": "box AP, %", "box_ap50": "box AP50, %", "mask_ap": "mask AP, %", "mask_ap50": "mask AP50, %"},
}


def backbone_of(arm: str, arguments: argparse.Namespace) -> str:
    """Return the backbone of an arm, empty when the user gave none; `scratch` needs the architecture of `pixel`."""
    name = "pixel" if arm == "scratch" else arm.split()[0]
    return str(getattr(arguments, name))


def run_arm(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train an arm unless its result exists."""
    name = f"{arm.replace(' ', '-')}-{seed}"
    out, result = Path(arguments.out) / name, Path(arguments.out) / f"{name}.json"
    if result.exists():
        return
    backbone = backbone_of(arm, arguments).format(seed=seed)
    words = [arguments.task, arguments.recipe, "--data", arguments.data, "--backbone", backbone, "--seed", str(seed)]
    words += ["--weights", "random"] if arm == "scratch" else []
    command(*words, "--out", str(out), "--overwrite", *arguments.set)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if any(key.startswith("evaluation/") for key in line))
    metrics = {key.removeprefix("evaluation/"): value for key, value in last.items() if key.startswith("evaluation/")}
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    result.write_text(json.dumps({"arm": arm, "seed": seed, **metrics}) + "\n")


def main() -> None:
    parser = study_parser(__doc__, codebooks_help="pretrain run with {seed} in its name")
    parser.add_argument("task", choices=list(TITLES))
    parser.add_argument("--data", default="")
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", default="", type=str.split, help="further flags of every run, in one string")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        arms = [arm for arm in ARMS if backbone_of(arm, arguments)]
        run_parallel((partial(run_arm, a, s, arguments) for s in arguments.seeds for a in arms), arguments.processes)
    print(table(records(out), ["arm"], TITLES[arguments.task], lambda key: ARMS.index(key[0])))
    print(f"\n{differences(records(out), list(combinations(reversed(ARMS), 2)), TITLES[arguments.task])}")


if __name__ == "__main__":
    main()
