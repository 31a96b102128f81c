"""What a batch holds: all keys that views, companions, the loader and the loop put into one, and who reads them."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Named tensors of B images; a stage finds those that its view makes.

    Tensors of one shape are stacked. What differs in shape from image to image comes as a list, under a plural. C
    channels, S side of a square view, h w of a grid of patches or of whatever else differs.
    """

    # ------------------------------------------------------------------------------------------------------- pictures

    image: Tensor
    """uint8 (B, C, S, S): codebook, pretrain, finetune, segment in training; contrast compares by it in evaluation."""
    images: list[Tensor]
    """uint8 (3, h, w) each: of detect one an image, of segment in evaluation one for each of --test.scales."""
    view0: Tensor
    """uint8 (B, 3, S, S): contrast's first view."""
    view1: Tensor
    """uint8 (B, 3, S, S): contrast's second view."""
    other: Tensor
    """uint8 (B, 3, S, S): the second view of codebook with --explicit.kind contrastive."""
    colour: Tensor
    """float32 (B, 9) in [0, 1): draws of `photometric` for `image`, of pretrain and of segment in training."""
    colour0: Tensor
    """float32 (B, 9) in [0, 1): those for `view0`, of contrast."""
    colour1: Tensor
    """float32 (B, 9) in [0, 1): those for `view1`, of contrast."""

    # ------------------------------------------------------------------------------------------------- what is learned

    label: Tensor
    """int64 (B,), the class in [0, classes), where the data has labels: finetune, codebook with --explicit.kind
    classification, contrast in evaluation."""
    mask: Tensor
    """bool (B, h, w), True where pretrain hides a patch; int16 (B, S, S), segment's classes in training, `IGNORE` where
    none counts."""
    masks: list[Tensor]
    """uint8 (n, h, w) each, 0 or 1: the n objects of an image, of detect in training where they have masks.
    int16 (h, w) each: classes of whole images, of segment in evaluation."""
    codes: Tensor
    """int64 (B, h, w) in [0, K): of a token bank, for pretrain."""
    boxes: list[Tensor]
    """float32 (n, 4) each, left, top, right, bottom in pixels of the view: detect in training."""
    labels: list[Tensor]
    """int64 (n,) each, classes of the objects from 1: detect in training."""
    size: Tensor
    """int64 (B, 2), height and width of the original images: detect in evaluation."""

    # --------------------------------------------------------------------------------------------------- of the loader

    index: Tensor
    """int64 (B,), numbers of the images in their source: what finetune and detect report goes by them."""
    replaced: Tensor
    """bool (B,), whether an image stands in for one that cannot be read: evaluation counts it once."""
    skipped: list[str]
    """What could not be read: the loop and evaluation list it. It stays on the host; stages do not see it."""

    # ----------------------------------------------------------------------------------------- of loop and evaluation

    repeated: Tensor
    """bool (B,), in evaluation, whether an image was counted already: finetune and segment leave it out."""
    ahead: bool
    """Whether the stage is asked for the keys of these images alone (`engine.ahead`): contrast, codebook."""
    keys: Tensor
    """float (N, D): codebook's keys of all N images of a step on this rank, the batch's own first."""
    keys0: Tensor
    """float (N, D): the same of contrast, of the first view."""
    keys1: Tensor
    """float (N, D): the same of contrast, of the second view."""
