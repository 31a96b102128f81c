"""The perceptual distance against equation 4, written out over hooked activations."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.perceptual import PerceptualDistance, normalise
from pecobook.settings.perceptual import Normalisation, PerceptualConfig

VIT, RESNET = "timm:test_vit", "timm:test_resnet"
Array = npt.NDArray[np.float64]


def pictures(seed: int, side: int = 160) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


@contextmanager
def hooked(modules: list[nn.Module]) -> Iterator[list[Array]]:
    """Collect what these modules put out, in the order of the list."""
    outputs: list[Array] = [np.zeros(0) for _ in modules]

    def hook_for(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[number] = output.detach().double().numpy()

        return hook

    handles = [module.register_forward_hook(hook_for(number)) for number, module in enumerate(modules)]
    yield outputs
    for handle in handles:
        handle.remove()


def equation_4(a: Array, b: Array, how: Normalisation) -> float:
    """1 / (C H W) || f(x) - f(y) ||^2 of one image and layer: two (C, H, W)."""

    def unit(vector: Array) -> Array:
        if how == "layernorm":
            vector = vector - vector.mean()
        if how == "none":
            return vector
        return np.asarray(vector / np.sqrt((vector**2).mean() + 1e-6))

    C, H, W = a.shape
    total = 0.0
    for row in range(H):
        for column in range(W):
            total += float(((unit(a[:, row, column]) - unit(b[:, row, column])) ** 2).sum())
    return float(total / (C * H * W))


def as_maps(features: Array, prefix: int) -> Array:
    """(B, 1 + N, C) of a transformer to (B, C, h, w); (B, C, h, w) stays."""
    if features.ndim == 4:
        return features
    side = int((features.shape[1] - prefix) ** 0.5)
    return features[:, prefix:].transpose(0, 2, 1).reshape(len(features), -1, side, side)


def test_shuffle__keeps_the_values_of_each_tensor_and_no_order() -> None:
    unshuffled = PerceptualDistance("timm:resnet10t", (1, 2), "random")
    shuffled = [PerceptualDistance("timm:resnet10t", (1, 2), "random", shuffle=True, seed=0) for _ in range(2)]
    changed = 0
    for (name, a), (_, b) in zip(
        unshuffled.network.named_parameters(), shuffled[0].network.named_parameters(), strict=True
    ):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
        changed += not torch.equal(a, b)
        assert torch.equal(a, b) or a.ndim >= 2
    assert changed == sum(parameter.ndim >= 2 for parameter in unshuffled.network.parameters())
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(shuffled[0](x, y), shuffled[1](x, y))
    assert not torch.allclose(shuffled[0](x, y), unshuffled(x, y))


@pytest.mark.parametrize("how", ["unit-rms", "layernorm", "none"])
@pytest.mark.parametrize(
    ("network", "layers", "names"),
    [
        (VIT, (1, 3, 6), ("blocks.0", "blocks.2", "blocks.5")),
        (RESNET, (1, 2, 3, 4), ("layer1", "layer2", "layer3", "layer4")),
    ],
    ids=["vit", "resnet"],
)
def test_forward__is_equation_4(
    network: str, layers: tuple[int, ...], names: tuple[str, ...], how: Normalisation
) -> None:
    distance = PerceptualDistance(network, layers, "random", normalisation=how)
    x, y = pictures(0, 160 if network == VIT else 96), pictures(1, 160 if network == VIT else 96)
    network_of_timm: Any = distance.network.network
    modules = [network_of_timm.get_submodule(name) for name in names]
    # The networks' own normalisation of images: mean and deviation 0.5.
    with hooked(modules) as of_x:
        distance.network((x - 0.5) / 0.5)
    with hooked(modules) as of_y:
        distance.network((y - 0.5) / 0.5)
    prefix = getattr(network_of_timm, "num_prefix_tokens", 0)
    expected = np.array(
        [
            [equation_4(as_maps(a, prefix)[image], as_maps(b, prefix)[image], how) for image in range(2)]
            for a, b in zip(of_x, of_y, strict=True)
        ]
    )  # (L, B)
    assert_close(distance.per_layer(x, y).double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-6)
    assert_close(distance(x, y).double(), torch.from_numpy(expected.sum(0)), rtol=1e-3, atol=1e-6)
    assert (expected > 1e-6).all()


def test_distance_to_features__is_the_distance_to_features_made_before() -> None:
    distance = PerceptualDistance(VIT, (2, 5), "random")
    x, y = pictures(0), pictures(1)
    assert_close(distance.distance_to_features(distance.features(x), y), distance(x, y))


def test_forward__is_zero_for_equal_images_and_symmetric() -> None:
    distance = PerceptualDistance(RESNET, (1, 4), "random")
    x, y = pictures(0, 64), pictures(1, 64)
    assert distance(x, x).tolist() == [0.0, 0.0]
    assert_close(distance(x, y), distance(y, x))
    assert distance(x, y).min() > 0
    assert_close(distance(x, y)[1:], distance(x[1:], y[1:]), rtol=1e-4, atol=1e-6)


def test_forward__sends_the_gradient_to_the_image_and_not_to_the_weights() -> None:
    for network in (VIT, RESNET):
        distance = PerceptualDistance(network, (1, 4), "random")
        y = pictures(1).requires_grad_()
        distance(pictures(0), y).sum().backward()
        assert y.grad is not None
        assert (y.grad.abs().amax((1, 2, 3)) > 0).all()
        assert not any(parameter.requires_grad for parameter in distance.parameters())
        assert all(parameter.grad is None for parameter in distance.parameters())


def test_train__keeps_evaluation_mode() -> None:
    distance = PerceptualDistance(RESNET, (1, 4), "random")
    holder = nn.Sequential(distance).train()
    assert holder.training
    assert not any(module.training for module in distance.modules())
    before = {name: value.clone() for name, value in distance.state_dict().items()}
    distance(pictures(0, 64), pictures(1, 64))
    assert all(torch.equal(value, before[name]) for name, value in distance.state_dict().items())


def test_features__are_single_precision_under_autocast() -> None:
    distance = PerceptualDistance(VIT, (1, 6), "random")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(feature.dtype == torch.float32 for feature in distance.features(pictures(0)))
        assert distance(pictures(0), pictures(1)).dtype == torch.float32


def test_features__resizes_for_a_transformer_and_not_for_a_convolutional_network() -> None:
    assert [f.shape for f in PerceptualDistance(VIT, (1,), "random").features(pictures(0, 32))] == [(2, 64, 10, 10)]
    assert [f.shape for f in PerceptualDistance(RESNET, (4,), "random").features(pictures(0, 64))] == [(2, 96, 2, 2)]
    larger = PerceptualDistance(RESNET, (4,), "random", input_size=128)
    assert [f.shape for f in larger.features(pictures(0, 64))] == [(2, 96, 4, 4)]


def test_random_weights__depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = PerceptualDistance(VIT, (1,), "random", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (PerceptualDistance(VIT, (1,), "random", seed=seed) for seed in (3, 4))
    weights = "network.network.blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[weights], again.state_dict()[weights])
    assert not torch.equal(first.state_dict()[weights], other.state_dict()[weights])


@pytest.mark.parametrize("how", ["unit-rms", "layernorm"])
def test_normalise__ignores_the_scale_of_a_location(how: Normalisation) -> None:
    feature = torch.randn(2, 8, 3, 3)
    scaled = feature * (1 + 9 * torch.rand(2, 1, 3, 3))
    assert_close(normalise(feature, how), normalise(scaled, how), atol=1e-3, rtol=1e-3)
    assert_close(normalise(feature, how).square().mean(1), torch.ones(2, 3, 3), atol=1e-3, rtol=0)
    assert normalise(torch.zeros(1, 4, 1, 1), how).tolist() == torch.zeros(1, 4, 1, 1).tolist()


# ------------------------------------------------------------------------------------------------------------ weights


def test_init__of_an_unknown_network_suggests_one() -> None:
    with pytest.raises(WeightsError, match=r"timm has no network 'resnet51'\. Did you mean 'resnet.*'\?"):
        PerceptualDistance("timm:resnet51", (1,), "random")
    with pytest.raises(WeightsError, match="networks of timm are written timm:NAME"):
        PerceptualDistance("resnet50", (1,), "random")


def test_init__without_the_hub_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match="The weights of timm's 'test_vit' cannot be downloaded") as caught:
        PerceptualDistance(VIT, (1,))
    assert "give a local file of weights, or use random weights" in str(caught.value)


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped"])
def test_init__reads_local_weights(tmp_path: Path, form: str) -> None:
    torch.manual_seed(11)
    state = timm.create_model("test_vit").state_dict()  # with a head, which is left out
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"model": state, "epoch": 3} if form == "wrapped" else state, file)
    loaded = PerceptualDistance(VIT, (6,), str(file)).network.state_dict()
    assert len(loaded) == len(state) - 4  # neither head nor last norm
    assert all(torch.equal(value, state[name.removeprefix("network.")]) for name, value in loaded.items())


def test_init__refuses_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights.pth' do not fit this network: 78 missing \(blocks"):
        PerceptualDistance(VIT, (1,), str(tmp_path / "weights.pth"))
    with pytest.raises(WeightsError, match="There is no file of weights"):
        PerceptualDistance(VIT, (1,), str(tmp_path / "missing.pth"))


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_init__never_runs_code_from_a_file(tmp_path: Path, form: str) -> None:
    proof, file = tmp_path / "code ran", tmp_path / "weights.pth"
    state = {"cls_token": Evil(proof)}
    if form == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    with pytest.raises(WeightsError, match="pecobook runs no code from a file") as caught:
        PerceptualDistance(VIT, (1,), str(file))
    assert "Convert it once" in str(caught.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(state))
    assert proof.exists()  # so the file would have


def test_init__takes_settings_by_name_or_as_one_object() -> None:
    config = PerceptualConfig(network=RESNET, layers=(1, 4), weights="random", normalisation="layernorm", weight=3.0)
    named = PerceptualDistance(RESNET, [1, 4], "random", normalisation="layernorm", input_size=None, mean=None)
    x, y = pictures(0, 64), pictures(1, 64)
    assert torch.equal(PerceptualDistance(config)(x, y), named(x, y))
    # This setting weighs the loss outside: here it would change nothing.
    with pytest.raises(ConfigError, match="Unknown setting 'weight'"):
        PerceptualDistance(RESNET, (1, 4), "random", weight=2.0)


def test_features__of_bytes_are_those_of_floats() -> None:
    distance = PerceptualDistance("timm:test_resnet", (1,), "random")
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = distance(pixels.float() / 255, pixels.flip(3).float() / 255)
    torch.testing.assert_close(distance(pixels, pixels.flip(3)), expected)
    with pytest.raises(ValueError, match=r"for one image give image\[None\]"):
        distance(pixels[0], pixels[0])
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        distance(pixels.long(), pixels.long())
