"""The networks of rFID and LPIPS, with weights from files, since tests cannot download any."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.errors import WeightsError
from pecobook.models.judges import INCEPTION_FILES, INCEPTION_SHA256, load_inception, load_lpips
from tests.inception import random_inception


def pixels(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_inception__of_a_file_has_the_published_shapes_and_says_that_its_weights_are_others(tmp_path: Path) -> None:
    state = random_inception()
    # The published file holds 95,628,359 bytes: the weights, and names and sizes of 300 entries.
    count = sum(value.numel() * value.element_size() for value in state.values())
    assert 0 < 95_628_359 - count < 100_000
    torch.save(state, tmp_path / "weights.pth")
    inception = load_inception(str(tmp_path / "weights.pth"))
    assert not inception.weights.original
    assert len(inception.weights.sha256) == len(INCEPTION_SHA256)
    features, logits = inception(pixels(2, 32))
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert torch.allclose(logits, features @ state["fc.weight"].T, atol=1e-5)
    assert not torch.equal(features[0], features[1])
    assert all(INCEPTION_SHA256[:8] in name for name in INCEPTION_FILES)


def test_inception__of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"holds no weights of FID's Inception .* Give pt_inception-2015-12-05"):
        load_inception(str(tmp_path / "other.pth"))
    with pytest.raises(WeightsError, match="There is no file of weights"):
        load_inception(str(tmp_path / "none.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(WeightsError, match=r"pip install 'pecobook\[evaluate\]'"):
        load_inception(str(tmp_path / "none.pth"))


def test_weights__that_cannot_be_downloaded_are_named_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(WeightsError, match=r"\(urlopen error no route to host\).*toshas.*--inception-weights FILE"):
        load_inception()
    with pytest.raises(WeightsError, match=r"vgg16-397923af.pth cannot be downloaded.*--lpips-weights FILE"):
        load_lpips("vgg")


def test_weights__in_torchs_folder_are_found_under_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(random_inception(), folder / INCEPTION_FILES[1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_inception().weights.file == INCEPTION_FILES[1]


@pytest.mark.parametrize("network", ["alex", "squeeze"])
def test_lpips__is_its_formula_with_the_trunks_weights_and_its_own_linear_layers(network: str, tmp_path: Path) -> None:
    import lpips
    import torchvision

    name = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[network]
    torch.manual_seed(0)
    trunk = getattr(torchvision.models, name)(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    module, weights = load_lpips(network, str(tmp_path / "trunk.pth"))
    assert not weights.original
    own = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{network}.pth", map_location="cpu")
    x, y = pixels(2, 64).float() / 255, pixels(4, 64)[2:].float() / 255
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    # Number of layers after which features are compared.
    ends = {"alex": (2, 5, 8, 10, 12), "squeeze": (2, 5, 8, 10, 11, 12, 13)}[network]
    expected = torch.zeros(2)
    maps = [(2 * images - 1 - mean[:, None, None]) / std[:, None, None] for images in (x, y)]
    start = 0
    for number, end in enumerate(ends):
        maps = [trunk.eval().features[start:end](features) for features in maps]
        start = end
        unit = [F.normalize(features, dim=1) for features in maps]
        weight = own[f"lin{number}.model.1.weight"]
        expected += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2)).detach()
    assert torch.allclose(module(2 * x - 1, 2 * y - 1).flatten(), expected, rtol=1e-4, atol=1e-6)
    assert float(expected.min()) > 0
