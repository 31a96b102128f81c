"""Feature pyramids: four maps of a backbone at four strides, of any image, for segmentation and detection.

A ViT has one resolution, so its blocks at a third, half, two thirds and the end of its depth (4, 6, 8, 12 of 12) are
scaled up fourfold, up twofold, left, and down twofold (PeCo, supplement; BEiT's arrangement). A convolutional network
gives its own last four stages.

Positions at other sizes than the backbone's own: absolute ones are interpolated (bicubic) to each image. Tables of
relative positions are resized once, by BEiT's geometric scheme, to the grid of `image_size`, and every smaller or
narrower image reads the part of them that it needs; farther offsets than the table has take its farthest. A backbone
that sees its own size is left as it is.

With `window`, most blocks attend within windows of patches and the last of each quarter over all (ViTDet, arXiv
2203.16527), so that the cost grows with the image and not with its square. Class tokens go into every window and come
out as their mean. A window as large as the grid of pre-training keeps BEiT's tables as they are.

B batch, h w rows and columns of patches, N = h w, P prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, first_line
from pecobook.models.weights import Backbone, any_size_args, create, load_backbone
from pecobook.settings.dense import PyramidConfig


class FeaturePyramid(nn.Module):
    """A backbone and what scales its maps.

    Args:
        backbone: a timm network without head, loaded with `any_size` (see `load_pyramid`).
        image_size: side of the images that it will see, pixels; larger and other shapes work too.
        config: windows, memory, frozen or not.

    Raises:
        WeightsError: the backbone has no maps at four strides, or its blocks cannot attend in windows.
    """

    def __init__(self, backbone: nn.Module, image_size: int, config: PyramidConfig = PyramidConfig()) -> None:
        super().__init__()
        self.config = config
        transformer = hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks")
        self.body: _Transformer | _Stages = (
            _Transformer(backbone, image_size, config) if transformer else _Stages(backbone, config)
        )
        self.channels: tuple[int, ...] = self.body.channels
        self.strides: tuple[int, ...] = self.body.strides
        self.scale = nn.ModuleList(_scales(self.channels[0])) if transformer else nn.ModuleList([nn.Identity()] * 4)
        self.network = backbone
        backbone.requires_grad_(not config.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, C_l, H / s_l, W / s_l), fine to coarse.

        Sides that are no multiple of the patch are padded with zeros at the right and the bottom.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            maps = self.body(images)
        return [scale(features) for scale, features in zip(self.scale, maps, strict=True)]

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Interpolate absolute positions once, for squares of this size, in place of at every image."""
        from timm.layers import resample_abs_pos_embed

        body, own = self.body, self.network
        if isinstance(body, _Stages) or getattr(own, "pos_embed", None) is None:
            return
        side = -(-image_size // body.patch)
        table: Any = own.pos_embed
        prefix = 0 if getattr(own, "no_embed_class", False) else body.num_prefix
        resized = resample_abs_pos_embed(
            table, new_size=[side, side], old_size=list(body.own_grid), num_prefix_tokens=prefix
        )
        own.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
        own.patch_embed.set_input_size(img_size=side * body.patch)  # type: ignore[operator, union-attr]
        body.own_grid = (side, side)

    def train(self, mode: bool = True) -> FeaturePyramid:
        """A frozen backbone stays in evaluation mode, so that its statistics do not move."""
        super().train(mode)
        if self.config.frozen:
            self.network.eval()
        return self


def _scales(width: int) -> list[nn.Module]:
    """Up fourfold, up twofold, as it is, down twofold."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    up = nn.Sequential(double(), nn.BatchNorm2d(width), nn.GELU(), double())
    return [up, double(), nn.Identity(), nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)]


class _Stages(nn.Module):
    """The last four stages of a convolutional network."""

    def __init__(self, network: nn.Module, config: PyramidConfig) -> None:
        super().__init__()
        info = getattr(network, "feature_info", None)
        levels = [] if info is None else (info.info if hasattr(info, "info") else list(info))
        if len(levels) < 4 or not hasattr(network, "forward_intermediates"):
            raise WeightsError(f"{type(network).__name__} has no maps at four strides: choose a ViT, BEiT or ResNet.")
        if config.window:
            raise WeightsError(f"{type(network).__name__} has no attention: leave --pyramid.window out.")
        self.indices = list(range(len(levels) - 4, len(levels)))
        if hasattr(network, "prune_intermediate_layers"):  # what no map needs would wait for a gradient
            network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        self.channels = tuple(int(level["num_chs"]) for level in levels[-4:])
        self.strides = tuple(int(level["reduction"]) for level in levels[-4:])
        if config.checkpointing:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        object.__setattr__(self, "network", network)  # the pyramid's own; here it has no name

    network: Any

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(  # type: ignore[no-any-return]
            images, indices=self.indices, intermediates_only=True
        )


class _Transformer(nn.Module):
    """Four blocks of a ViT, as maps (B, D, h, w), of images of any size."""

    def __init__(self, network: nn.Module, image_size: int, config: PyramidConfig) -> None:
        super().__init__()
        object.__setattr__(self, "network", network)  # the pyramid's own; here it has no name
        own: Any = network
        depth, patch = len(own.blocks), int(own.patch_embed.patch_size[0])
        if depth < 2 or patch % 4:
            raise WeightsError(
                f"A ViT of {depth} blocks and patches of {patch} pixels makes no pyramid: it takes 2 blocks or more, "
                "and patches that are a multiple of 4."
            )
        self.levels = [max(round(depth * share), 1) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.indices = sorted(set(self.levels))  # a shallow one gives a block to two levels
        self.patch, self.window = patch, config.window
        self.strides = (patch // 4, patch // 2, patch, patch * 2)
        self.channels = (int(own.embed_dim),) * 4
        self.num_prefix = int(own.num_prefix_tokens)
        whole = {(depth * quarter) // 4 - 1 for quarter in (1, 2, 3, 4)} if config.window else set(range(depth))
        self.windowed = [number not in whole for number in range(depth)]
        self.own_grid: tuple[int, int] = (int(own.patch_embed.grid_size[0]), int(own.patch_embed.grid_size[1]))
        own.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        own.set_grad_checkpointing(config.checkpointing)
        self.grid: tuple[int, int] = self.own_grid  # of the images in work, for the windows
        for block, windowed in zip(own.blocks, self.windowed, strict=True):
            if windowed:
                block.attn.register_forward_pre_hook(self._enter)
                block.attn.register_forward_hook(self._leave)
        self.relative = _RelativePositions(own, self, image_size // patch) if _is_beit(network) else None
        if config.window and getattr(own, "rope", None) is not None:
            raise WeightsError("A ViT of rotary positions cannot attend in windows: leave --pyramid.window out.")

    network: Any

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to four maps (B, D, h, w)."""
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        h, w = self.grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        if self.relative is None:
            found = self.network.forward_intermediates(
                images, indices=self.indices, intermediates_only=True, output_fmt="NCHW"
            )
        else:
            tokens = self._beit(images)
            found = [x[:, self.num_prefix :].transpose(1, 2).reshape(x.shape[0], -1, h, w) for x in tokens]
        return [found[self.indices.index(level)] for level in self.levels]

    def _beit(self, images: Tensor) -> list[Tensor]:
        """BEiT as timm has it, on images of any size: its blocks' tokens (B, P + N, D)."""
        from timm.layers import resample_abs_pos_embed
        from torch.utils.checkpoint import checkpoint

        own, relative = self.network, self.relative
        assert relative is not None
        x = own.patch_embed.norm(own.patch_embed.proj(images).flatten(2).transpose(1, 2))  # (B, N, D)
        x = torch.cat([own.cls_token.expand(x.shape[0], -1, -1), x], 1)
        if own.pos_embed is not None:
            x = x + resample_abs_pos_embed(
                own.pos_embed, new_size=list(self.grid), old_size=list(self.own_grid), num_prefix_tokens=1
            )
        x = own.pos_drop(x)
        shared = relative.prepare(self.grid)
        found = []
        for number, block in enumerate(own.blocks):
            bias = shared[self.windowed[number]]
            if own.grad_checkpointing and self.training:
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            if number in self.indices:
                found.append(x)
        return found

    def _enter(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (to_windows(arguments[0], self.grid, self.window, self.num_prefix), *arguments[1:])

    def _leave(self, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return from_windows(output, self.grid, self.window, self.num_prefix)


def to_windows(x: Tensor, grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    """Tokens (B, P + h w, D) to windows (B R C, P + window^2, D), R rows and C columns of them.

    The grid is padded with zeros to whole windows.
    """
    B, _, D = x.shape
    (h, w), prefix = grid, x[:, :num_prefix]
    patches = F.pad(x[:, num_prefix:].view(B, h, w, D), (0, 0, 0, -w % window, 0, -h % window))
    R, C = patches.shape[1] // window, patches.shape[2] // window
    patches = patches.view(B, R, window, C, window, D).transpose(2, 3).reshape(B * R * C, window * window, D)
    return torch.cat([prefix.repeat_interleave(R * C, 0), patches], 1)


def from_windows(x: Tensor, grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    """The way back; the prefix is the mean over windows."""
    (h, w), D = grid, x.shape[2]
    R, C = -(-h // window), -(-w // window)
    B = x.shape[0] // (R * C)
    prefix = x[:, :num_prefix].reshape(B, R * C, num_prefix, D).mean(1)
    patches = x[:, num_prefix:].reshape(B, R, C, window, window, D).transpose(2, 3)
    patches = patches.reshape(B, R * window, C * window, D)[:, :h, :w]
    return torch.cat([prefix, patches.reshape(B, h * w, D)], 1)


# --------------------------------------------------------------------------------------------------- relative positions


class _RelativePositions:
    """Makes BEiT's tables of relative positions fit the image in work."""

    def __init__(self, network: Any, body: _Transformer, side: int) -> None:
        self.network, self.body = network, body
        self.shared = network.rel_pos_bias
        tables = [(self.shared, False)] if self.shared is not None else []
        pairs = zip(network.blocks, body.windowed, strict=True)
        tables += [(block.attn, windowed) for block, windowed in pairs if block.attn.window_size]
        for table, windowed in tables:
            # A window of the pre-training's own size needs no other table than its own.
            target = body.window if windowed else side
            if target > max(body.own_grid):
                table.set_window_size((target, target))
        self.tables = [(table, windowed, tuple(table.window_size)) for table, windowed in tables]
        self.indices: dict[Any, Tensor] = {}
        self.current: tuple[int, int] | None = None  # grid that the tables read now

    def prepare(self, grid: tuple[int, int]) -> dict[bool, Tensor | None]:
        """Set every table to read offsets of `grid`; returns the bias shared by blocks, for windowed and other ones."""
        window = (self.body.window,) * 2
        for table, windowed, size in self.tables if grid != self.current else ():
            seen = window if windowed else grid
            device = table.relative_position_bias_table.device
            table.relative_position_index = self._index(seen, size, device)
            table.window_size, table.window_area = seen, seen[0] * seen[1]
        self.current = grid
        if self.shared is None:
            return {False: None, True: None}
        whole = self.shared().unsqueeze(0)  # (1, heads, 1 + N, 1 + N)
        if not self.body.window:
            return {False: whole, True: None}
        size = next(size for table, _, size in self.tables if table is self.shared)
        index = self._index(window, size, whole.device)
        within = self.shared.relative_position_bias_table[index].permute(2, 0, 1).unsqueeze(0)
        return {False: whole, True: within}

    def _index(self, grid: tuple[int, int], table: tuple[int, ...], device: torch.device) -> Tensor:
        place = (grid, table, device)
        if place not in self.indices:
            if len(self.indices) > 8:  # images of many shapes: the oldest is the least likely to come again
                self.indices.pop(next(iter(self.indices)))
            with torch.inference_mode(False):  # what is kept serves training too
                self.indices[place] = relative_position_index(grid, table, device)
        return self.indices[place]


def relative_position_index(
    grid: tuple[int, int], table: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Where each pair of tokens of `grid` finds its bias in the table of a grid `table`: int64 (1 + h w, 1 + h w).

    Token 0 is the class token, whose three entries (to it, from it, to itself) stand at the table's end. Offsets beyond
    the table take its farthest.
    """
    (h, w), (rows, columns) = grid, table
    places = torch.stack(
        torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    ).flatten(1)  # (2, N)
    offsets = places[:, :, None] - places[:, None, :]  # (2, N, N)
    dy = offsets[0].clamp(1 - rows, rows - 1) + rows - 1
    dx = offsets[1].clamp(1 - columns, columns - 1) + columns - 1
    count = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + h * w, 1 + h * w, dtype=torch.int64, device=device)
    index[1:, 1:] = dy * (2 * columns - 1) + dx
    index[0], index[:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def _is_beit(network: nn.Module) -> bool:
    from timm.models.beit import Beit

    return isinstance(network, Beit)


# ------------------------------------------------------------------------------------------------ loading and exporting


def load_pyramid(
    spec: str, *, weights: str, image_size: int, config: PyramidConfig, drop_path: float
) -> tuple[FeaturePyramid, Backbone]:
    """A pyramid on a backbone, and what describes that backbone.

    Args:
        spec: `timm:NAME` or a run of pecobook (contrast, pretrain or finetune).
        weights: a local file, `random`, or empty for the backbone's own.
        image_size: side of the images that it will see, pixels.
        config: windows, memory, frozen or not.
        drop_path: stochastic depth.

    Raises:
        WeightsError: unknown name, weights that do not fit, or a network without a pyramid.
    """
    backbone = load_backbone(spec, weights=weights or None, drop_path=drop_path, any_size=True)
    pyramid = FeaturePyramid(backbone.network, image_size, config)
    side = 2 * pyramid.strides[-1]
    try:  # networks of one size of image, and whatever else timm has
        with torch.no_grad():
            maps = pyramid.eval()(torch.zeros(1, 3, side, side))
        levels = zip(maps, pyramid.channels, pyramid.strides, strict=True)
        fits = [x.shape == (1, channels, side // stride, side // stride) for x, channels, stride in levels]
    except (RuntimeError, AssertionError, AttributeError, ValueError, TypeError) as error:
        raise WeightsError(f"'{spec}' makes no pyramid of images of any size: {first_line(error)}") from None
    if not all(fits):
        raise WeightsError(f"'{spec}' makes no pyramid: its maps are not (B, C, H, W) at its strides.")
    return pyramid.train(), backbone


class WithBackbone(Protocol):
    """Settings of a stage that stands on a pyramid."""

    @property
    def backbone(self) -> str: ...  # noqa: D102
    @property
    def weights(self) -> str: ...  # noqa: D102
    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def pyramid(self) -> PyramidConfig: ...  # noqa: D102
    @property
    def drop_path(self) -> float: ...  # noqa: D102


def pyramid_of(config: WithBackbone) -> tuple[FeaturePyramid, Backbone]:
    """The pyramid that the settings of a stage name. Raises ConfigError without --backbone, and as `load_pyramid`."""
    if not config.backbone:
        raise ConfigError("--backbone is missing: give a pretrain, contrast or finetune run, or timm:NAME.")
    return load_pyramid(
        config.backbone,
        weights=config.weights,
        image_size=config.image_size,
        config=config.pyramid,
        drop_path=config.drop_path,
    )


def describe_pyramid(backbone: Backbone, config: PyramidConfig, image_size: int) -> dict[str, Any]:
    """What `rebuild_pyramid` makes the same network of, as plain values."""
    own = {"name": backbone.name, "args": backbone.args, "mean": list(backbone.mean), "std": list(backbone.std)}
    return {**own, "image_size": image_size, "window": config.window}


def rebuild_pyramid(settings: dict[str, Any]) -> FeaturePyramid:
    """The pyramid that `describe_pyramid` describes, with random weights."""
    further = any_size_args(settings["name"])
    network = create(settings["name"], num_classes=0, **further, **settings["args"])
    return FeaturePyramid(network, settings["image_size"], PyramidConfig(window=settings["window"]))
