"""The networks that judge reconstructions: torch-fidelity's Inception, for rFID and IS, and the authors' LPIPS.

Both packages are optional. Their weights are named and hashed: with other weights a figure is not comparable to
published rFIDs, so the evaluation says which file it read.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pecobook.errors import WeightsError, first_line
from pecobook.models.checkpoints import load_state, read_weights

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of Inception's weights, 95,628,359 bytes that torch-fidelity and pytorch-fid publish under two names."""
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"
_TRUNKS = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("vgg16", "vgg16-397923af.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
"""LPIPS network -> its torchvision name and weights file; the file name ends with the first digits of its SHA-256."""


class WeightsFile(NamedTuple):
    """A weights file, as an evaluation names it."""

    file: str
    sha256: str
    original: bool
    """Whether it is the file that published figures are computed with."""


class Inception(nn.Module):
    """FID's Inception: uint8 (B, 3, H, W) to features (B, 2048) and logits without bias (B, 1008), fp32."""

    def __init__(self, network: nn.Module, weights: WeightsFile) -> None:
        super().__init__()
        self.network, self.weights = network, weights

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both; torch-fidelity resizes to 299 pixels as TensorFlow 1 did."""
        features, logits = self.network(images)
        return features, logits


def load_inception(file: str = "") -> Inception:
    """Load Inception from a file, torch's download folder, or the internet.

    Raises:
        WeightsError: torch-fidelity is not installed, or the weights are missing, damaged or of another network.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise WeightsError("It needs the package torch-fidelity: pip install 'pecobook[evaluate]'.") from None
    path = Path(file).expanduser() if file else _downloaded(INCEPTION_FILES, INCEPTION_URL, "--inception-weights")
    state = read_weights(str(path))
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity would unpickle the user's file; this copy holds only tensors.
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            text = f"'{path}' holds no weights of FID's Inception ({first_line(error).rstrip(':')})."
            raise WeightsError(f"{text} Give {INCEPTION_FILES[1]}.") from None
    return Inception(network.eval(), _weights_file(path, INCEPTION_SHA256))


def load_lpips(network: str, file: str = "") -> tuple[nn.Module, WeightsFile]:
    """Load LPIPS with its trunk's weights from a file, torch's download folder, or the internet.

    The package contains the weights of its linear layers, version 0.1; the trunk is torchvision's.

    Returns:
        the module, which maps two batches of images in [-1, 1] to (B, 1, 1, 1), and the file of the trunk.

    Raises:
        WeightsError: the package lpips is not installed, or the weights are missing, damaged or of another network.
    """
    try:
        import lpips
    except ImportError:
        raise WeightsError("It needs the package lpips: pip install 'pecobook[evaluate]'.") from None
    import torchvision

    name, published = _TRUNKS[network]
    url = f"https://download.pytorch.org/models/{published}"
    path = Path(file).expanduser() if file else _downloaded((published,), url, "--lpips-weights")
    trunk: nn.Module = getattr(torchvision.models, name)(weights=None)
    load_state(trunk, read_weights(str(path)), source=str(path), needs_head=False)
    with warnings.catch_warnings():  # about deprecated torchvision arguments, which lpips passes
        warnings.simplefilter("ignore")
        module: Any = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    features = trunk.features.state_dict()  # type: ignore[union-attr]
    # lpips cuts the features into slices and keeps the number of each layer.
    named = {key: features[key.partition(".")[2]] for key in module.net.state_dict()}
    module.net.load_state_dict(named)
    return module.eval().requires_grad_(False), _weights_file(path, Path(published).stem.rpartition("-")[2])


def _weights_file(path: Path, start: str) -> WeightsFile:
    """Return a file with its hash; `start` is the beginning of the original's hash."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return WeightsFile(path.name, digest, digest.startswith(start))


def _downloaded(names: tuple[str, ...], url: str, flag: str) -> Path:
    """Return a file in torch's download folder; if there is none, download the first one. Raises WeightsError."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    target = folder / names[0]
    start = target.stem.rpartition("-")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=start, progress=False)
    except (OSError, RuntimeError) as error:  # no network, or another file
        reason = first_line(error).strip("<>").rstrip(".")
        text = f"The weights {names[0]} cannot be downloaded ({reason})."
        raise WeightsError(f"{text} Fetch {url} elsewhere, and give {flag} FILE.") from None
    return target
