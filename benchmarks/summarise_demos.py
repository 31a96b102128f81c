"""Means and standard deviations of several demos: `python benchmarks/summarise_demos.py runs/a runs/b --plot out.png`.

The script reads the `results.json` of each folder, groups the results by data, and prints a Markdown table: the mean
over seeds, and after ± the standard deviation over seeds. Differences are paired by seed, with a 95% t interval and
Holm's correction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pecobook.analysis.comparison import lookup
from pecobook.analysis.evidence import Difference, family, mean_and_deviation
from pecobook.analysis.probe import binomial_error


def _percent(arm: dict[str, Any], key: str) -> float | None:
    """Return a share of the position as a percentage; None for a demo of an earlier version."""
    share = lookup(arm, "position", key)
    return None if share is None else 100 * float(share)


ROWS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "codewords used": lambda arm: arm["codes_used"],
    "perplexity": lambda arm: arm["perplexity"],
    "PSNR, dB": lambda arm: arm["psnr"],
    "perceptual distance": lambda arm: arm["perceptual_distance"],
    "position in codes, %": lambda arm: _percent(arm, "share"),
    "position in permuted codes, %": lambda arm: _percent(arm, "null_share"),
    "codes that move with a crop, %": lambda arm: lookup(arm, "position", "moved", "crop"),
    "codeword probe, %": lambda arm: arm["codeword_probe"],
    "**codeword probe with position removed, %**": lambda arm: arm.get("crossed_probe"),
    "ViT: masked code accuracy, %": lambda arm: arm["mim"] and arm["mim"]["accuracy"],
    "ViT: linear probe, %": lambda arm: arm["mim"] and arm["mim"]["linear"],
    "ViT: k-NN, %": lambda arm: arm["mim"] and arm["mim"]["knn"],
}
ARMS = ("pixel", "control", "perceptual")
PAIRS = [
    ("crossed_probe", "perceptual", "control"),
    ("crossed_probe", "perceptual", "pixel"),
    ("crossed_probe", "control", "pixel"),
    ("codeword_probe", "perceptual", "control"),
    ("codeword_probe", "perceptual", "pixel"),
    ("codeword_probe", "control", "pixel"),
    ("mim.linear", "perceptual", "pixel"),
    ("mim.linear", "perceptual", "floor"),
    ("mim.linear", "pixel", "floor"),
    ("mim.knn", "perceptual", "pixel"),
]


def difference(result: dict[str, Any], metric: str, a: str, b: str) -> float | None:
    """Return a - b of one demo in percent points, or None when the demo did not measure the difference."""
    for pair in result["comparisons"]:
        if pair["metric"] == metric and {pair["a"], pair["b"]} == {a, b}:
            return float(pair["difference"]) if pair["a"] == a else -float(pair["difference"])
    return None


def table(results: list[dict[str, Any]]) -> str:
    """Return Markdown of all demos on one data set."""
    first = results[0]
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [
        f"Seeds {seeds}; {first['num_train']:,} training and {first['num_test']:,} held-out images for the probes, "
        f"{first['num_classes']} classes, always naming the most frequent class scores {first['chance']:.1f}%.\n",
        "| | " + " | ".join(ARMS) + " | random ViT |",
        "|---|" + "---|" * (len(ARMS) + 1),
    ]
    for name, read in ROWS.items():
        by_arm = {arm: [read(c) for r in results for c in r["codebooks"] if c["name"] == arm] for arm in ARMS}
        probe = {"ViT: linear probe, %": "linear", "ViT: k-NN, %": "knn"}.get(name)
        random_vit = _mean([result["floor"][probe] for result in results]) if probe else ""
        lines.append(f"| {name} | " + " | ".join(_mean(by_arm[arm]) for arm in ARMS) + f" | {random_vit} |")
    members = []
    for metric, a, b in PAIRS:
        values = [difference(result, metric, a, b) for result in results]
        measured = tuple(value for value in values if value is not None)
        members += [Difference(f"{metric}: {a} minus {b}", measured)] if measured else []
    lines += ["", *(f"- {member.sentence()}" for member in family(members))]
    return "\n".join(lines)


def _mean(values: list[float | None]) -> str:
    return mean_and_deviation([value for value in values if value is not None])


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the codeword probe of every arm and seed; each data set has a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(groups), 3.0), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (data, results) in zip(panels, groups.items(), strict=True):
        for result in results:
            scores = {c["name"]: c["codeword_probe"] for c in result["codebooks"]}
            accuracies = [scores[arm] for arm in ARMS]
            errors = [binomial_error(accuracy, result["num_test"]) for accuracy in accuracies]
            label = f"seed {result['seed']}"
            axes.errorbar(range(len(ARMS)), accuracies, errors, marker="o", capsize=3, label=label)
        axes.set_xticks(range(len(ARMS)), ARMS)
        axes.set_title(data)
        axes.set_ylabel("codeword probe, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that 'pecobook demo' wrote")
    parser.add_argument("--plot", type=Path, help="PNG of the codeword probes")
    args = parser.parse_args()
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in args.folders:
        result = json.loads((folder / "results.json").read_text())
        groups.setdefault(Path(result["data"]).name, []).append(result)
    for data, results in groups.items():
        print(f"### {data}\n\n{table(sorted(results, key=lambda r: r['seed']))}\n")
    if args.plot:
        plot(groups, args.plot)


if __name__ == "__main__":
    main()
