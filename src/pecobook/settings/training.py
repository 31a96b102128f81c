"""Settings shared by every training command, and those of its optimizer."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, cast

from pecobook.errors import ConfigError, first_line
from pecobook.settings.durations import check_durations
from pecobook.settings.images import MAX_BATCH, MAX_IMAGE_SIZE, MAX_WORKERS, ImagesConfig
from pecobook.settings.tracking import TrackingConfig
from pecobook.settings.values import (
    LARGEST,
    Resume,
    below_one,
    between,
    different,
    narrow,
    not_negative,
    positive,
    refuse,
    settings_class,
)
from pecobook.utils.json_files import parse_json

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Strategy = Literal["auto", "ddp", "fsdp"]
AttentionKernel = Literal["sdpa", "triton"]


@settings_class
class BaseOptimConfig:
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "adam", "lars"] = "adamw"
    """Name of the optimizer. lars (You et al., arXiv 1708.03888) is for convolutional networks with very large
    batches."""
    lr: float = 1.5e-3
    """Peak learning rate, after the warm-up."""
    lr_batch_size: int = 0
    """Global batch size that --optim.lr refers to: the learning rate is scaled linearly with --batch-size. 0 does not
    scale it."""
    final_lr: float = 0.0
    """Learning rate at the end of a cosine or poly schedule, or of a cooldown. The schedule would reach it one step
    after the last, so the last step uses a slightly higher rate."""
    schedule: Literal["cosine", "poly", "steps", "constant"] = "cosine"
    """Learning rate schedule after the warm-up: cosine, half a cosine; poly, the remaining share of the training to the
    power of --optim.power; steps, divided by ten at each of --optim.milestones; constant, unchanged until
    --optim.cooldown. A run with a constant schedule can be extended after its end: --resume --max-steps MORE."""
    cooldown: str = "0"
    """Length of the linear decay to --optim.final-lr at the end of a constant schedule: steps, "N epochs", "N images"
    or "N%" of the training. The checkpoint at the start of the cooldown is kept, so that the run can be extended from
    there."""
    power: float = 1.0
    """Exponent of the poly schedule; 1 makes the learning rate decay linearly."""
    milestones: tuple[str, ...] = ()
    """Times at which the steps schedule divides the learning rate by ten: steps, "N epochs", "N images" or "N%"."""
    warmup: str = "5%"
    """Length of the linear warm-up from 0: steps, "N epochs", "N images" or "N%" of the training."""
    weight_decay: float = 0.05
    """Weight decay: adamw decouples it from the gradient, adam and lars add it to the gradient. It does not apply to
    biases, norms, position tables and the mask token."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments; for lars the first number is the momentum."""
    eps: float = 1e-8
    """Epsilon that Adam adds to the root of the second moment."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; a larger gradient is scaled down to it. 0 does not clip."""

    def __post_init__(self) -> None:
        positive(self, "lr", "eps", "power")
        not_negative(self, "lr_batch_size", "final_lr", "weight_decay", "clip_grad")
        below_one(self, "betas")
        for name in ("warmup", "cooldown"):
            check_durations(name, [getattr(self, name)], percent=True)
        if self.schedule == "constant" and "%" in self.warmup:
            refuse(
                "warmup", f"is {self.warmup} of a length that may change later: for a constant schedule, give steps."
            )
        if self.schedule != "constant" and self.cooldown != "0":
            refuse("cooldown", f"belongs to --optim.schedule constant, not to {self.schedule}: leave it out.")
        check_durations("milestones", self.milestones, percent=True)

    @property
    def layer_decay(self) -> float:
        """Factor on the learning rate from each layer to the one below; here 1, the same rate for all layers."""
        return 1.0


@settings_class
class OptimConfig(BaseOptimConfig):
    """The optimizer and its schedule, with layer-wise learning rates for a pre-trained backbone."""

    layer_decay: float = 1.0
    """Factor on the learning rate from each layer to the one below; 1 gives all layers the same rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "layer_decay")


@settings_class
class StartConfig:
    """The backbone that supervised training starts from."""

    backbone: str = ""
    """The backbone to start from: a pretrain, contrast or finetune run, or timm:NAME."""
    weights: str = ""
    """A local file of weights for the backbone, or random to train from scratch: all its layers then share one learning
    rate unless --optim.layer-decay is given too. If empty, the weights of --backbone."""
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; earlier blocks are skipped less often."""

    def __post_init__(self) -> None:
        between(self, 0.0, 1.0, "drop_path")
        if getattr(self, "init", "") and (self.backbone or self.weights):
            raise ConfigError(
                "--init takes the backbone and the head of a run of this command: leave --backbone and --weights out, "
                "or give --backbone alone to start with a new head."
            )

    @staticmethod
    def implied(changes: dict[str, Any]) -> dict[str, Any]:
        """Return the settings implied by `changes`, which apply unless `changes` sets them.

        Layer decay preserves what the lower layers of a trained network have learned. Random weights hold nothing to
        preserve, and a decay would leave the lower layers almost untrained.
        """
        return {"optim.layer_decay": 1.0} if changes.get("weights") == "random" else {}


def check_devices(config: Any) -> None:
    """Refuse `devices` unless it is a number above 0 or auto."""
    is_number = re.fullmatch("[0-9]{1,10}", config.devices) and 0 < int(config.devices) <= LARGEST
    if config.devices != "auto" and not is_number:
        refuse("devices", f"must be a number above 0 or auto, not '{config.devices}'.")


@settings_class
class TrainConfig(ImagesConfig):
    """The settings shared by every training command."""

    out: str = ""
    """Run folder to write. It must be new or empty, unless --resume or --overwrite is given."""
    seed: int = 0
    """Seed of everything random: weights, image order, crops, masks, dropout."""
    devices: str = "auto"
    """Number of devices per machine, or auto for every GPU. On a machine without a GPU, auto is one process."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: Strategy = "auto"
    """How the model is distributed: ddp replicates it in every process, fsdp shards it. auto is ddp if there are
    several processes."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Precision of communication between processes: bf16 halves the traffic; it rounds the gradients before they are
    summed under ddp, and the weights gathered in each pass under fsdp."""
    precision: Precision = "auto"
    """Autocast precision: fp32, bf16 or fp16. auto is bf16 on hardware where it is faster, otherwise fp32."""
    attention: AttentionKernel = "sdpa"
    """Attention kernel on a GPU under bf16 or fp16: sdpa, PyTorch's; triton, ours for learned relative positions
    (BEiT's) of up to 256 tokens, which sums the gradient of the positions over images before writing it."""
    batch_size: int = 256
    """Number of images in one optimizer step, shared by all devices and accumulation steps."""
    micro_batch_size: int = 0
    """Largest number of images that a device processes at once. Gradients are accumulated over a device's share of the
    batch; 0 processes the share at once."""
    max_steps: str = "100 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    image_size: int = 224
    """Side of the square views that the model sees, in pixels."""
    workers: int = -1
    """Number of data-loading processes per device. -1 chooses it from the number of cores."""
    shuffle_window: int = 0
    """Number of images that are shuffled together, read as 32 runs of neighbouring images. 0 shuffles each epoch as a
    whole; a few thousand suit storage with slow random access: object storage, NFS, spinning disks."""
    loggers: tuple[str, ...] = ("auto",)
    """Loggers in addition to metrics.jsonl: any of tensorboard, wandb, mlflow. auto is tensorboard if it is
    installed."""
    tracking: TrackingConfig = TrackingConfig()
    log_every: int = 10
    """Number of steps between logged metrics."""
    save_every: int = 1000
    """Number of steps between checkpoints."""
    save_minutes: float = 15.0
    """Longest time between checkpoints, in minutes."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep. Older checkpoints are deleted."""
    sample_every: int = 1000
    """Number of steps between evaluations, which also write pictures to samples/."""
    evaluation_images: int = 1024
    """Largest number of held-out images in each evaluation."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU where PyTorch has them, so that a repeated or resumed run ends with exactly
    the same weights; this is slower. A CPU is always deterministic."""
    init: str = ""
    """Weights to start from instead of random ones: a run of this command. `contrast` and `pretrain` also take any
    other backbone (a run, timm:NAME, or a file of its weights), and `codebook` a file of a tokenizer's weights. The
    network, and the number of codewords, then come from --init unless they are given too."""
    optim: BaseOptimConfig = BaseOptimConfig()
    resume: Resume = False
    """Resume from the last checkpoint in --out. `--resume auto` starts a new run if there is none, so that one command
    line serves for the first start and for every restart."""
    overwrite: bool = False
    """Delete the contents of --out first."""
    verify_data: bool = False
    """Read all files of --data at the start, record their content, and compare it when the run resumes; without this
    flag, names, sizes and times are compared, and the content of a few files."""
    accept_data_change: bool = False
    """Resume even if the data have changed since the run began. The change is recorded in the run folder."""
    dry_run: bool = False
    """Report the run's data, settings, memory and time without writing anything. A few images are processed to measure
    this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        narrow(self)
        positive(self, "num_nodes", "log_every", "save_every", "save_minutes")
        positive(self, "keep_checkpoints", "sample_every", "evaluation_images")
        positive(self, "image_size", most=MAX_IMAGE_SIZE)
        positive(self, "batch_size", most=MAX_BATCH)
        between(self, 0, LARGEST, "micro_batch_size", "seed", "shuffle_window")
        between(self, -1, MAX_WORKERS, "workers")
        check_devices(self)
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other: give one of them.")
        for name in self.loggers:
            if name not in ("auto", "tensorboard", "wandb", "mlflow"):
                refuse("loggers", f"takes auto, tensorboard, wandb and mlflow, not '{name}'.")
        different(self, "loggers")
        check_durations("max_steps", [self.max_steps], percent=False)

    @property
    def compile(self) -> bool:
        """Whether the training step is compiled; here False, since not every command can compile its step."""
        return False

    @property
    def compile_mode(self) -> str:
        """How torch.compile chooses kernels."""
        return "default"


@settings_class
class CompileTrainConfig(TrainConfig):
    """The settings shared by every training command whose step torch.compile can compile."""

    compile: bool = False
    """Compile the training step with torch.compile."""
    compile_mode: Literal["default", "max-autotune"] = "default"
    """With --compile: max-autotune first tries many kernels for each matrix product and convolution, which takes
    minutes at the start and may save a few percent of a step on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile_mode != "default" and not self.compile:
            refuse("compile_mode", "has no effect without --compile: give both.")


@settings_class
class CropTrainConfig(CompileTrainConfig):
    """The settings shared by every training command that learns from random crops."""

    min_crop: float = 0.2
    """Smallest share of an image's area that a random crop takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "min_crop")
        between(self, 0.0, 1.0, "min_crop")


@settings_class
class ResidualConfig:
    """The residual stream of a transformer."""

    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision of the tokens passed between the blocks of a transformer under --precision bf16: bf16 takes less memory
    and time on a GPU, and rounds the sum after every block."""


@settings_class
class ProbedTrainConfig(CropTrainConfig):
    """The settings shared by every training command that learns features without labels."""

    probe_data: str = ""
    """Images, separate from --data, on which the features are evaluated during training: k-NN and linear accuracy if
    they have labels, and always the effective rank (RankMe). This does not change the weights."""
    probe_every: int = 0
    """Number of steps between these evaluations. 0 times the first one and chooses the number, so that they take less
    than 2% of the time."""
    probe_images: int = 1024
    """Largest number of training images, and of held-out images, taken from --probe-data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, LARGEST, "probe_every")
        positive(self, "probe_images")


@settings_class
class BackboneConfig:
    """A timm network, given by name and arguments."""

    name: str = "beit_base_patch16_224"
    """Name of a timm network."""
    args: str = "{}"
    """Additional arguments for timm.create_model, as a JSON object."""

    def __post_init__(self) -> None:
        try:
            value = parse_json(self.args)
        except (ValueError, RecursionError) as error:
            refuse("args", f"is not JSON ({first_line(error)}): {self.args[:300]}")
        else:
            if not isinstance(value, dict):
                refuse("args", f'must be a JSON object such as {{"depth": 6}}, not {self.args}')

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments as a dictionary."""
        return cast("dict[str, Any]", json.loads(self.args))
