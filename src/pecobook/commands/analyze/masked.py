"""What pre-trained ViTs predict behind a mask (paper, Figures 4 and 5), in pictures and by share of masked patches."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from pecobook.analysis import figures as draw
from pecobook.analysis.masked_prediction import decode_prediction, hide, predict_masked
from pecobook.commands.analyze.names import unique_names
from pecobook.commands.analyze.pictures import at_side, spread
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.masking import blockwise_mask
from pecobook.data.stream import read_all
from pecobook.utils.devices import device
from pecobook.utils.images import to_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pecobook.commands.masked_run import MaskedRun
    from pecobook.data.source import ImageSource

SHARES = (45 / 196, 75 / 196, 120 / 196)
"""Masked patches in the paper's Figure 5, of a 14 x 14 grid."""
_MEASURED = 256  # images


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was found."""

    figures: list[dict[str, Any]]
    columns: dict[tuple[float, tuple[int, int]], list[tuple[str, Tensor]]]
    """(share, grid) to original, masked and each run's prediction, with their titles."""

    def draw(self) -> dict[str, bytes]:
        """A picture for each share of masked patches, and each grid where they differ."""
        grids = {grid for _, grid in self.columns}
        return {
            f"masked-{round(100 * share)}" + (f"-{grid[0]}x{grid[1]}" if len(grids) > 1 else "") + ".png": (
                draw.image_columns(own)
            )
            for (share, grid), own in self.columns.items()
        }


def open_runs(sources: Sequence[str]) -> dict[str, MaskedRun]:
    """Name to run. Raises WeightsError for one that is no finished run of `pretrain` on codes."""
    return {name: load_masked_run(run) for name, run in zip(unique_names(sources), sources, strict=True)}


def predict(runs: dict[str, MaskedRun], source: ImageSource, seed: int) -> Predictions:
    """Predict behind masks with every run; runs on grids of one size see the same masks, and share a picture."""
    figures: list[dict[str, Any]] = []
    columns: dict[tuple[float, tuple[int, int]], list[tuple[str, Tensor]]] = {}
    for name, run in runs.items():
        run = run.to(device())
        images = to_float(read_all(source, run.image_size, limit=_MEASURED)[0])
        rows = spread(len(images))
        record: dict[str, Any] = {"name": name, "by_share": []}
        for share in SHARES:
            mask = _masks(run.grid, share, len(images), run.config.mask.min_block, seed)
            accuracy, perplexity = run.score(images, mask)
            count = int(mask[0].sum())
            record["by_share"].append(
                {"masked": count, "share": round(share, 3), "accuracy": accuracy, "perplexity": perplexity}
            )
            seen = [("original", images[rows]), ("masked", hide(images[rows], mask[rows]))]
            shown = columns.setdefault((share, run.grid), seen)
            decoded = decode_prediction(run, predict_masked(run, run, images[rows], mask[rows]))
            shown.append((name, at_side(decoded, shown[0][1].shape[-1])))
        figures.append(record)
        run.cpu()
    return Predictions(figures, columns)


def _masks(grid: tuple[int, int], share: float, count: int, min_block: int, seed: int) -> Tensor:
    """The same masks for every run of this grid: bool (N, h, w)."""
    hidden = min(max(round(share * grid[0] * grid[1]), 1), grid[0] * grid[1] - 1)
    generator = torch.Generator().manual_seed(seed)
    block = min(min_block, hidden)
    return torch.stack(
        [blockwise_mask(grid, num_masked=hidden, min_block=block, generator=generator) for _ in range(count)]
    )
