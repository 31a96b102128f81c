"""The contents of a batch: all keys, written by views, companions, the loader and the loop, and their readers."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Named tensors of B images; a batch contains the keys that the stage's view makes.

    Tensors of equal shapes are stacked; tensors whose shapes differ between images form a list, under a plural name.
    Shapes: C channels, S side of a square view, (h, w) a grid of patches or any other varying size.
    """

    # ------------------------------------------------------------------------------------------------------- pictures

    image: Tensor
    """uint8 (B, C, S, S): images for codebook, pretrain, finetune, segment in training and contrast in evaluation; for
    finetune with --clip.frames T (B, T, C, S, S), or with three crops in evaluation (B, 3, T, C, S, S)."""
    images: list[Tensor]
    """uint8 (3, h, w) each: one per image for detect, one per scale of --test.scales for segment in evaluation."""
    view0: Tensor
    """uint8 (B, 3, S, S): the first view of contrast."""
    view1: Tensor
    """uint8 (B, 3, S, S): the second view of contrast."""
    other: Tensor
    """uint8 (B, 3, S, S): the second view of codebook with --explicit.kind contrastive."""
    colour: Tensor
    """float32 (B, 9) in [0, 1): random numbers for `photometric` on `image`, for pretrain and segment in training."""
    colour0: Tensor
    """float32 (B, 9) in [0, 1): random numbers for `photometric` on `view0`, for contrast."""
    colour1: Tensor
    """float32 (B, 9) in [0, 1): random numbers for `photometric` on `view1`, for contrast."""

    # ------------------------------------------------------------------------------------------------- what is learned

    label: Tensor
    """int64 (B,): class in [0, classes), if the data has labels, for finetune, codebook with --explicit.kind
    classification, and contrast in evaluation."""
    mask: Tensor
    """bool (B, h, w): True for a masked patch, for pretrain. int16 (B, S, S): the class of each pixel, `IGNORE` for
    ignored pixels, for segment in training."""
    masks: list[Tensor]
    """uint8 (n, h, w) each, 0 or 1: masks of the n objects of an image, if there are masks, for detect in training.
    int16 (h, w) each: the class of each pixel of an uncropped image, for segment in evaluation."""
    codes: Tensor
    """int64 (B, h, w) in [0, K): codes from a token bank, for pretrain."""
    boxes: list[Tensor]
    """float32 (n, 4) each: left, top, right, bottom in pixels of the view, for detect in training."""
    labels: list[Tensor]
    """int64 (n,) each: classes of the objects, counted from 1, for detect in training."""
    size: Tensor
    """int64 (B, 2): height and width of the original images, for detect in evaluation."""

    # --------------------------------------------------------------------------------------------------- of the loader

    index: Tensor
    """int64 (B,): indices of the images in the source, under which finetune and detect report their predictions."""
    replaced: Tensor
    """bool (B,): whether an image replaces an unreadable image; evaluation counts it only once."""
    skipped: list[str]
    """Descriptions of unreadable images, which the loop and the evaluation report; stages do not receive this key."""

    # ----------------------------------------------------------------------------------------- of loop and evaluation

    repeated: Tensor
    """bool (B,): whether an image was already counted in the evaluation, so that finetune and segment skip it."""
    probe: bool
    """Whether the stage only returns the features of these images (`engine.probing`), for contrast and pretrain."""
    ahead: bool
    """Whether the stage only computes the keys of these images (`engine.ahead`), for contrast and codebook."""
    keys: Tensor
    """float (N, D): keys of all N images of a step on this rank, those of the batch first, for codebook."""
    reconstruction: Tensor
    """float (N,): reconstruction loss, the mean over N images of a step on this rank, for codebook with --balance."""
    keys0: Tensor
    """float (N, D): keys of the first views of all N images of a step on this rank, for contrast."""
    keys1: Tensor
    """float (N, D): keys of the second views of all N images of a step on this rank, for contrast."""
