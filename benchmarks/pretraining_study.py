"""The effect of each pre-training target at equal budgets and over several seeds, and the cost of a token bank.

    python -m benchmarks.pretraining_study --data CIFAR10 --out runs/mim --pixel runs/study/pixel-1200-{seed} \
        --perceptual runs/study/MoCo-v3-1200-{seed} --control runs/study/random-ResNet-1200-{seed}
    python -m benchmarks.pretraining_study --views --data FEW_IMAGES --out runs/views --perceptual ...
    python -m benchmarks.pretraining_study --out runs/mim --table

The arms: `scratch` is the ViT with random weights, fine-tuned without layer decay; `pixels` predicts pixels (MAE's
target); `pixel codebook` is BEiT with a tokenizer of our own; `control codebook` and `perceptual codebook` have
tokenizers whose perceptual networks have random and learned weights. Each ViT is probed (linear over layers and
pooling, k-NN) and fine-tuned. --views compares banks of 1, 4 and 16 views with tokens that are computed in each step,
on so few images that views repeat.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.runs import command, differences, records, run_parallel, study_parser, table

ARMS = ("scratch", "pixels", "pixel codebook", "control codebook", "perceptual codebook")
VIEWS = (1, 4, 16, 0)
TITLES = {
    "finetuned": "fine-tuned, %",
    "linear": "linear probe, %",
    "knn": "k-NN, %",
    "mim_loss": "held-out MIM loss",
    "mim_accuracy": "accuracy at masked patches, %",
    "images_per_second": "pre-training, images/s",
}


def last(run: Path, name: str) -> float | None:
    """Return the last value of a metric in a run's log, or None when the log does not have the metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def run_arm(arm: str, seed: int, arguments: argparse.Namespace, views: int | None = None) -> None:
    """Pre-train, probe and fine-tune the ViT of an arm unless its result exists."""
    name = f"{arm.replace(' ', '-')}{'' if views is None else f'-views-{views}'}-{seed}"
    out = Path(arguments.out)
    result = out / f"{name}.json"
    if result.exists():
        return
    record: dict[str, Any] = {"arm": arm, "seed": seed, "views": "online" if views == 0 else views}
    vit, classifier, common = out / name, out / f"{name}-classifier", ["--data", arguments.data, "--seed", str(seed)]
    weights = ["--weights", "random"] if arm == "scratch" else []
    if arm == "scratch":
        vit = out / f"pixels-{seed}"  # names the architecture; so this arm runs after the others
    else:
        if not (vit / "export").exists():  # the export is written last
            pretrain(arm, seed, vit, arguments, views)
        record |= {"mim_loss": last(vit, "evaluation/loss"), "mim_accuracy": last(vit, "evaluation/accuracy")}
        record |= {"images_per_second": last(vit, "images_per_second")}
    (out / f"{name}.probe").unlink(missing_ok=True)  # of an interrupted study
    probe = ["--out", str(out / f"{name}.probe"), "--max-train", str(arguments.images), *weights]
    command("probe", *common, "--backbone", str(vit), *probe)
    figures = json.loads((out / f"{name}.probe").read_text())
    record |= {kind: figures[kind]["accuracy"] for kind in ("linear", "knn")} | {"layers": figures["linear"]["layers"]}
    tune = ["--max-steps", str(arguments.finetune_steps), "--sample-every", "1000000", "--save-every", "1000000"]
    words = ["--backbone", str(vit), "--out", str(classifier), "--overwrite", *weights, *tune, *arguments.finetune_set]
    command("finetune", arguments.recipe, *common, *words)
    record["finetuned"] = last(classifier, "evaluation/top1")
    for folder in (vit, classifier):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result.write_text(json.dumps(record) + "\n")


def pretrain(arm: str, seed: int, vit: Path, arguments: argparse.Namespace, views: int | None) -> None:
    """Train the ViT of an arm."""
    length = ["--max-steps", str(arguments.steps), "--sample-every", str(arguments.steps), "--save-every", "1000000"]
    words = ["--data", arguments.data, "--seed", str(seed), "--out", str(vit), "--overwrite", *length]
    if arm == "pixels":
        words += ["--target", "pixels"]
    else:
        tokenizer = getattr(arguments, arm.split()[0]).format(seed=seed)
        words += ["--tokenizer", tokenizer]
        if views:
            bank = vit.with_name(vit.name + "-bank")
            bank_words = ["--data", arguments.data, "--tokenizer", tokenizer, "--out", str(bank)]
            bank_words += ["--views", str(views), "--seed", str(seed)] + ["--overwrite"] * bank.exists()
            command("tokenize", arguments.recipe, *bank_words, *_flags_of_views(arguments.pretrain_set))
            words += ["--tokens", str(bank)]
    command("pretrain", arguments.recipe, *words, *arguments.pretrain_set)


def _flags_of_views(words: list[str]) -> list[str]:
    """Return the flags of `pretrain` that `tokenize` needs too, because they define the views."""
    flags = []
    for name in ("--image-size", "--min-crop", "--tokenizer-size"):
        if name in words:
            flags += [name, words[words.index(name) + 1]]
    return flags


def main() -> None:
    parser = study_parser(__doc__, codebooks_help="codebook run with {seed} in its name")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--out", default="runs/mim")
    parser.add_argument("--recipe", default="tiny", help="recipe of pretrain and finetune")
    parser.add_argument("--steps", type=int, default=400, help="steps of pre-training")
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=10_000, help="largest number of training images of the probes")
    parser.add_argument("--views", action="store_true", help="compare token banks of several views")
    parser.add_argument("--pretrain-set", default="", type=str.split, help="further flags of pretrain, in one string")
    parser.add_argument("--finetune-set", default="", type=str.split, help="further flags of finetune, in one string")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.views and not arguments.table:
        jobs = [partial(run_arm, "perceptual codebook", s, arguments, v) for s in arguments.seeds for v in VIEWS]
        run_parallel(jobs, arguments.processes)
    elif not arguments.table:
        codebooks = [name for name in ("pixel", "control", "perceptual") if getattr(arguments, name)]
        for arms in (["pixels", *(f"{name} codebook" for name in codebooks)], ["scratch"]):
            run_parallel(
                (partial(run_arm, a, s, arguments) for s in arguments.seeds for a in arms), arguments.processes
            )
    order = [str(view or "online") for view in VIEWS]
    keys = ["arm", "views"] if arguments.views else ["arm"]
    print(table(records(out), keys, TITLES, lambda key: (ARMS.index(key[0]), *(order.index(str(v)) for v in key[1:]))))
    if not arguments.views:
        accuracies = {metric: TITLES[metric] for metric in ("linear", "knn", "finetuned")}
        print(f"\n{differences(records(out), list(combinations(reversed(ARMS), 2)), accuracies)}")


if __name__ == "__main__":
    main()
