"""Classifiers for reconstructions that do not depend on any codebook: a fine-tuned run, or a public CIFAR ResNet."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.checkpoints import load_state, read_weights
from pecobook.models.export import read_export
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, create_network


class CifarResNet(nn.Module):
    """He et al.'s CIFAR-10 ResNet (2016, section 4.2) with parameter-free shortcuts: (B, 3, 32, 32) to logits (B, 10).

    Args:
        depth: 20, 32, 44 or 56.
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(in_width, width), *(_Block(width, width) for _ in range(blocks - 1)))
            for in_width, width in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride, self.num_new_channels = channels // in_channels, channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut, num_new = x[:, :, :: self.stride, :: self.stride], self.num_new_channels
        return F.relu(hidden + F.pad(shortcut, (0, 0, 0, 0, num_new // 2, num_new - num_new // 2)))


class Judge(nn.Module):
    """A classifier that maps images float (B, 3, H, W) in [0, 1] to logits.

    Args:
        path: a run of `pecobook finetune`, or a file of weights of a CIFAR ResNet, whose number of layers gives the
            depth.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if Path(path).is_dir():
            config, state = read_export(path)
            self.network = create_network(config["name"], num_classes=len(config["classes"]), **config["args"])
            mean, std = config["mean"], config["std"]
        else:
            state = read_weights(path)
            count = sum(name.endswith("conv1.weight") and ".layer1." in name for name in state)
            self.network = CifarResNet(6 * count + 2)
        load_state(self.network, state, source=path)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)  # type: ignore[no-any-return, operator]

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the percentage of correctly classified images."""
        correct = torch.cat([self(batch).argmax(1) for batch in torch.split(images, 250)]) == labels
        return 100 * float(correct.float().mean())
