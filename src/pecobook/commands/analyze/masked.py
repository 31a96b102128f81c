"""Masked prediction of pre-trained ViTs (paper, Figures 4 and 5): pictures, and accuracy by share of masked patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pecobook.analysis import figures as draw
from pecobook.analysis.position import position_baseline
from pecobook.analysis.reconstruction import decode_all, encode_all, hide, predict_masked
from pecobook.analysis.wording import unique_names
from pecobook.commands.analyze.pictures import evenly_spaced, resize_nearest
from pecobook.commands.masked_run import MaskedRun, load_masked_run
from pecobook.data.masking import blockwise_mask
from pecobook.data.source import ImageSource
from pecobook.data.stream import read_all
from pecobook.utils.devices import device
from pecobook.utils.images import to_float

SHARES = (45 / 196, 75 / 196, 120 / 196)
"""Shares of masked patches in the paper's Figure 5, whose grid is 14 x 14."""
_MAX_IMAGES = 256
_Columns = dict[tuple[float, tuple[int, int]], list[tuple[str, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The masked predictions of all runs."""

    records: list[dict[str, Any]]
    """The metrics of each run, as in `analysis.json`."""
    columns: _Columns
    """Titles and images of the original, the masked image and each run's prediction, by (share, grid)."""

    def draw(self) -> dict[str, bytes]:
        """Draw a picture for each share of masked patches, and for each grid if the runs have different grids."""
        pictures = {}
        for (share, grid), columns in self.columns.items():
            suffix = f"-{grid[0]}x{grid[1]}" if len({grid for _, grid in self.columns}) > 1 else ""
            pictures[f"masked-{round(100 * share)}{suffix}.png"] = draw.image_columns(columns)
        return pictures


def open_runs(sources: Sequence[str]) -> dict[str, MaskedRun]:
    """Load the runs, by name. Raises WeightsError if one is not a finished run of `pretrain` on codes."""
    return {name: load_masked_run(run) for name, run in zip(unique_names(sources), sources, strict=True)}


def predict(runs: dict[str, MaskedRun], source: ImageSource, seed: int) -> Predictions:
    """Predict masked patches with every run; runs with equal grids get the same masks and share a picture."""
    records: list[dict[str, Any]] = []
    columns: _Columns = {}
    for name, run in runs.items():
        run = run.to(device())
        images = to_float(read_all(source, run.image_size, limit=_MAX_IMAGES)[0])
        codes, rows = encode_all(run, images), evenly_spaced(len(images))
        record: dict[str, Any] = {"name": name, "by_share": []}
        for share in SHARES:
            mask = _masks(run.grid, share, len(images), run.config.mask.min_block, seed)
            accuracy, perplexity = run.score(images, codes, mask)
            count = int(mask[0].sum())
            part = {"masked": count, "share": round(share, 3), "accuracy": accuracy, "perplexity": perplexity}
            record["by_share"].append({**part, "position_baseline": position_baseline(codes, mask)})
            if getattr(run.tokenizer, "predicts", ""):
                continue  # its tokenizer predicts features, so there is nothing to draw
            inputs = [("original", images[rows]), ("masked", hide(images[rows], mask[rows]))]
            picture = columns.setdefault((share, run.grid), inputs)
            predicted_codes, _ = predict_masked(run, run, images[rows], mask[rows])
            picture.append((name, resize_nearest(decode_all(run, predicted_codes), picture[0][1].shape[-1])))
        records.append(record)
        run.cpu()
    return Predictions(records, columns)


def _masks(grid: tuple[int, int], share: float, count: int, min_block: int, seed: int) -> Tensor:
    """Draw the masks, bool (N, h, w), which are the same for every run with this grid."""
    num_masked = min(max(round(share * grid[0] * grid[1]), 1), grid[0] * grid[1] - 1)
    generator = torch.Generator().manual_seed(seed)
    block = min(min_block, num_masked)
    return torch.stack(
        [blockwise_mask(grid, num_masked=num_masked, min_block=block, generator=generator) for _ in range(count)]
    )
