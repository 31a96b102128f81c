"""BEiT's relative positions on grids other than the pre-training grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RelativePositions:
    """Adapts BEiT's tables of relative positions to the grid of the current images.

    Args:
        network: timm's BEiT.
        windowed: for each block, whether it uses attention windows.
        window: side of the windows, in patches; 0 without windows.
        native_grid: rows and columns of patches that the network was built for.
        side: rows and columns of patches of typical images.
    """

    def __init__(
        self, network: Any, *, windowed: list[bool], window: int, native_grid: tuple[int, int], side: int
    ) -> None:
        self.window = window
        self.shared = network.rel_pos_bias
        tables = [(self.shared, False)] if self.shared is not None else []
        pairs = zip(network.blocks, windowed, strict=True)
        tables += [(block.attn, in_windows) for block, in_windows in pairs if block.attn.window_size]
        for table, in_windows in tables:
            # A window of the same size as the grid of pre-training uses the table unchanged.
            target = window if in_windows else side
            if target > max(native_grid):
                table.set_window_size((target, target))
        self.tables = [(table, in_windows, tuple(table.window_size)) for table, in_windows in tables]
        self.indices: dict[Any, Tensor] = {}
        self.current: tuple[int, int] | None = None  # grid for which the tables are set

    def prepare(self, grid: tuple[int, int]) -> dict[bool, Tensor | None]:
        """Set every table to the offsets of `grid`; return the shared bias (or None) by whether a block has windows."""
        window = (self.window,) * 2
        for table, in_windows, size in self.tables if grid != self.current else ():
            table_grid = window if in_windows else grid
            device = table.relative_position_bias_table.device
            table.relative_position_index = self._index(table_grid, size, device)
            table.window_size, table.window_area = table_grid, table_grid[0] * table_grid[1]
        self.current = grid
        if self.shared is None:
            return {False: None, True: None}
        global_bias = self.shared().unsqueeze(0)  # (1, heads, 1 + N, 1 + N)
        if not self.window:
            return {False: global_bias, True: None}
        size = next(size for table, _, size in self.tables if table is self.shared)
        index = self._index(window, size, global_bias.device)
        window_bias = self.shared.relative_position_bias_table[index].permute(2, 0, 1).unsqueeze(0)
        return {False: global_bias, True: window_bias}

    def _index(self, grid: tuple[int, int], table: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the cached `relative_position_index`."""
        key = (grid, table, device)
        if key not in self.indices:
            if len(self.indices) > 8:  # images of many shapes: the oldest index is the least likely to be needed again
                self.indices.pop(next(iter(self.indices)))
            with torch.inference_mode(False):  # cached tensors must be usable in training too
                self.indices[key] = relative_position_index(grid, table, device)
        return self.indices[key]


def relative_position_index(
    grid: tuple[int, int], table: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Return the index of each token pair's bias in the table of a grid of size `table`: int64 (1 + h w, 1 + h w).

    Token 0 is the class token; its three entries (to it, from it, to itself) are at the end of the table. Offsets
    outside the table use the entry of the farthest offset.
    """
    (h, w), (rows, columns) = grid, table
    coordinates = torch.stack(
        torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    ).flatten(1)  # (2, N)
    offsets = coordinates[:, :, None] - coordinates[:, None, :]  # (2, N, N)
    dy = offsets[0].clamp(1 - rows, rows - 1) + rows - 1
    dx = offsets[1].clamp(1 - columns, columns - 1) + columns - 1
    count = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.int64, device=device)
    index[1:, 1:] = dy * (2 * columns - 1) + dx
    index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return index
