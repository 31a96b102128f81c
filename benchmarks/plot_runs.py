"""Training curves of several runs in one picture.

python -m benchmarks.plot_runs runs/a runs/b --metrics psnr --out curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pecobook.analysis.charts import read_metrics, training_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; NAME=FOLDER names the curve of a run")
    parser.add_argument("--metrics", nargs="+", default=None, help="names in metrics.jsonl; default: all that change")
    parser.add_argument("--out", default="curves.png")
    arguments = parser.parse_args()
    named = [word.rpartition("=")[::2] for word in arguments.runs]
    runs = {name or Path(folder).name: read_metrics(Path(folder) / "metrics.jsonl") for name, folder in named}
    Path(arguments.out).write_bytes(training_curves(runs, metrics=arguments.metrics))


if __name__ == "__main__":
    main()
