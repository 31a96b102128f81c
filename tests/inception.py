"""FID's Inception with random weights: no weights can be downloaded in tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict of torch-fidelity's Inception under the public names, whose activations keep their scale."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None: ...  # an empty file is read, and nothing is taken of it

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        torch.save({}, Path(folder) / "none.pth")
        network = Untrained("random", ["2048"], feature_extractor_weights_path=str(Path(folder) / "none.pth"))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    state: dict[str, Tensor] = network.state_dict()
    return state
