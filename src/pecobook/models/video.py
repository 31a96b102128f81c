"""Divided space-time attention (TimeSformer, arXiv 2102.05095): makes an image transformer read clips.

In each block, a patch first attends to the patches at its own position in all frames; then the image network's block
processes each frame. A clip has a single class token: after each branch of a block, its copies in the frames are
averaged. What is added starts at zero, so a clip of equal frames gives the image network's logits.

B clips of T frames each, N tokens per frame, of which the first P are not patches (class token, registers), D channels.
All frames of a batch go through the image network at once, clip by clip: (B T, N, D).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.export import Card
from pecobook.models.snippets import BEST_CLASSES, quoted
from pecobook.models.weights import Classifier
from pecobook.settings.images import ClipConfig
from pecobook.settings.values import replace
from pecobook.utils.images import as_images, channels_last


class TemporalAttention(nn.Module):
    """Adds to each patch its attention over the frames: (B T, N, D) to the same shape.

    Norm and attention start with the weights of the block's spatial attention, without its relative positions; the
    projection after them starts at zero, so nothing is added at first.

    Args:
        block: a block of a timm ViT or BEiT.
        frames: T.
        prefix: P; these tokens are left unchanged.
    """

    def __init__(self, block: Any, frames: int, prefix: int) -> None:
        super().__init__()
        spatial, self.frames, self.prefix, self.num_heads = block.attn, frames, prefix, block.attn.num_heads
        if not isinstance(getattr(spatial, "q_norm", nn.Identity()), nn.Identity) or getattr(spatial, "gate", None):
            raise WeightsError("its attention normalises queries or has gates, which attention over time lacks")
        self.norm, self.proj = copy.deepcopy(block.norm1), copy.deepcopy(spatial.proj)
        width, inner = spatial.qkv.in_features, spatial.qkv.out_features
        self.qkv, self.out = nn.Linear(width, inner), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        bias = spatial.qkv.bias
        if bias is None and getattr(spatial, "q_bias", None) is not None:  # BEiT's keys have no bias
            bias = torch.cat((spatial.q_bias, torch.zeros_like(spatial.q_bias), spatial.v_bias))
        with torch.no_grad():
            self.qkv.weight.copy_(spatial.qkv.weight)
            self.qkv.bias.copy_(torch.zeros(inner) if bias is None else bias)
        self.drop_path = copy.deepcopy(block.drop_path1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B T, N, D) with the attention over time added to the patches."""
        first, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        added = self.out(self.attend(self.norm(patches).unflatten(0, (-1, self.frames))))
        return torch.cat((first, patches + self.drop_path(added).flatten(0, 1)), 1)

    def attend(self, patches: Tensor) -> Tensor:
        """Return the attention of each patch over the frames, (B, T, N - P, D) to the same shape."""
        columns = patches.transpose(1, 2)  # (B, N - P, T, D)
        heads = self.qkv(columns).unflatten(-1, (3, self.num_heads, -1))  # (B, N - P, T, 3, heads, D / heads)
        query, key, value = heads.flatten(0, 1).permute(2, 0, 3, 1, 4)  # (B (N - P), heads, T, D / heads) each
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.proj(mixed).unflatten(0, columns.shape[:2]).transpose(1, 2)  # type: ignore[no-any-return]


class ClipBranch(nn.Module):
    """The end of a block's branch: what it adds to the class token is averaged over the frames of a clip.

    Stochastic depth drops the branch for all frames of a clip or for none.
    """

    def __init__(self, drop_path: nn.Module, frames: int, prefix: int) -> None:
        super().__init__()
        self.drop_path, self.frames, self.prefix = drop_path, frames, prefix

    def forward(self, added: Tensor) -> Tensor:
        """Map what the branch adds, (B T, N, D), to the same shape."""
        clips = added.view(-1, self.frames, *added.shape[1:])
        mean = clips[:, :, : self.prefix].mean(1, keepdim=True).expand(-1, self.frames, -1, -1)
        return self.drop_path(torch.cat((mean, clips[:, :, self.prefix :]), 2)).flatten(0, 1)  # type: ignore[no-any-return]


class DividedBlock(nn.Module):
    """Attention over time, followed by a block of the image network: (B T, N, D) to the same shape."""

    def __init__(self, block: Any, frames: int, prefix: int) -> None:
        super().__init__()
        self.temporal = TemporalAttention(block, frames, prefix)
        block.drop_path1 = ClipBranch(block.drop_path1, frames, prefix)
        block.drop_path2 = ClipBranch(block.drop_path2, frames, prefix)
        self.spatial = block

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply attention over time, then the block, which gets the other arguments (BEiT's shared positions)."""
        return self.spatial(self.temporal(tokens), *args, **kwargs)  # type: ignore[no-any-return]


class TimeEmbedding(nn.Module):
    """Adds a learned vector per frame, initially zero, to patches (B T, ..., D)."""

    def __init__(self, frames: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(frames, width))  # a name that gets no weight decay

    def forward(self, patches: Tensor) -> Tensor:
        """Return the patches with their frames' vectors added."""
        frames, width = self.pos_embed.shape
        places = self.pos_embed.view(frames, *(1,) * (patches.ndim - 2), width)
        return (patches.view(-1, frames, *patches.shape[1:]) + places).flatten(0, 1)


class ClipNetwork(nn.Module):
    """An image transformer with divided space-time attention, which maps clips to logits.

    Args:
        network: a timm ViT or BEiT; it is changed in place, and its head is kept.
        frames: T, the number of frames in a clip.

    Raises:
        WeightsError, AttributeError: the network is not one of timm's ViTs or BEiTs, or has unsupported blocks.
    """

    def __init__(self, network: Any, frames: int) -> None:
        super().__init__()
        if not hasattr(network, "num_prefix_tokens"):
            raise WeightsError("it is no transformer of patches. Choose a ViT or a BEiT.")
        self.frames, self.prefix = frames, int(network.num_prefix_tokens)
        patches = network.patch_embed
        for number, block in enumerate(list(network.blocks)):
            network.blocks[number] = DividedBlock(block, frames, self.prefix)
        patches.norm = nn.Sequential(patches.norm, TimeEmbedding(frames, network.embed_dim))
        self.image_network = network

    def forward(self, clips: Tensor) -> Tensor:
        """Map normalised clips (B, T, 3, H, W) to logits (B, C).

        Several crops of each clip, (B, V, T, 3, H, W), give the logarithm of their mean probability.
        """
        if clips.ndim == 6:
            each = self(clips.flatten(0, 1)).float().log_softmax(1).unflatten(0, clips.shape[:2])
            return each.logsumexp(1) - math.log(clips.shape[1])  # type: ignore[no-any-return]
        network: Any = self.image_network
        tokens = network.forward_features(channels_last(clips.flatten(0, 1))).unflatten(0, (-1, self.frames))
        first, patches = tokens[:, 0, : self.prefix], tokens[:, :, self.prefix :].flatten(1, 2)
        return network.forward_head(torch.cat((first, patches), 1))  # type: ignore[no-any-return]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the image network."""
        return [cast("DividedBlock", block).spatial for block in cast("Any", self.image_network).blocks]

    def reset_classifier(self, num_classes: int) -> None:
        """Give the network a new head, as timm's networks do."""
        self.image_network.reset_classifier(num_classes)

    def get_classifier(self) -> Any:
        """Return the head of the network."""
        return self.image_network.get_classifier()


def image_network(network: nn.Module) -> nn.Module:
    """Return the timm network in a `ClipNetwork`, or the network itself."""
    return network.image_network if isinstance(network, ClipNetwork) else network


class ClipClassifier(Classifier):
    """A video classifier, as `pecobook finetune --clip.frames T` exports it.

    Args:
        args: the arguments of `Classifier`.
        clip: which frames of a video the network reads, and how many crops of them.
        kwargs: other arguments of `Classifier`.
    """

    kind = "clip classifier"
    trained_by = "finetune with --clip.frames"

    def __init__(self, *args: Any, clip: ClipConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip = clip

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (B, T, 3, H, W), float in [0, 1] or uint8, to logits (B, C).

        Several crops of each clip, (B, V, T, 3, H, W), give the logarithm of their mean probability.

        Raises:
            ValueError: the shape, the type or the values are invalid.
        """
        if clips.ndim not in (5, 6) or clips.shape[-4] != self.clip.frames:
            raise ValueError(f"Clips must have the shape (B, {self.clip.frames}, 3, H, W), not {tuple(clips.shape)}.")
        images = as_images(clips.flatten(0, -4), (3,)).to(next(self.network.parameters()).dtype)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return self.network(((images - mean) / std).view(clips.shape))  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the classifier, including the frames of a clip."""
        return {**super().settings(), "clip": dataclasses.asdict(self.clip)}

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the network that `settings` describes, with random weights."""
        clip = replace(ClipConfig(), settings["clip"])
        model = super().rebuild({**settings, "clip": clip})
        model.network = ClipNetwork(model.network, clip.frames)
        return model

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the classifier from a folder or the hub and classifies one clip."""
        return f"""\
from pecobook import ClipClassifier, read_clip

model = ClipClassifier.from_pretrained({quoted(source)})
# "clip.mp4" is a video, or a folder of frames
crops = read_clip("clip.mp4", model.clip, model.image_size, crop=model.crop, value_range=model.value_range)
probabilities = model(crops[None]).softmax(1)[0].detach()
classes = model.classes
{BEST_CLASSES}"""

    def hub_loading_code(self, repo_id: str) -> str:
        """Return the same code for the repository `repo_id` on the hub."""
        return self.loading_code(repo_id)

    def card(self, origin: str) -> Card:
        """Return the model card: name, origin and expected input."""
        text = (
            f"Divided space-time attention on a network of timm, trained on clips of {self.clip.frames} frames of "
            f"{self.image_size} pixels."
        )
        card = super().card(origin)
        return dataclasses.replace(card, text=text, pipeline="video-classification", library="pecobook")
