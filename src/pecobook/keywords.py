"""Typed keywords of the training functions, for editors; `python -m tests.keywords` writes this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

Text: TypeAlias = str | Path | float
"""A text, a path, or a number that stands for itself."""


class ImagesKeywords(TypedDict, total=False):
    data: Any
    value_range: Sequence[float | Text]


class TrackingKeywords(TypedDict, total=False):
    project: Text
    entity: Text
    group: Text
    tags: Sequence[Text]
    offline: bool


class BaseOptimKeywords(TypedDict, total=False):
    name: Literal["adamw", "adam", "lars"]
    lr: float
    lr_batch_size: int
    final_lr: float
    schedule: Literal["cosine", "poly", "steps", "constant"]
    cooldown: Text
    power: float
    milestones: Sequence[Text]
    warmup: Text
    weight_decay: float
    betas: Sequence[float]
    eps: float
    clip_grad: float


class TrainKeywords(ImagesKeywords, total=False):
    out: Text
    seed: int
    devices: Text
    num_nodes: int
    strategy: Literal["auto", "ddp", "fsdp"]
    communication: Literal["fp32", "bf16"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    attention: Literal["sdpa", "triton"]
    batch_size: int
    micro_batch_size: int
    max_steps: Text
    image_size: int
    workers: int
    shuffle_window: int
    loggers: Sequence[Text]
    tracking: TrackingKeywords
    log_every: int
    save_every: int
    save_minutes: float
    keep_checkpoints: int
    sample_every: int
    evaluation_images: int
    deterministic: bool
    init: Text
    optim: BaseOptimKeywords
    resume: bool | Literal["auto"]
    overwrite: bool
    verify_data: bool
    accept_data_change: bool
    dry_run: bool
    transform: Callable[[Any], Any] | None
    on_step: Callable[[Any], object] | None


class CompileTrainKeywords(TrainKeywords, total=False):
    compile: bool
    compile_mode: Literal["default", "max-autotune"]


class CropTrainKeywords(CompileTrainKeywords, total=False):
    min_crop: float


class ProbedTrainKeywords(CropTrainKeywords, total=False):
    probe_data: Text
    probe_every: int
    probe_images: int


class BackboneKeywords(TypedDict, total=False):
    name: Text
    args: Text


class JitterKeywords(TypedDict, total=False):
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter: float
    grey: float


class ContrastKeywords(ProbedTrainKeywords, total=False):
    model: BackboneKeywords
    momentum: float
    temperature: float
    hidden_dim: int
    output_dim: int
    freeze_patch_embed: bool
    fixed_positions: bool
    colour: JitterKeywords
    blur: Sequence[float]
    solarise: Sequence[float]
    knn_images: int


class AutoencoderKeywords(TypedDict, total=False):
    channels: Sequence[int]
    latent_dim: int
    num_blocks: int
    in_channels: int
    kind: Literal["cnn", "vit"]
    num_heads: int
    decoder_width: float
    decoder_blocks: int
    group_size: int
    padding: Literal["zeros", "reflect", "replicate"]
    latent_norm: bool


class VectorQuantizerKeywords(TypedDict, total=False):
    kind: Literal["ema", "gradient", "fsq", "simvq", "lfq", "ibq"]
    levels: Sequence[int]
    entropy_weight: float
    entropy_temperature: float
    num_codewords: int
    decay: float
    eps: float
    revive_after: int
    start_after: int
    normalise: bool
    precision: Literal["fp32", "tf32", "bf16"]


class QuantizerKeywords(VectorQuantizerKeywords, total=False):
    commitment: float


class PerceptualDistanceKeywords(TypedDict, total=False):
    network: Any
    weights: Text
    shuffle: bool
    layers: Sequence[int | Text]
    normalisation: Literal["unit-rms", "layernorm", "none"]
    input_size: int
    mean: Sequence[float]
    std: Sequence[float]
    bgr: bool


class PerceptualKeywords(PerceptualDistanceKeywords, total=False):
    weight: float
    also: Sequence[Text]
    warmup: int


class AdversarialKeywords(TypedDict, total=False):
    weight: float
    width: int
    num_layers: int
    start: int


class ExplicitKeywords(TypedDict, total=False):
    kind: Literal["none", "classification", "contrastive"]
    weight: float
    temperature: float
    momentum: float
    hidden_dim: int
    output_dim: int


class TargetKeywords(TypedDict, total=False):
    layer: Text
    weights: Text
    input_size: int


class CodebookKeywords(CropTrainKeywords, total=False):
    model: AutoencoderKeywords
    quantizer: QuantizerKeywords
    perceptual: Any
    adversarial: AdversarialKeywords
    explicit: ExplicitKeywords
    target_features: Text
    target: TargetKeywords
    pixel_weight: float
    balance: bool


class ResidualKeywords(TypedDict, total=False):
    residual: Literal["fp32", "bf16"]


class DecoderKeywords(TypedDict, total=False):
    depth: int
    width: int
    num_heads: int


class MaskKeywords(TypedDict, total=False):
    kind: Literal["block", "random"]
    num_masked: int
    min_block: int


class PhotometricKeywords(JitterKeywords, total=False):
    blur: float
    solarise: float


class PretrainKeywords(ProbedTrainKeywords, ResidualKeywords, total=False):
    tokenizer: Any
    tokens: Text
    target: Literal["tokens", "pixels"]
    tokenizer_size: int
    visible_only: bool
    decoder: DecoderKeywords
    model: BackboneKeywords
    drop_path: float
    mask: MaskKeywords
    colour: PhotometricKeywords


class StartKeywords(TypedDict, total=False):
    backbone: Any
    weights: Text
    drop_path: float


class NormalisationKeywords(TypedDict, total=False):
    mean: Sequence[float]
    std: Sequence[float]


class OptimKeywords(BaseOptimKeywords, total=False):
    layer_decay: float


class ClipKeywords(TypedDict, total=False):
    frames: int
    sampling: Literal["stride", "segments"]
    stride: int
    flip: bool
    crops: int


class FinetuneKeywords(CropTrainKeywords, StartKeywords, NormalisationKeywords, ResidualKeywords, total=False):
    mixup: float
    cutmix: float
    label_smoothing: float
    rand_augment: Text
    random_erasing: float
    repeats: int
    average: float
    eval_crop: float
    head_rate: float
    clip: ClipKeywords
    optim: OptimKeywords  # type: ignore[misc]


class SegmenterKeywords(TypedDict, total=False):
    head_width: int
    auxiliary_width: int
    auxiliary_weight: float
    dropout: float


class PyramidKeywords(TypedDict, total=False):
    window: int
    checkpointing: bool
    frozen: bool


class SegmentTestKeywords(TypedDict, total=False):
    mode: Text
    stride: float
    max_side: int
    scales: Sequence[float]
    flip: bool


class SegmentKeywords(CompileTrainKeywords, SegmenterKeywords, StartKeywords, NormalisationKeywords, total=False):
    classes: Text
    mask_values: Sequence[Text]
    ignore: Sequence[Text]
    verify: bool
    skip_bad: bool
    pyramid: PyramidKeywords
    scales: Sequence[float]
    max_share: float
    colours: PhotometricKeywords
    test: SegmentTestKeywords
    optim: OptimKeywords  # type: ignore[misc]


class DetectorKeywords(TypedDict, total=False):
    width: int
    head_width: int
    proposals: int
    samples: int
    detections: int
    score_threshold: float


class DetectKeywords(TrainKeywords, StartKeywords, NormalisationKeywords, total=False):
    skip_bad: bool
    masks: bool
    pyramid: PyramidKeywords
    detector: DetectorKeywords
    scales: Sequence[int]
    max_size: int
    jitter: Sequence[float]
    optim: OptimKeywords  # type: ignore[misc]
