"""Networks that Python code passes to a run: timm networks as backbones, any tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.network_traits import unseen, without_memory
from pecobook.models.tokenizer import as_codes
from pecobook.models.weights import Backbone


def as_backbone(module: nn.Module) -> Backbone:
    """Return a timm network as a `Backbone`, which knows how to rebuild it; a `Backbone` is returned unchanged.

    Raises:
        WeightsError: the module is not a timm network, or timm builds a different one under its name.
    """
    if isinstance(module, Backbone):
        return module
    traits: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    name, size = traits.get("architecture", ""), getattr(getattr(module, "patch_embed", None), "img_size", None)
    own = {key: value.shape for key, value in module.state_dict().items()}
    for args in ({}, {"img_size": size[0]} if size else {}):
        try:
            rebuilt = without_memory(name, {"num_classes": getattr(module, "num_classes", 0), **args})
        except WeightsError:
            break
        shapes = {key: value.shape for key, value in rebuilt.state_dict().items()}
        if shapes == own and unseen(rebuilt) == unseen(module):
            side = size[0] if size else traits.get("input_size", (3, 224, 224))[-1]
            return Backbone(module, name, args, tuple(traits["mean"]), tuple(traits["std"]), side)
    raise WeightsError(
        f"backbone={type(module).__name__}: an export must be able to build it again. Give a network of timm, or "
        "pecobook.Backbone(network, name, args, mean, std, image_size) with timm's name and arguments of it."
    )


class GivenTokenizer(nn.Module):
    """A frozen copy of a user's module, with the interface of `load_tokenizer`.

    Raises:
        WeightsError: the module has no `encode`, `decode`, `num_codewords` or `stride`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        missing = [name for name in ("encode", "decode", "num_codewords", "stride") if not hasattr(module, name)]
        if missing:
            raise WeightsError(f"tokenizer={type(module).__name__} has no {', '.join(missing)}: see docs/python.md.")
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)
        self.num_codewords, self.stride = int(module.num_codewords), int(module.stride)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, images: Tensor, *, check: bool = True) -> Tensor:  # noqa: ARG002
        """Return the codes of float images (B, 3, H, W) in [0, 1]: int64 (B, H / f, W / f)."""
        return as_codes(self.module.encode(images), self.num_codewords)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) of codes (B, h, w)."""
        return self.module.decode(codes)  # type: ignore[no-any-return]
