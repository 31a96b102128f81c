"""Feature pyramids for segmentation and detection: four feature maps of a backbone at four strides, for any image size.

A ViT has a single resolution, so the outputs of the blocks at a third, half, two thirds and the end of the depth (4, 6,
8, 12 of 12) are upsampled fourfold, upsampled twofold, kept, and downsampled twofold (PeCo, supplement; BEiT's
arrangement). For a convolutional network, the pyramid consists of its last four stages.

Positions at image sizes other than the backbone's native size: absolute positions are interpolated (bicubic) for each
image. Tables of relative positions are resized once, with BEiT's geometric scheme, to the grid of `image_size`; smaller
or narrower images read the part of the table that they need, and offsets outside the table use the entry of the
farthest offset. At the native size, positions are unchanged.

With `window`, most blocks attend within windows of patches, and the last block of each quarter attends over all patches
(ViTDet, arXiv 2203.16527), so the cost grows linearly with the image area instead of quadratically. Class tokens are
copied into every window, and the result is the mean over the windows. A window as large as the grid of pre-training
leaves BEiT's tables unchanged.

B batch, h w rows and columns of patches, N = h w, P prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.dense.relative_positions import RelativePositions
from pecobook.models.dry_run import refusing
from pecobook.models.export import check_kind, read_settings
from pecobook.models.makers import Normalisation, overridden
from pecobook.models.network_traits import has_patch_tokens, network_traits
from pecobook.models.networks import create_network
from pecobook.models.weights import Backbone, load_backbone
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.segment import SegmentConfig


class FeaturePyramid(nn.Module):
    """A backbone and the layers that scale its feature maps.

    Args:
        backbone: a timm network without a head, loaded with `any_size` (see `build_pyramid`).
        image_size: typical side of the input images, in pixels; larger images and other shapes also work.
        config: attention windows, gradient checkpointing, and whether the backbone is frozen.

    Raises:
        WeightsError: the backbone has no maps at four strides, or its blocks cannot use attention windows.
    """

    def __init__(self, backbone: nn.Module, image_size: int, config: PyramidConfig = PyramidConfig()) -> None:
        super().__init__()
        self.config = config
        is_vit = has_patch_tokens(backbone)
        self.body: _TransformerBody | _ConvolutionalBody = (
            _TransformerBody(backbone, image_size, config) if is_vit else _ConvolutionalBody(backbone, config)
        )
        self.channels: tuple[int, ...] = self.body.channels
        self.strides: tuple[float, ...] = self.body.strides
        self.patch: int = self.body.patch
        self.scale = nn.ModuleList(_scaling_layers(self.channels[0])) if is_vit else nn.ModuleList([nn.Identity()] * 4)
        self.network = backbone
        backbone.requires_grad_(not config.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to four feature maps (B, C_l, H / s_l, W / s_l), fine to coarse.

        Sides that are not a multiple of the patch side are padded with zeros at the right and the bottom.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            maps = self.body(images)
        return [scale(features) for scale, features in zip(self.scale, maps, strict=True)]

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Interpolate absolute positions once for square images of this size, instead of for each image."""
        from timm.layers import resample_abs_pos_embed

        body, network = self.body, self.network
        if isinstance(body, _ConvolutionalBody) or getattr(network, "pos_embed", None) is None:
            return
        side = -(-image_size // body.patch)
        table: Any = network.pos_embed
        prefix = 0 if getattr(network, "no_embed_class", False) else body.num_prefix
        resized = resample_abs_pos_embed(
            table, new_size=[side, side], old_size=list(body.native_grid), num_prefix_tokens=prefix
        )
        network.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
        network.patch_embed.set_input_size(img_size=side * body.patch)  # type: ignore[operator, union-attr]
        body.native_grid = (side, side)

    def train(self, mode: bool = True) -> FeaturePyramid:
        """Set training mode; a frozen backbone stays in evaluation mode, so that its batch statistics do not change."""
        super().train(mode)
        if self.config.frozen:
            self.network.eval()
        return self


def _scaling_layers(width: int) -> list[nn.Module]:
    """Return the four layers that upsample fourfold, upsample twofold, keep, and downsample twofold."""

    def double() -> nn.Module:
        return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

    up = nn.Sequential(double(), nn.BatchNorm2d(width), nn.GELU(), double())
    return [up, double(), nn.Identity(), nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)]


class _ConvolutionalBody(nn.Module):
    """The last four stages of a convolutional network."""

    def __init__(self, network: nn.Module, config: PyramidConfig) -> None:
        super().__init__()
        info = getattr(network, "feature_info", None)
        levels = [] if info is None else (info.info if hasattr(info, "info") else list(info))
        if len(levels) < 4 or not hasattr(network, "forward_intermediates"):
            raise WeightsError(f"{type(network).__name__} has no maps at four strides: choose a ViT, BEiT or ResNet.")
        if config.window:
            raise WeightsError(f"{type(network).__name__} has no attention: omit --pyramid.window.")
        self.indices = list(range(len(levels) - 4, len(levels)))
        if hasattr(network, "prune_intermediate_layers"):  # DDP would wait for gradients of unused layers
            network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        self.channels = tuple(int(level["num_chs"]) for level in levels[-4:])
        self.strides: tuple[float, ...] = tuple(int(level["reduction"]) for level in levels[-4:])
        if config.checkpointing:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        has_patches = hasattr(getattr(network, "patch_embed", None), "patch_size")  # of a Swin, for example
        self.patch = int(self.strides[0]) if has_patches else 1  # patches that overlap, as in PVTv2, are larger
        object.__setattr__(self, "network", network)  # not as a submodule: the pyramid registers the network

    network: Any

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to four feature maps (B, C_l, H / s_l, W / s_l)."""
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        return self.network.forward_intermediates(  # type: ignore[no-any-return]
            images, indices=self.indices, intermediates_only=True
        )


class _TransformerBody(nn.Module):
    """Returns the outputs of four blocks of a ViT as maps (B, D, h, w), for images of any size."""

    def __init__(self, network: nn.Module, image_size: int, config: PyramidConfig) -> None:
        from timm.models.beit import Beit

        super().__init__()
        object.__setattr__(self, "network", network)  # not as a submodule: the pyramid registers the network
        vit: Any = network
        depth, patch = len(vit.blocks), int(vit.patch_embed.patch_size[0])
        if depth < 2 or patch < 4:
            raise WeightsError(
                f"A ViT with {depth} blocks and patches of {patch} pixels cannot form a pyramid: it needs 2 blocks or "
                "more, and a patch side of 4 pixels or more; choose another network."
            )
        self.levels = [max(round(depth * share), 1) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.indices = sorted(set(self.levels))  # in a shallow ViT, one block can serve two levels
        self.patch, self.window = patch, config.window
        self.strides = (patch / 4, patch / 2, patch, patch * 2)
        self.channels = (int(vit.embed_dim),) * 4
        self.num_prefix = int(vit.num_prefix_tokens)
        global_blocks = {(depth * quarter) // 4 - 1 for quarter in (1, 2, 3, 4)} if config.window else set(range(depth))
        self.windowed = [number not in global_blocks for number in range(depth)]
        self.native_grid: tuple[int, int] = (int(vit.patch_embed.grid_size[0]), int(vit.patch_embed.grid_size[1]))
        vit.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        vit.set_grad_checkpointing(config.checkpointing)
        self.grid: tuple[int, int] = self.native_grid  # grid of the current images, for the windows
        for block, windowed in zip(vit.blocks, self.windowed, strict=True):
            if windowed:
                block.attn.register_forward_pre_hook(self._split_into_windows)
                block.attn.register_forward_hook(self._merge_windows)
        self.relative = None
        if isinstance(network, Beit):
            options: Any = {"windowed": self.windowed, "window": config.window, "native_grid": self.native_grid}
            self.relative = RelativePositions(vit, **options, side=image_size // patch)
        if config.window and getattr(vit, "rope", None) is not None:
            raise WeightsError("A ViT with rotary positions cannot attend in windows: omit --pyramid.window.")

    network: Any

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, 3, H, W) to four feature maps (B, D, h, w)."""
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        h, w = self.grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        if self.relative is None:
            features = self.network.forward_intermediates(
                images, indices=self.indices, intermediates_only=True, output_fmt="NCHW"
            )
        else:
            tokens = self._beit(images)
            features = [x[:, self.num_prefix :].transpose(1, 2).reshape(x.shape[0], -1, h, w) for x in tokens]
        return [features[self.indices.index(level)] for level in self.levels]

    def _beit(self, images: Tensor) -> list[Tensor]:
        """Run timm's BEiT on images of any size; return the tokens (B, P + N, D) of the blocks in `indices`."""
        from timm.layers import resample_abs_pos_embed
        from torch.utils.checkpoint import checkpoint

        network, relative = self.network, self.relative
        assert relative is not None
        x = network.patch_embed.norm(network.patch_embed.proj(images).flatten(2).transpose(1, 2))  # (B, N, D)
        x = torch.cat([network.cls_token.expand(x.shape[0], -1, -1), x], 1)
        if network.pos_embed is not None:
            x = x + resample_abs_pos_embed(
                network.pos_embed, new_size=list(self.grid), old_size=list(self.native_grid), num_prefix_tokens=1
            )
        x = network.pos_drop(x)
        shared = relative.prepare(self.grid)
        features = []
        for number, block in enumerate(network.blocks):
            bias = shared[self.windowed[number]]
            if network.grad_checkpointing and self.training:
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            if number in self.indices:
                features.append(x)
        return features

    def _split_into_windows(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (to_windows(arguments[0], self.grid, self.window, self.num_prefix), *arguments[1:])

    def _merge_windows(self, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return from_windows(output, self.grid, self.window, self.num_prefix)


def to_windows(x: Tensor, grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    """Split tokens (B, P + h w, D) into windows (B R C, P + window^2, D), with R rows and C columns of windows.

    The grid is padded with zeros to a multiple of the window, and the prefix tokens are copied into every window.
    """
    B, _, D = x.shape
    (h, w), prefix = grid, x[:, :num_prefix]
    patches = F.pad(x[:, num_prefix:].view(B, h, w, D), (0, 0, 0, -w % window, 0, -h % window))
    R, C = patches.shape[1] // window, patches.shape[2] // window
    patches = patches.view(B, R, window, C, window, D).transpose(2, 3).reshape(B * R * C, window * window, D)
    return torch.cat([prefix.repeat_interleave(R * C, 0), patches], 1)


def from_windows(x: Tensor, grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    """Invert `to_windows`; each prefix token becomes the mean over the windows."""
    (h, w), D = grid, x.shape[2]
    R, C = -(-h // window), -(-w // window)
    B = x.shape[0] // (R * C)
    prefix = x[:, :num_prefix].reshape(B, R * C, num_prefix, D).mean(1)
    patches = x[:, num_prefix:].reshape(B, R, C, window, window, D).transpose(2, 3)
    patches = patches.reshape(B, R * window, C * window, D)[:, :h, :w]
    return torch.cat([prefix, patches.reshape(B, h * w, D)], 1)


# ------------------------------------------------------------------------------------------------ loading and exporting


_REMEDY = "Choose another network, such as a ViT, BEiT, ResNet, ConvNeXt or Swin."


def _pyramid_on(backbone: Backbone, spec: str, image_size: int, config: PyramidConfig) -> FeaturePyramid:
    """Build a pyramid on a backbone, in training mode, and test it. Raises a WeightsError that names `spec`."""
    with refusing(spec, "form a pyramid for images of any size", _REMEDY):  # some networks take one size only
        pyramid = FeaturePyramid(backbone.network, image_size, config)
        side = 2 * int(pyramid.strides[-1])
        with torch.no_grad():
            maps = pyramid.eval()(torch.zeros(1, 3, side, side))
            pyramid(torch.zeros(1, 3, side, side + side // 2 - 4))  # whole images have any shape
        levels = zip(maps, pyramid.channels, pyramid.strides, strict=True)
        fits = [x.shape == (1, channels, side // stride, side // stride) for x, channels, stride in levels]
    if not all(fits):
        raise WeightsError(
            f"'{spec}' cannot form a pyramid: its feature maps are not (B, C, H, W) at its strides. {_REMEDY}"
        )
    return pyramid.train()


def build_pyramid(config: SegmentConfig | DetectConfig) -> tuple[FeaturePyramid, Backbone]:
    """Load a backbone and build a pyramid on it; with `--init` its weights stay random until `start_dense` loads them.

    Returns:
        the pyramid in training mode, and the backbone with its name, arguments and expected input.

    Raises:
        ConfigError: --backbone is missing.
        WeightsError: the name is unknown, the weights do not fit, or the network cannot form a pyramid.
    """
    if config.init:
        kind, command = ("segmenter", "segment") if isinstance(config, SegmentConfig) else ("detector", "detect")
        check_kind(config.init, kind, command)
        settings = read_settings(config.init, kinds=(kind,))["pyramid"]
        name, args = settings["name"], settings["args"]
        drop_path = {"drop_path_rate": config.drop_path} if config.drop_path > 0 else {}
        network = create_network(name, num_classes=0, **network_traits(name, args).any_size, **drop_path, **args)
        found = Normalisation(tuple(settings["mean"]), tuple(settings["std"]), "as the run was trained")
        found = overridden(found, config.mean, config.std)
        backbone = Backbone(network, name, args, found.mean, found.std, None, notes=(found.line(config.init),))
    elif config.backbone:
        options: dict[str, Any] = {"drop_path": config.drop_path, "mean": config.mean, "std": config.std}
        backbone = load_backbone(config.backbone, weights=config.weights or None, any_size=True, **options)
    else:
        raise ConfigError("--backbone is missing: give a pretrain, contrast or finetune run, or timm:NAME.")
    return _pyramid_on(backbone, config.init or config.backbone, config.image_size, config.pyramid), backbone


def describe_pyramid(backbone: Backbone, config: PyramidConfig, image_size: int) -> dict[str, Any]:
    """Return the settings from which `rebuild_pyramid` builds an equal network, as JSON values."""
    network = {"name": backbone.name, "args": backbone.args, "mean": list(backbone.mean), "std": list(backbone.std)}
    return {**network, "image_size": image_size, "window": config.window}


def rebuild_pyramid(settings: dict[str, Any]) -> FeaturePyramid:
    """Build the pyramid that `settings`, a result of `describe_pyramid`, describes, with random weights."""
    any_size = network_traits(settings["name"]).any_size
    network = create_network(settings["name"], num_classes=0, **any_size, **settings["args"])
    return FeaturePyramid(network, settings["image_size"], PyramidConfig(window=settings["window"]))
