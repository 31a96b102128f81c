"""Dry runs of a network before a run starts: a network that cannot do its task is refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pecobook.errors import WeightsError, first_line
from pecobook.models.network_traits import has_patch_tokens

# What a network raises when it is built or used for a purpose that it does not support.
_FAILURES = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError, NameError)


_OTHER_NETWORK = "Choose another network."


@contextmanager
def refusing(network: str, purpose: str, remedy: str = _OTHER_NETWORK) -> Iterator[None]:
    """Turn a network's error into a WeightsError: "'NETWORK' cannot PURPOSE: reason. REMEDY"."""
    try:
        yield
    except WeightsError as error:
        raise error if network in str(error) else WeightsError(f"'{network}' cannot {purpose}: {error}") from None
    except _FAILURES as error:
        raise WeightsError(f"'{network}' cannot {purpose}: {first_line(error).rstrip('.')}. {remedy}") from None


def dry_run(
    module: nn.Module, inputs: Sequence[Any], *, network: str, purpose: str, remedy: str = "", backward: bool = True
) -> Any:
    """Run a module forward and backward without computing anything, on the meta device.

    Weights, buffers and torch's random state stay unchanged. If a module cannot run on the meta device, a real forward
    pass decides.

    Args:
        module: the module, in the mode to be tested.
        inputs: its arguments: a batch of two images and what belongs to them.
        network: name of the network, for the user.
        purpose: the network's task, as in "read images of 64 pixels".
        remedy: what the user can do; if empty, the network's native image size or another network is suggested.
        backward: whether the module will be trained, so that all its trainable weights need a gradient.

    Returns:
        the outputs, on the meta device or real.

    Raises:
        WeightsError: the module fails, or some of its weights would get no gradient.
    """
    edge = "" if remedy else _edge_left_out(module, inputs[0].shape[-1])
    if edge:
        raise WeightsError(f"'{network}' cannot {purpose}: {edge}")
    with torch.random.fork_rng(devices=[]):
        try:
            if any(isinstance(part, nn.RNNBase) for part in module.modules()):
                raise NotImplementedError  # recurrent layers take a minute on the meta device
            outputs, unused = _on_meta(module, inputs, backward=backward)
        except _FAILURES:
            side = _usual_size(module, inputs)
            remedy = remedy or (f"Give --image-size {side}, or another network." if side else _OTHER_NETWORK)
            with refusing(network, purpose + (f" (it is made for {side})" if side else ""), remedy), torch.no_grad():
                buffers = {name: value.clone() for name, value in module.named_buffers()}
                return functional_call(module, buffers, tuple(inputs))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise WeightsError(
            f"'{network}' cannot {purpose}: its weight '{unused[0]}'{more} would get no gradient. {_OTHER_NETWORK}"
        )
    return outputs


def _edge_left_out(module: nn.Module, side: int) -> str:
    """Return which edge of an image the whole patches of a transformer leave out, and a size that has none; or ""."""
    for part in filter(has_patch_tokens, module.modules()):
        embed: Any = part.patch_embed
        patch = int(embed.patch_size[0])
        if side % patch and not getattr(embed, "dynamic_img_pad", False):
            return (
                f"whole patches of {patch} pixels leave out the last {side % patch} pixels of every row and column. "
                f"Give --image-size {max(round(side / patch), 1) * patch}."
            )
    return ""


def _usual_size(module: nn.Module, inputs: Sequence[Any]) -> int:
    """Return the native image size of the timm network in a module; 0 if unknown, or if the images have it."""
    settings: Any = next((part.pretrained_cfg for part in module.modules() if hasattr(part, "pretrained_cfg")), None)
    side = int((settings or {}).get("input_size", (0,))[-1])
    return side if side != inputs[0].shape[-1] else 0


def _on_meta(module: nn.Module, inputs: Sequence[Any], *, backward: bool) -> tuple[Any, list[str]]:
    """Return the outputs, and the names of trainable weights that get no gradient."""
    weights = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
        for name, value in module.named_parameters()
    }
    buffers = {name: torch.empty_like(value, device="meta") for name, value in module.named_buffers()}
    arguments = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)
    outputs = functional_call(module, {**weights, **buffers}, arguments)
    if not backward:
        return outputs, []
    total = sum(value.float().sum() for value in _tensors(outputs) if value.requires_grad)
    if isinstance(total, Tensor):
        total.backward()  # type: ignore[no-untyped-call]
    return outputs, [name for name, value in weights.items() if value.requires_grad and value.grad is None]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)


class _FirstBlockReached(Exception):  # noqa: N818  # ends a forward pass early, and is not an error
    pass


@torch.no_grad()
def leaks(model: nn.Module, images: Tensor, mask: Tensor, num_masked: int, *, patch: int, whole: bool) -> bool:
    """Return whether pixels of hidden patches leak into other patches: whether changing them alone has an effect.

    Compares two passes in training mode, with the same random numbers, whose images differ only in the hidden pixels.

    Args:
        model: a masked image model with a `backbone` (`models.masked_vit`).
        images: (B, 3, H, W), as the model reads them.
        mask: bool (B, h, w), True where hidden.
        num_masked: number of hidden patches in each image.
        patch: side of a patch, in pixels; no patch covers a border of the image that is narrower.
        whole: compare the output of the model; otherwise the input of the first block, after which a plain transformer
            reads no pixels, so that a large one takes no time.
    """
    hidden = mask[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    hidden = F.pad(hidden, (0, images.shape[3] - hidden.shape[3], 0, images.shape[2] - hidden.shape[2]))
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(2):
        noise = torch.randn(images.shape, generator=generator)
        arguments = (torch.where(hidden, noise, images), mask, num_masked)
        results.append(_output(model, arguments) if whole else _input_of_first_block(model, arguments))
    first, second = results
    return float((first - second).abs().max()) > 1e-4 * float(first.abs().max())


def _output(model: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: Tensor = functional_call(model, buffers, arguments)
    return result


def _input_of_first_block(model: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    reached: list[Tensor] = []

    def stop(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        reached.append(inputs[0].clone())
        raise _FirstBlockReached

    blocks: Any = model.backbone.blocks  # type: ignore[union-attr]
    handle = blocks[0].register_forward_pre_hook(stop)
    try:
        _output(model, arguments)
    except _FirstBlockReached:
        pass
    finally:
        handle.remove()
    return reached[0]
