"""Settings of every command: frozen, keyword-only dataclasses whose fields explain themselves.

A recipe (`pecobook.recipes`) is one of these with its values filled in; the command line and Python keywords replace
single values; `dump` writes what a run resolved to, and `load` reads it back. Nothing is ever built from a string.

Durations (`max_steps`, `warmup`) are written in the unit people think in: "5000" (steps), "100 epochs",
"25600 images" or, for a part of the training, "5%". `steps` converts them once, at the border.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pecobook.errors import ConfigError, did_you_mean

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Strategy = Literal["auto", "ddp", "fsdp"]
C = TypeVar("C")

# Fields that change where or how fast a run goes, but not what it computes: a resumed run may change them.
FREE_ON_RESUME = frozenset(
    {
        *("out", "resume", "overwrite", "devices", "num_nodes", "strategy", "micro_batch_size", "workers"),
        *(
            "loggers",
            "log_every",
            "save_every",
            "save_minutes",
            "keep_checkpoints",
            "sample_every",
            "evaluation_images",
            "knn_images",
            "compile",
        ),
        *("test.mode", "test.stride", "test.scales", "test.flip"),  # not test.max_side, which training images follow
        "pyramid.checkpointing",
    }
)


def positive(config: object, *names: str) -> None:
    """Raise ConfigError for every named field of `config` that is not above zero."""
    for name in names:
        if not getattr(config, name) > 0:  # so that nan is refused too
            raise ConfigError(f"--{flag(name)} must be above 0, not {getattr(config, name)}.")


def between(config: object, low: float, high: float, *names: str) -> None:
    """Raise ConfigError for every named field of `config` outside [low, high]."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"--{flag(name)} must lie in [{low:g}, {high:g}], not {getattr(config, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and its schedule."""

    name: Literal["adamw", "adam", "lars"] = "adamw"
    """Optimizer. lars (You et al., arXiv 1708.03888) is for convolutional networks at very large batches."""
    lr: float = 1.5e-3
    """Peak learning rate, after the warm-up."""
    lr_batch_size: int = 0
    """Global batch that lr is meant for: with another --batch-size it changes in proportion. 0 takes lr as it is."""
    final_lr: float = 0.0
    """Learning rate at the last step of a cosine or poly schedule."""
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    """After the warm-up: half a cosine, the share left to --optim.power, or a tenth at each of --optim.milestones."""
    power: float = 1.0
    """Of the poly schedule; 1 falls in a straight line."""
    milestones: tuple[str, ...] = ()
    """Where the steps schedule divides the learning rate by ten: steps, "N epochs", "N images" or "N%"."""
    warmup: str = "5%"
    """Length of the linear warm-up from 0: steps, "N epochs", "N images" or "N%" of the training."""
    weight_decay: float = 0.05
    """Decoupled weight decay; never on biases, norms, position tables or the mask token."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments; of lars, the first is the momentum."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer to the one below it; 1 gives all layers the same."""

    def __post_init__(self) -> None:
        positive(self, "lr", "eps", "power")
        between(self, 0, float("inf"), "lr_batch_size")
        for text in self.milestones:
            parse_duration(text, "optim.milestones")
        between(self, 0.0, 1.0, "layer_decay")
        between(self, 0.0, float("inf"), "final_lr", "weight_decay", "clip_grad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training command has."""

    data: str = "photos"
    """Images: a folder, a parquet file or folder, tar shards, hf:owner/name, or photos (embedded)."""
    out: str = ""
    """Run folder to write. It must be new or empty, unless --resume or --overwrite is given."""
    seed: int = 0
    """Everything random follows from it: weights, order, crops, masks, dropout."""
    devices: str = "auto"
    """Devices on each machine: a number, or auto for every GPU (one process on a machine without one)."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """How processes share the model: ddp copies it, fsdp shards it. auto is ddp when there are several."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16 autocast. auto is bf16 where the hardware multiplies it natively, else fp32."""
    batch_size: int = 256
    """Images in one optimizer step, over all devices and accumulation steps."""
    micro_batch_size: int = 0
    """Most images a device holds at once; the rest of its share is accumulated. 0 takes the share whole."""
    max_steps: str = "100 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    image_size: int = 224
    """Side of the square views that the model sees, in pixels."""
    min_crop: float = 0.2
    """Smallest share of an image's area that a random crop takes."""
    workers: int = -1
    """Data-loading processes of each device; -1 chooses from the number of cores."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: any of tensorboard, wandb, mlflow."""
    log_every: int = 10
    """Steps between logged metrics."""
    save_every: int = 1000
    """Steps between checkpoints."""
    save_minutes: float = 15.0
    """Minutes after which a checkpoint is written in any case."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    sample_every: int = 1000
    """Steps between evaluations and pictures in samples/."""
    evaluation_images: int = 1024
    """Most held-out images looked at in each evaluation."""
    compile: bool = False
    """Compile the stage with torch.compile."""
    deterministic: bool = False
    """On a GPU, take only kernels that give the same bits each time, as far as PyTorch has them, so that a run can be
    repeated and resumed to the same weights; slower. A CPU always does."""
    optim: OptimConfig = OptimConfig()
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    overwrite: bool = False
    """Delete what is in --out first."""

    def __post_init__(self) -> None:
        positive(self, "num_nodes", "batch_size", "image_size", "log_every", "save_every", "save_minutes")
        positive(self, "keep_checkpoints", "sample_every", "min_crop", "evaluation_images")
        between(self, 0.0, 1.0, "min_crop")
        between(self, 0, 2**31 - 1, "seed")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise ConfigError(f"--devices must be a number above 0 or auto, not '{self.devices}'.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other: give one of them.")
        for name in self.loggers:
            if name not in ("tensorboard", "wandb", "mlflow"):
                raise ConfigError(f"--loggers knows tensorboard, wandb and mlflow, not '{name}'.")
        parse_duration(self.max_steps, "max-steps")
        if self.max_steps.strip().endswith("%"):
            raise ConfigError(f"--max-steps is the whole training: give steps or epochs, not {self.max_steps}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A network of timm, by name and arguments."""

    name: str = "beit_base_patch16_224"
    """Name of a timm network."""
    args: str = "{}"
    """Further arguments of timm.create_model, as a JSON object."""

    def __post_init__(self) -> None:
        self.kwargs()

    def kwargs(self) -> dict[str, Any]:
        """The arguments as a dictionary. Raises ConfigError when they are no JSON object."""
        try:
            value = json.loads(self.args)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--model.args is not JSON ({error}): {self.args}") from None
        if not isinstance(value, dict):
            raise ConfigError(f'--model.args must be a JSON object such as {{"depth": 6}}, not {self.args}')
        return value


# ---------------------------------------------------------------------------------------------------------- durations

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(|steps?|epochs?|ep|images?|%)\s*$", re.IGNORECASE)


def parse_duration(text: str, name: str) -> tuple[float, str]:
    """Split "100 epochs" into (100.0, "epochs"). Raises ConfigError naming the flag `name`."""
    match = _DURATION.match(str(text))
    if not match:
        raise ConfigError(f"--{name} is '{text}': give steps (5000), epochs ('100 epochs') or images ('25600 images').")
    unit = match[2].lower()
    units = {"": "steps", "step": "steps", "epoch": "epochs", "ep": "epochs", "image": "images"}
    return float(match[1]), units.get(unit, unit)


def steps(text: str, *, num_images: int, batch_size: int, total: int | None = None, name: str = "max-steps") -> int:
    """Convert a duration to optimizer steps, at least 1 unless it is zero.

    Args:
        text: the duration, for example "100 epochs".
        num_images: images in one epoch.
        batch_size: images in one step, over all devices.
        total: steps of the whole training, which "N%" refers to.
        name: the flag, for the error.
    """
    value, unit = parse_duration(text, name)
    if unit == "%" and total is None:
        raise ConfigError(f"--{name} cannot be a percentage.")
    count = {
        "steps": value,
        "epochs": value * num_images / batch_size,
        "images": value / batch_size,
        "%": value / 100 * (total or 0),
    }[unit]
    return max(round(count), 1) if value > 0 else 0


# ----------------------------------------------------------------------------------------- reading, writing, comparing


def flag(name: str) -> str:
    """Name of a field on the command line."""
    return name.replace("_", "-")


def flags(config_type: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every flag of a configuration and the type of its value, nested ones with dots (`optim.lr`)."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        name = prefix + flag(field.name)
        if dataclasses.is_dataclass(kind):
            found |= flags(typing.cast("type[Any]", kind), name + ".")
        else:
            found[name] = kind
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists)."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def replace(config: C, changes: dict[str, Any]) -> C:
    """A copy of `config` with `changes`: nested dictionaries and dotted names both work.

    Raises ConfigError for an unknown name or a value of the wrong type.
    """
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict) and isinstance(nested.get(head), dict):
            value = {**nested[head], **value}
        nested[head] = value
    hints = typing.get_type_hints(type(config))
    values: dict[str, Any] = {}
    for name, value in nested.items():
        if name not in hints:
            raise ConfigError(f"Unknown setting '{name}'.{did_you_mean(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ConfigError(f"--{flag(name)} is a group of settings, not '{value}': set those in it.")
            values[name] = replace(getattr(config, name), value)
        else:
            values[name] = coerce(value, hints[name], name)
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def coerce(value: Any, kind: Any, name: str) -> Any:
    """Check a plain value (from JSON, Python or a flag's text) against a field's type and convert it.

    Raises ConfigError that names the flag, the value and what it takes.
    """
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        options = [str(option) for option in get_args(kind)]
        raise ConfigError(
            f"--{flag(name)} is one of {', '.join(options)}, not '{value}'.{did_you_mean(str(value), options)}"
        )
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        inner = get_args(kind)
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ConfigError(f"--{flag(name)} takes {len(inner)} values, not {len(items)}.")
        return tuple(coerce(item, inner[0], name) for item in items)
    if origin in (typing.Union, types.UnionType):  # the first kind that takes the value; the last one's error
        *others, last = [a for a in get_args(kind) if a is not type(None)]
        for other in others:
            with contextlib.suppress(ConfigError):
                return coerce(value, other, name)
        return None if value is None and type(None) in get_args(kind) else coerce(value, last, name)
    return _coerce_scalar(value, kind, name)


def _coerce_scalar(value: Any, kind: Any, name: str) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, str | int | float | Path) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"--{flag(name)} takes {words.get(kind, str(kind))}, not '{value}'.")


def dump(config: Any, path: Path) -> None:
    """Write `config` as JSON that `load` and `--config` read."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(default: C, path: str | Path) -> C:
    """Read a config.json over `default`. Raises ConfigError when it is missing, broken or of another command."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file '{file}'.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"'{file}' cannot be read as a configuration: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"'{file}' is not a configuration: it must hold a JSON object.")
    values.pop("command", None)
    return replace(default, values)


def complete(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, with the defaults of those that it did not know."""
    found = defaults | old
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            found[name] = complete(old[name], value)
    return found


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines such as `optim.lr: 0.001 -> 0.01` for every setting that a resumed run may not change."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after, full = old.get(name), new.get(name), prefix + name
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{full}.")
        elif before != after and full not in FREE_ON_RESUME:
            lines.append(f"{flag(full)}: {before} -> {after}")
    return lines
