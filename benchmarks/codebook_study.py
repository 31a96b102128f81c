"""The effect of each term of the codebook's loss, at equal budgets and over several seeds.

    python benchmarks/codebook_study.py --data CIFAR10 --out runs/study --judge JUDGE --squeezenet FILE
    python benchmarks/codebook_study.py --out runs/study --table

Every arm is `pecobook codebook tiny` with the settings of ARMS and the flags of --set. All arms have equal lengths and
use the feature network that `pecobook contrast tiny` trained with the same seed. An interrupted study continues with
the same command: finished runs are not repeated. Figures are measured on held-out images. To choose settings, give
--validation: a quarter of the training images is then held out, and the source's own held-out images are not used.

The judge, a classifier for reconstructions, is independent of all arms (benchmarks/judges.py). SqueezeNet is a file of
weights under torchvision's names; with --caffe its input is BGR from 0 to 255, as in the original release.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.judges import Judge
from benchmarks.runs import ONE_THREAD, command, differences, records, run_parallel, study_parser, table

MOCO = ("--perceptual.network", "MOCO", "--perceptual.layers", "3", "4")
SQUEEZENET = ("--perceptual.network", "torchvision:squeezenet1_1", "SQUEEZENET")
ADVERSARIAL = ("--adversarial.weight", "0.4", "--adversarial.num-layers", "2")
ARMS: dict[str, tuple[str, ...]] = {
    "pixel": ("--perceptual.network", "none"),
    "random ResNet": (*MOCO, "--perceptual.weights", "random"),
    "MoCo v3": MOCO,
    "MoCo v3, lambda 0.3": (*MOCO, "--perceptual.weight", "0.3"),
    "MoCo v3, lambda 3": (*MOCO, "--perceptual.weight", "3"),
    "MoCo v3, lambda 10": (*MOCO, "--perceptual.weight", "10"),
    "MoCo v3, adversarial": (*MOCO, *ADVERSARIAL),
    "MoCo v3, adversarial from half": (*MOCO, *ADVERSARIAL, "--adversarial.start", "HALF"),
    "random SqueezeNet": (*SQUEEZENET, "--perceptual.weights", "random"),
    "random SqueezeNet, lambda 0.3": (*SQUEEZENET, "--perceptual.weights", "random", "--perceptual.weight", "0.3"),
    "SqueezeNet": SQUEEZENET,
    "SqueezeNet, lambda 0.3": (*SQUEEZENET, "--perceptual.weight", "0.3"),
    "SqueezeNet, lambda 3": (*SQUEEZENET, "--perceptual.weight", "3"),
    "SqueezeNet, lambda 10": (*SQUEEZENET, "--perceptual.weight", "10"),
    "SqueezeNet, adversarial": (*SQUEEZENET, *ADVERSARIAL),
    "random SqueezeNet, warm-up": (*SQUEEZENET, "--perceptual.weights", "random", "--perceptual.warmup", "HALF"),
    "SqueezeNet, warm-up": (*SQUEEZENET, "--perceptual.warmup", "HALF"),
    "MoCo v3, warm-up": (*MOCO, "--perceptual.warmup", "HALF"),
    "classification on codewords": ("--perceptual.network", "none", "--explicit.kind", "classification"),
    "contrastive on codewords": ("--perceptual.network", "none", "--explicit.kind", "contrastive"),
}
TITLES = {
    "codeword_probe": "codeword probe, %",
    "bag_probe": "bag of codes, %",
    "crossed_probe": "codeword probe with position removed, %",
    "crossed_bag_probe": "bag of codes with position removed, %",
    "position": "position in codes, %",
    "null_position": "position in permuted codes, %",
    "bound": "codewords bound to one position, %",
    "roll": "codes that move with a roll, %",
    "crop": "codes that move with a crop, %",
    "judged": "reconstructions classified, %",
    "psnr": "PSNR, dB",
    "distance_moco": "MoCo distance",
    "distance_squeezenet": "SqueezeNet distance",
    "codes_used": "codes used",
    "perplexity": "perplexity",
}


COMPARED = ("crossed_probe", "crossed_bag_probe", "codeword_probe", "judged")
"""Metrics whose differences between arms are printed."""

CURVES = {
    "psnr": "PSNR, dB",
    "position": "position in codes, %",
    "crossed_probe": "probe, position removed",
    "crop": "codes that move, %",
}
"""Metrics that --curves draws, and the short titles of the panels."""


def controls_of(arm: str) -> list[str]:
    """Return the arms that an arm is compared with: pixels alone, and the same network with random weights."""
    network, _, settings = arm.partition(", ")
    control = {"MoCo v3": "random ResNet", "SqueezeNet": "random SqueezeNet"}.get(network)
    same_settings = f"{control}, {settings}"
    return ["pixel", same_settings if same_settings in ARMS else control] if control else ["pixel"]


def flags_of_arm(arm: str, arguments: argparse.Namespace, seed: int, length: int) -> list[str]:
    """Return the flags of an arm, with the words in capitals replaced by their values."""
    flags: list[str] = []
    for word in ARMS[arm]:
        if word == "MOCO":
            flags.append(str(_contrast_folder(arguments, seed)))
        elif word == "SQUEEZENET":
            flags += ["--perceptual.layers", *arguments.squeezenet_layers]
            flags += ["--perceptual.input-size", str(arguments.squeezenet_size)]
            flags += [] if "--perceptual.weights" in ARMS[arm] else ["--perceptual.weights", arguments.squeezenet]
            flags += CAFFE if arguments.caffe else []
        else:
            flags.append(str(length // 2) if word == "HALF" else word)
    return flags


# The RGB means of the release over 255; a standard deviation of 1 / 255 keeps the range of 0 to 255.
CAFFE = ["--perceptual.mean", "0.4823", "0.4588", "0.4078"]
CAFFE += ["--perceptual.std", "0.003922", "0.003922", "0.003922", "--perceptual.bgr", "true"]


def measure(run: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the figures of a codebook on held-out images."""
    from pecobook.analysis.reconstruction import decode_all

    figures, tokenizer, images, labels, codes = held_out_figures(run, arguments.data, arguments.images, seed)
    reconstructions = decode_all(tokenizer, codes)
    if arguments.judge:
        judge = Judge(arguments.judge)
        figures["judged"] = judge.accuracy(reconstructions, labels)
        figures["originals_judged"] = judge.accuracy(images, labels)
    return figures | distances(images, reconstructions, arguments, seed)


def held_out_figures(
    run: Path, data: str, limit: int, seed: int, *, probes: bool = True
) -> tuple[dict[str, Any], Any, Tensor, Tensor, Tensor]:
    """Measure a codebook on at most `limit` held-out images, and its probes on as many training images.

    Returns:
        the figures, the tokenizer, the held-out images float (N, 3, S, S) in [0, 1], their labels, and the codes.
    """
    from pecobook.analysis.reconstruction import encode_all
    from pecobook.commands.analyze.measure import PROBES, evaluate_tokenizer
    from pecobook.data.images import open_images
    from pecobook.data.stream import read_all
    from pecobook.models.tokenizer import PerceptualTokenizer
    from pecobook.utils.images import to_float

    tokenizer, splits = PerceptualTokenizer.from_pretrained(run), open_images(data)
    size = tokenizer.image_size
    test, labels, _ = read_all(splits.evaluation, size, limit=limit)
    if labels is None:
        raise SystemExit(f"--data {data} has no labels.")

    def train_codes() -> tuple[Tensor, Tensor]:
        train, train_labels, _ = read_all(splits.train, size, limit=limit)
        assert train_labels is not None
        return encode_all(tokenizer, to_float(train)), train_labels

    images = to_float(test)
    larger = to_float(read_all(splits.evaluation, size + tokenizer.stride, limit=min(limit, 500))[0])
    measured, codes = evaluate_tokenizer(
        run.name, tokenizer, images, labels if probes else None, train_codes, None, larger=larger, seed=seed
    )
    values = measured.values
    figures: dict[str, Any] = {name: values[name] for name in (*PROBES, "psnr", "ssim", "codes_used", "perplexity")}
    position = values["position"]
    figures |= {"position": 100 * position["share"], "null_position": 100 * position["null_share"]}
    figures |= {"bound": 100 * position["bound"], **position["moved"]}
    return figures, tokenizer, images, labels, codes


def validation_folder(source: str, folder: Path) -> str:
    """Write the training images of a source with labels as a folder whose validation part is a quarter of each class.

    Settings are chosen on this folder, so that the source's own held-out images play no part in the choice.
    """
    import numpy as np
    from torchvision.io import write_png

    from pecobook.data.images import open_images

    train = open_images(source).train
    if folder.exists() or train.labels is None or train.classes is None:
        return str(folder)
    generator, labels = np.random.default_rng(0), np.asarray(train.labels)
    for number, name in enumerate(train.classes):
        rows = generator.permutation(np.flatnonzero(labels == number))
        for place, row in enumerate(rows):
            part = folder.with_suffix(".tmp") / ("val" if place < round(len(rows) / 4) else "train") / name
            part.mkdir(parents=True, exist_ok=True)
            write_png(train.read(int(row)), str(part / f"{row:06d}.png"), compression_level=1)
    folder.with_suffix(".tmp").rename(folder)
    return str(folder)


@torch.inference_mode()
def distances(images: Tensor, reconstructions: Tensor, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Return the mean perceptual distances of reconstructions in the feature network and in SqueezeNet, for any arm."""
    from pecobook.models.perceptual import PerceptualDistance

    networks = {"moco": PerceptualDistance(str(_contrast_folder(arguments, seed)), (3, 4), normalisation="layernorm")}
    if arguments.squeezenet:
        caffe: dict[str, Any] = {}
        if arguments.caffe:
            caffe = {"mean": (123 / 255, 117 / 255, 104 / 255), "std": (1 / 255,) * 3, "bgr": True}
        networks["squeezenet"] = PerceptualDistance(
            "torchvision:squeezenet1_1", (1, 2, 3, 4), arguments.squeezenet, input_size=64, **caffe
        )
    pairs = list(zip(torch.split(images, 250), torch.split(reconstructions, 250), strict=True))
    return {
        f"distance_{name}": float(torch.cat([network(x, y) for x, y in pairs]).mean())
        for name, network in networks.items()
    }


def run_arm(arm: str, seed: int, length: int, arguments: argparse.Namespace) -> None:
    """Train and measure an arm unless its result exists."""
    name = arm.replace(", ", "-").replace(" ", "-")
    settings = " ".join(arguments.set)
    name += f"-{zlib.crc32(settings.encode()):08x}" if settings else ""
    out = Path(arguments.out) / f"{name}-{length}-{seed}"
    result = out.with_name(out.name + ".json")
    if result.exists():
        return
    lengths = [word for name in ("max-steps", "sample-every", "save-every") for word in (f"--{name}", str(length))]
    common = ["--data", arguments.data, "--overwrite", "--out", str(out), "--loggers", "tensorboard"]
    common += ["--seed", str(seed), *lengths]
    start = time.monotonic()
    command("codebook", "tiny", *common, *flags_of_arm(arm, arguments, seed, length), *arguments.set)
    seconds = time.monotonic() - start
    job = json.dumps(
        {"arm": arm, "set": settings, "length": length, "seed": seed, "seconds": round(seconds), "run": str(out)}
    )
    names = ("data", "out", "judge", "images", "squeezenet")
    flags = [word for name in names for word in (f"--{name}", str(getattr(arguments, name)))]
    flags += ["--caffe"] if arguments.caffe else []
    words = [sys.executable, "-m", "benchmarks.codebook_study", "--measure", job, *flags]
    subprocess.run(words, env=ONE_THREAD, check=True)
    shutil.rmtree(out / "checkpoints")


def _contrast_folder(arguments: argparse.Namespace, seed: int) -> Path:
    return Path(arguments.out) / f"contrast-{seed}"


def _train_feature_network(seed: int, arguments: argparse.Namespace) -> None:
    out = _contrast_folder(arguments, seed)
    if not (out / "export" / "config.json").exists():
        words = ["--data", arguments.data, "--seed", str(seed), "--out", str(out), *arguments.contrast_set]
        words += ["--batch-size", "256", "--max-steps", str(arguments.contrast_steps), "--overwrite"]
        command("contrast", "tiny", *words)


def write_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw means over seeds by the length of a training; each point is a training of its own that has ended."""
    from statistics import fmean

    from pecobook.analysis.charts import training_curves

    sets = {arm: len({row["set"] for row in rows if row["arm"] == arm}) for arm in ARMS}
    points: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), row["length"])):
        name = f"{row['arm']} {row['set']}" if sets[row["arm"]] > 1 else row["arm"]
        points.setdefault(name, {}).setdefault(row["length"], []).append(row)
    curves = {
        name: [
            {"step": length, **{CURVES[m]: fmean(row[m] for row in group) for m in CURVES}}
            for length, group in lengths.items()
        ]
        for name, lengths in points.items()
    }
    file.write_bytes(training_curves(curves, list(CURVES.values())))


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--judge", default="", help="a finetune run, or weights of a CIFAR ResNet")
    parser.add_argument("--squeezenet", default="", help="weights of torchvision's squeezenet1_1")
    parser.add_argument("--caffe", action="store_true", help="the SqueezeNet takes Caffe's input")
    parser.add_argument("--squeezenet-layers", nargs="+", default=["features.10", "features.12"])
    parser.add_argument("--squeezenet-size", type=int, default=64, help="side of its input images, pixels")
    parser.add_argument("--validation", action="store_true", help="hold out training images, to choose settings")
    parser.add_argument("--images", type=int, default=10_000, help="largest number of images read of each split")
    parser.add_argument("--lengths", type=int, nargs="+", default=[220], help="steps of a codebook")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--contrast-steps", type=int, default=300)
    parser.add_argument("--set", default="", type=str.split, help="further flags of every codebook, in one string")
    parser.add_argument("--contrast-set", default="", type=str.split, help="further flags of the feature network")
    parser.add_argument("--curves", type=Path, help="PNG file: figures by length, for several --lengths")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = Path(arguments.out)
    if arguments.validation:
        arguments.data = validation_folder(arguments.data, out / "images")
    if arguments.measure:
        job = json.loads(arguments.measure)
        run = Path(job.pop("run"))
        record = {**job, **measure(run, arguments, job["seed"])}
        run.with_name(run.name + ".json").write_text(json.dumps(record) + "\n")
        return
    if not arguments.table:
        out.mkdir(parents=True, exist_ok=True)
        run_parallel((partial(_train_feature_network, s, arguments) for s in arguments.seeds), arguments.processes)
        jobs = [(a, s, n) for n in arguments.lengths for s in arguments.seeds for a in arguments.arms]
        run_parallel((partial(run_arm, *job, arguments) for job in jobs), arguments.processes)
    order = list(ARMS)
    rows = [{"set": "", **record} for record in records(out)]
    print(table(rows, ["length", "arm", "set"], TITLES, lambda key: (key[0], key[2], order.index(key[1]))))
    if arguments.curves:
        write_curves(rows, arguments.curves)
    pairs = [(arm, control) for arm in ARMS for control in controls_of(arm) if arm != control]
    for length, settings in sorted({(row["length"], row["set"]) for row in rows}):
        members = [row for row in rows if (row["length"], row["set"]) == (length, settings)]
        lines = differences(members, pairs, {metric: TITLES[metric] for metric in COMPARED})
        print(f"\n{length} steps {settings}\n{lines}")


if __name__ == "__main__":
    main()
