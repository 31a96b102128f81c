"""What pre-training brings, target by target, at equal budgets and over several seeds; and what a token bank costs.

    python -m benchmarks.pretraining_study --data CIFAR10 --out runs/mim --pixel runs/study/pixel-1200-{seed} \
        --perceptual runs/study/MoCo-v3-1200-{seed} --control runs/study/random-ResNet-1200-{seed}
    python -m benchmarks.pretraining_study --views --data FEW_IMAGES --out runs/views --perceptual ...
    python -m benchmarks.pretraining_study --out runs/mim --table

Arms: `scratch` is the ViT with random weights; `pixels` restores pixels (MAE's target); `pixel codebook` is BEiT's
arrangement with a tokenizer of our own; `control codebook` and `perceptual codebook` differ in what the perceptual
network of the codebook had learned. Each ViT is probed (linear over layers and pooling, k-NN) and fine-tuned. --views
compares banks of 1, 4 and 16 views with tokens made online, on images few enough that views repeat.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runs import command, records, side_by_side, table

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
    """The last value of a metric in a run's log."""
    values = [json.loads(line).get(name) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [value for value in values if value is not None]
    return found[-1] if found else None


def run_arm(arm: str, seed: int, arguments: argparse.Namespace, views: int | None = None) -> None:
    """Pre-train, probe and fine-tune one ViT, unless it is done."""
    name = f"{arm.replace(' ', '-')}{'' if views is None else f'-views-{views}'}-{seed}"
    out = Path(arguments.out)
    result = out / f"{name}.json"
    if result.exists():
        return
    record: dict[str, Any] = {"arm": arm, "seed": seed, "views": "online" if views == 0 else views}
    vit, classifier, common = out / name, out / f"{name}-classifier", ["--data", arguments.data, "--seed", str(seed)]
    weights = ["--weights", "random"] if arm == "scratch" else []
    if arm == "scratch":
        vit = out / f"pixels-{seed}"  # its network with random weights: run after it
    else:
        if not (vit / "export").exists():  # written last
            pretrain(arm, seed, vit, arguments, views)
        record |= {"mim_loss": last(vit, "evaluation/loss"), "mim_accuracy": last(vit, "evaluation/accuracy")}
        record |= {"images_per_second": last(vit, "images_per_second")}
    (out / f"{name}.probe").unlink(missing_ok=True)  # of a study that was interrupted
    probe = ["--out", str(out / f"{name}.probe"), "--max-train", str(arguments.images), *weights]
    command("probe", *common, "--backbone", str(vit), *probe)
    figures = json.loads((out / f"{name}.probe").read_text())
    record |= {kind: figures[kind]["accuracy"] for kind in ("linear", "knn")} | {"layers": figures["linear"]["layers"]}
    tune = ["--max-steps", str(arguments.finetune_steps), "--sample-every", "1000000", "--save-every", "1000000"]
    own = ["--backbone", str(vit), "--out", str(classifier), "--overwrite", *weights, *tune, *arguments.finetune_set]
    command("finetune", arguments.recipe, *common, *own)
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
        given = {"pixel": arguments.pixel, "control": arguments.control, "perceptual": arguments.perceptual}
        tokenizer = given[arm.split()[0]].format(seed=seed)
        words += ["--tokenizer", tokenizer]
        if views:
            bank = vit.with_name(vit.name + "-bank")
            sizes = ["--views", str(views), "--seed", str(seed), "--overwrite"] if bank.exists() else []
            sizes = sizes or ["--views", str(views), "--seed", str(seed)]
            image = _sizes(arguments.pretrain_set)
            own = ["--data", arguments.data, "--tokenizer", tokenizer, "--out", str(bank), *sizes, *image]
            command("tokenize", arguments.recipe, *own)
            words += ["--tokens", str(bank)]
    command("pretrain", arguments.recipe, *words, *arguments.pretrain_set)


def _sizes(words: list[str]) -> list[str]:
    """Of further flags of pre-training, those that also name views."""
    found = []
    for name in ("--image-size", "--min-crop", "--tokenizer-size"):
        if name in words:
            found += [name, words[words.index(name) + 1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--out", default="runs/mim")
    parser.add_argument("--recipe", default="tiny", help="of pretrain and finetune")
    parser.add_argument("--pixel", default="", help="codebook run with {seed} in its name")
    parser.add_argument("--control", default="", help="the same")
    parser.add_argument("--perceptual", default="", help="the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of pre-training")
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=10_000, help="most training images of the probes")
    parser.add_argument("--views", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pretrain-set", default="", type=str.split, help="further flags, in one string")
    parser.add_argument("--finetune-set", default="", type=str.split, help="the same")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    given = {"pixel codebook": arguments.pixel, "control codebook": arguments.control}
    given |= {"perceptual codebook": arguments.perceptual}
    if arguments.views and not arguments.table:
        jobs = [partial(run_arm, "perceptual codebook", s, arguments, v) for s in arguments.seeds for v in VIEWS]
        side_by_side(jobs, arguments.processes)
    elif not arguments.table:
        trained = [arm for arm in ARMS if arm == "pixels" or given.get(arm)]
        for arms in (trained, ["scratch"]):
            side_by_side(
                (partial(run_arm, a, s, arguments) for s in arguments.seeds for a in arms), arguments.processes
            )
    order = [str(view or "online") for view in VIEWS]
    keys = ["arm", "views"] if arguments.views else ["arm"]
    print(table(records(out), keys, TITLES, lambda key: (ARMS.index(key[0]), *(order.index(str(v)) for v in key[1:]))))


if __name__ == "__main__":
    main()
