from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from pecobook.errors import WeightsError
from pecobook.models.masked_vit import MaskedImageModel, VisibleOnlyModel
from pecobook.models.residual import keep_residuals_low
from pecobook.settings.pretrain import DecoderConfig

SMALL = {"img_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


def network(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL, init_values=0.1, drop_path_rate=0.2)


def carried(model: nn.Module, blocks: Any, *inputs: Any) -> tuple[torch.Tensor, set[torch.dtype]]:
    """Return the output under bf16 autocast, and the types of what the blocks take and return."""
    types: set[torch.dtype] = set()

    def note(_block: nn.Module, taken: Any, returned: torch.Tensor) -> None:
        types.update((taken[0].dtype, returned.dtype))

    for block in blocks:
        block.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        output: torch.Tensor = model(*inputs)
    return output, types


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("training", [True, False])
def test_keep_residuals_low__tokens_are_bf16_from_block_to_block(name: str, training: bool) -> None:
    images, mask = torch.rand(4, 3, 16, 16), torch.arange(64).view(4, 4, 4) % 3 == 0
    mask[:] = mask[0]
    outputs = []
    for low in (False, True):
        model = MaskedImageModel(network(name), vocab_size=24).train(training)
        if low:
            keep_residuals_low(model.backbone.blocks, name)  # type: ignore[arg-type]
        torch.manual_seed(1)
        output, types = carried(model, model.backbone.blocks, images, mask, int(mask[0].sum()))
        assert types == {torch.bfloat16 if low else torch.float32}
        output.float().square().mean().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in model.parameters())
        outputs.append(output.float())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.02)
    assert not torch.equal(*outputs)


def test_keep_residuals_low__changes_nothing_without_autocast() -> None:
    images = torch.rand(2, 3, 16, 16)
    model = network("vit_tiny_patch16_224").eval()
    expected = model(images)
    keep_residuals_low(model.blocks, "vit")
    assert torch.equal(model(images), expected)


def test_keep_residuals_low__decoder_of_the_accelerated_form() -> None:
    mask = torch.arange(64).view(4, 4, 4) % 2 == 0
    model = VisibleOnlyModel(network("vit_tiny_patch16_224"), 24, DecoderConfig(depth=2, width=32, num_heads=2))
    blocks = [*model.backbone.blocks, *model.decoder]  # type: ignore[misc]
    keep_residuals_low(blocks, "vit")
    assert carried(model, blocks, torch.rand(4, 3, 16, 16), mask)[1] == {torch.bfloat16}


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_keep_residuals_low__refuses_other_networks(name: str) -> None:
    with torch.device("meta"):
        other = timm.create_model(name)
    with pytest.raises(WeightsError, match=f"--residual bf16 is for ViTs and BEiTs; '{name}' has other blocks"):
        keep_residuals_low(getattr(other, "blocks", None), name)
