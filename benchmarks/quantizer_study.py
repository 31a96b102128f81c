"""Quantizers compared: the same autoencoder and perceptual loss, equal steps, over several seeds.

    python -m benchmarks.quantizer_study --data CIFAR10 --squeezenet FILE --out runs/quantizers.jsonl
    python -m benchmarks.quantizer_study --data IMAGES --contrast runs/contrast --out runs/quantizers.jsonl
    python -m benchmarks.quantizer_study --usage --num-codewords 16384 65536 --arms ema "ema, no revival" ...
    python -m benchmarks.quantizer_study --table --out runs/quantizers.jsonl

Each row is `pecobook codebook tiny` with a quantizer of ARMS and the flags of --set, measured on held-out images, and
`pecobook pretrain tiny` on its codes. Rows are appended to --out as they come; a row that stands there is not repeated,
so the same command goes on after an interruption. All runs within one process use one thread, and a row states its CPU
seconds. Several processes with other --seeds or --arms may write one file.

What differs between the arms, beside the quantizer, is what their authors prescribe. K-means start and revival exist
for moving averages and the learned codebook alone, which also keep the recipe's LayerNorm of latent vectors and its
steps without quantisation; the others start at step 0 with raw latent vectors, and fsq and lfq have as many channels
as the number of codewords asks for. `ema, raw start` is ema without these two helps. Every arm has K codewords
exactly.

--layers compares sets of layers of one network (--network, --squeezenet or --contrast) instead, each set in quotes,
with --arms ema; with --validation all figures are those of training images that are held out, as for every choice.

--usage measures codewords in use as training goes and at its end, for large K, without probes and pre-training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.codebook_study import CAFFE, held_out_figures, validation_folder
from benchmarks.pretraining_study import last
from benchmarks.runs import command, differences, table

_RAW = ("--model.latent-norm", "false", "--quantizer.start-after", "0")
ARMS: dict[str, tuple[str, ...]] = {
    "ema": ("--quantizer.kind", "ema"),
    "gradient": ("--quantizer.kind", "gradient"),
    "fsq": ("--quantizer.kind", "fsq", "LEVELS", *_RAW),
    "simvq": ("--quantizer.kind", "simvq", *_RAW),
    "lfq": ("--quantizer.kind", "lfq", "BITS", *_RAW),
    "ibq": ("--quantizer.kind", "ibq", "--quantizer.commitment", "1", "--quantizer.entropy-weight", "0.05", *_RAW),
    "ema, raw start": ("--quantizer.kind", "ema", *_RAW),
    "ema, no revival": ("--quantizer.kind", "ema", "--quantizer.revive-after", "0"),
    "gradient, no revival": ("--quantizer.kind", "gradient", "--quantizer.revive-after", "0"),
    "ema, normalised": ("--quantizer.kind", "ema", "--quantizer.normalise", "true", "--model.latent-dim", "8"),
    "ema, normalised, no revival": (
        *("--quantizer.kind", "ema", "--quantizer.normalise", "true", "--model.latent-dim", "8"),
        *("--quantizer.revive-after", "0"),
    ),
}
KINDS = ("ema", "gradient", "fsq", "simvq", "lfq", "ibq")
TITLES = {
    "usage": "codewords used, %",
    "perplexity": "perplexity",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "perceptual": "perceptual distance",
    "rfid": "rFID",
    "codeword_probe": "codeword probe, %",
    "crossed_probe": "codeword probe with position removed, %",
    "position": "position in codes, %",
    "null_position": "position in permuted codes, %",
    "masked_accuracy": "masked prediction, %",
    "masked_bits": "masked prediction, bits of a code",
    "cpu_seconds": "CPU seconds",
}
COMPARED = ("usage", "perplexity", "psnr", "perceptual", "rfid", "codeword_probe", "crossed_probe", "masked_bits")
"""Metrics whose differences from ema are printed, each with one correction over the arms."""


def fsq_levels(num_codewords: int) -> list[int]:
    """Return numbers of levels, 8 or 4, whose product is a power of 2 from 64."""
    bits = num_codewords.bit_length() - 1
    if num_codewords != 2**bits or bits < 6:
        raise SystemExit(f"--num-codewords {num_codewords}: fsq and lfq need a power of 2 from 64.")
    fours = -bits % 3  # 3 bits a channel, and 2 in at most two channels
    return [8] * ((bits - 2 * fours) // 3) + [4] * fours


def flags_of_arm(arm: str, num_codewords: int) -> list[str]:
    """Return the flags of an arm, with the words in capitals replaced by their values."""
    flags = ["--quantizer.num-codewords", str(num_codewords)]
    for word in ARMS[arm]:
        if word == "LEVELS":
            levels = fsq_levels(num_codewords)
            flags += ["--quantizer.levels", *map(str, levels), "--model.latent-dim", str(len(levels))]
        elif word == "BITS":
            flags += ["--model.latent-dim", str(num_codewords.bit_length() - 1)]
        else:
            flags.append(word)
    return flags


def perceptual_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of the perceptual network: a network of timm's, a contrast run's, SqueezeNet's, or none."""
    if arguments.network or arguments.contrast:
        flags = ["--perceptual.network", arguments.network or arguments.contrast]
        return flags + (["--perceptual.weights", arguments.weights] if arguments.weights else [])
    if not arguments.squeezenet:
        return ["--perceptual.network", "none"]
    flags = ["--perceptual.network", "torchvision:squeezenet1_1", "--perceptual.weights", arguments.squeezenet]
    flags += ["--perceptual.layers", *arguments.squeezenet_layers]
    flags += ["--perceptual.input-size", str(arguments.squeezenet_size)] if arguments.squeezenet_size else []
    return flags + ([] if arguments.rgb else CAFFE)


def run_row(arm: str, num_codewords: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one arm, and return its row."""
    settings = f"{zlib.crc32(protocol(arguments).encode()):08x}"
    name = "-".join([*arm.replace(",", "").split(), str(num_codewords), str(seed), settings])
    run, began = Path(arguments.runs) / name, _cpu_seconds()
    steps = str(arguments.steps)
    words = ["--data", arguments.data, "--seed", str(seed), "--out", str(run), "--overwrite", "--devices", "1"]
    words += ["--workers", "0", "--max-steps", steps, "--save-every", "1000000", "--save-minutes", "100000"]
    words += ["--sample-every", str(arguments.curve or steps), *perceptual_flags(arguments), *arguments.set]
    kind, _, layers = arm.partition(", layers ")
    words += ["--perceptual.layers", *layers.split()] if layers else []
    command("codebook", "tiny", *words, *flags_of_arm(kind, num_codewords))
    row: dict[str, Any] = {"arm": arm, "num_codewords": num_codewords, "seed": seed, "protocol": protocol(arguments)}
    row["codebook_cpu_seconds"] = round(_cpu_seconds() - began)
    figures, _, _, _, codes = held_out_figures(run, arguments.data, arguments.images, seed, probes=not arguments.usage)
    row |= {key: value for key, value in figures.items() if value is not None}
    row |= {"usage": 100 * figures["codes_used"] / num_codewords, "held_out_tokens": codes.numel()}
    row["perceptual"] = last(run, "evaluation/perceptual")
    if arguments.usage:
        row["curve"] = usage_curve(run)
    else:
        row |= rfid(run, arguments) | masked_prediction(run, row["perplexity"], seed, arguments)
    row["cpu_seconds"] = round(_cpu_seconds() - began)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return row


def usage_curve(run: Path) -> list[list[float]]:
    """Return step, codewords that held-out images use, codewords alive in training, and revivals so far."""
    names = ("step", "evaluation/codes_used", "codes_alive", "revived")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines if all(name in line for name in names)]


def rfid(run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rFID of a codebook on held-out images, where there are weights of Inception."""
    if not arguments.inception:
        return {}
    out, statistics = run.with_name(run.name + "-rfid"), Path(arguments.runs) / "statistics.npz"
    words = ["--metrics", "rfid", "--inception-weights", arguments.inception, "--statistics", str(statistics)]
    command("evaluate", str(run), "--data", arguments.data, "--out", str(out), "--overwrite", *words)
    return {"rfid": json.loads((out / "evaluation.json").read_text())["tokenizers"][0]["rfid"]}


def masked_prediction(run: Path, perplexity: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pre-train a short ViT on the codes of a codebook, and return how well it predicts held-out masked codes.

    `masked_bits` is the entropy of a code less the bits that the ViT is off by: what it knows of a hidden code. Unlike
    the accuracy, it does not favour a tokenizer that uses few codewords.
    """
    out = run.with_name(run.name + "-vit")
    words = ["--data", arguments.data, "--seed", str(seed), "--out", str(out), "--overwrite", "--devices", "1"]
    words += ["--workers", "0", "--max-steps", str(arguments.pretrain_steps), "--save-every", "1000000"]
    words += ["--sample-every", str(arguments.pretrain_steps), "--save-minutes", "100000"]
    command("pretrain", "tiny", "--tokenizer", str(run), *words, *arguments.pretrain_set)
    loss, accuracy = last(out, "evaluation/loss"), last(out, "evaluation/accuracy")
    assert loss is not None
    shutil.rmtree(out)
    bits = math.log2(max(perplexity, 1.0)) - loss / math.log(2)
    return {"masked_loss": loss, "masked_accuracy": accuracy, "masked_bits": bits}


def protocol(arguments: argparse.Namespace) -> str:
    """Return all that rows must share to be compared."""
    words = [f"{Path(arguments.data).name}, {arguments.steps} steps", *perceptual_flags(arguments), *arguments.set]
    words += [f"usage every {arguments.curve}"] if arguments.usage else [f"ViT {arguments.pretrain_steps} steps"]
    return " ".join(Path(word).name if "/" in word else word for word in [*words, *arguments.pretrain_set])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the finished rows; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{file}: a line that was cut short is left out.")
    return rows


def _append(file: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, on a line of its own also after a line that was cut short."""
    cut = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    with file.open("ab") as stream:
        stream.write(b"\n" * bool(cut) + json.dumps(row).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _place(arm: str) -> tuple[int, str]:
    """Return the place of an arm in tables; a set of layers stands behind the name of its quantizer."""
    return list(ARMS).index(arm.partition(", layers ")[0]), arm


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print, for each protocol, the table over seeds and the differences from ema."""
    for words in sorted({row["protocol"] for row in rows}):
        members = [row for row in rows if row["protocol"] == words]
        arms = sorted({row["arm"] for row in members}, key=_place)
        titles = {key: title for key, title in TITLES.items() if any(row.get(key) is not None for row in members)}
        shown = table(members, ["num_codewords", "arm"], titles, lambda key: (key[0], *_place(key[1])))
        print(f"\n{words}\n\n{shown}")
        if "rfid" not in titles and any("masked_bits" in row for row in members):
            print("\nrFID was not measured: it needs --inception FILE.")
        for K in sorted({row["num_codewords"] for row in members}):
            same = [row for row in members if row["num_codewords"] == K]
            first = "ema" if "ema" in arms else arms[0]
            # Distances of several sets of layers are not in one unit.
            one_distance = not any(", layers " in arm for arm in arms)
            compared = {m: TITLES[m] for m in COMPARED if one_distance or m != "perceptual"}
            lines = differences(same, [(arm, first) for arm in arms if arm != first], compared)
            lines += differences(
                same,
                [(f"{arm}, no revival", arm) for arm in ("gradient", "ema, normalised")],
                {"usage": TITLES["usage"]},
            )
            print(f"\nK {K}, differences over seeds:\n{lines}" if lines else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--out", default="runs/quantizers.jsonl", help="file of rows")
    parser.add_argument("--runs", default="", help="folder of run folders; default: --out without its ending")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(KINDS), choices=list(ARMS))
    parser.add_argument("--num-codewords", type=int, nargs="+", default=[512])
    parser.add_argument("--steps", type=int, default=600, help="steps of a codebook")
    parser.add_argument("--set", default="", type=str.split, help="further flags of every codebook, in one string")
    parser.add_argument("--squeezenet", default="", help="weights of torchvision's squeezenet1_1")
    parser.add_argument(
        "--squeezenet-layers", nargs="+", default=["features.4", "features.7", "features.10", "features.12"]
    )
    parser.add_argument("--squeezenet-size", type=int, default=64, help="side of its input images; 0: that of images")
    parser.add_argument("--rgb", action="store_true", help="the weights take torchvision's input, not Caffe's")
    parser.add_argument("--contrast", default="", help="a contrast run as perceptual network, instead of SqueezeNet")
    parser.add_argument("--network", default="", help="timm:NAME as perceptual network, instead of SqueezeNet")
    parser.add_argument("--weights", default="", help="a file of its weights")
    parser.add_argument("--layers", nargs="+", default=[], help='sets of layers to compare, each as "3 6 9 12"')
    parser.add_argument("--validation", action="store_true", help="hold out training images, to choose settings")
    parser.add_argument("--inception", default="", help="weights of Inception for rFID")
    parser.add_argument("--images", type=int, default=3000, help="largest number of images measured of each split")
    parser.add_argument("--pretrain-steps", type=int, default=200)
    parser.add_argument("--pretrain-set", default="", type=str.split, help="further flags of pretrain, in one string")
    parser.add_argument("--usage", action="store_true", help="measure usage alone, as training goes")
    parser.add_argument("--curve", type=int, default=0, help="steps between measurements of usage in training")
    parser.add_argument("--table", action="store_true", help="print the tables of the finished rows, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    arguments.runs = arguments.runs or str(out.with_suffix(""))
    if arguments.validation and not arguments.table:
        arguments.data = validation_folder(arguments.data, Path(arguments.runs) / "images")
    arms = [f"{arm}, layers {layers}" for arm in arguments.arms for layers in arguments.layers] or arguments.arms
    jobs = [(a, K, s) for K in arguments.num_codewords for s in arguments.seeds for a in arms]
    for arm, num_codewords, seed in [] if arguments.table else jobs:
        done = [(row["arm"], row["num_codewords"], row["seed"], row["protocol"]) for row in read_rows(out)]
        if (arm, num_codewords, seed, protocol(arguments)) not in done:
            Path(arguments.runs).mkdir(parents=True, exist_ok=True)
            row = run_row(arm, num_codewords, seed, arguments)
            _append(out, row)
            shown = ("codes_used", "perplexity", "psnr", "codeword_probe", "masked_accuracy", "cpu_seconds")
            print(f"{arm}, K {num_codewords}, seed {seed}: " + ", ".join(f"{k} {row[k]}" for k in shown if k in row))
    print_tables(read_rows(out))


if __name__ == "__main__":
    main()
