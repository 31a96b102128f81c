"""Networks by name: timm's, or a backbone that a run of pecobook exported; and what an export folder holds.

An export folder is `model.safetensors`, `config.json` and `README.md`. Nothing here unpickles code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, did_you_mean, first_line
from pecobook.models.checkpoints import is_moco, load_state, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's default


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its head, and the input it was made for."""

    network: nn.Module
    """A timm network with `forward_features` and `forward_intermediates`."""
    name: str
    args: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None
    """Side it was trained at, pixels; None when any will do."""


def export_folder(path: str | Path) -> Path:
    """The export folder of a run, or the folder itself. Raises WeightsError when there is none."""
    folder = Path(path)
    for candidate in (folder / "export", folder):
        if (candidate / "model.safetensors").is_file() and (candidate / "config.json").is_file():
            return candidate
    if not folder.exists():
        raise WeightsError(f"There is no run '{path}'. Give a run folder of pecobook or timm:NAME.")
    raise WeightsError(
        f"'{path}' holds no export/model.safetensors: it is not a finished run. Finish it with --resume."
    )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of an export folder, without its weights. Raises WeightsError when it is missing or damaged."""
    folder = export_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
    except (OSError, ValueError) as error:
        raise WeightsError(f"The export in '{folder}' cannot be read: {error}") from None
    return config


def read_export(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of an export folder. Raises WeightsError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, folder = read_settings(path), export_folder(path)
    try:
        return config, load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The export in '{folder}' cannot be read: {error}") from None


def exported_network(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> nn.Module:
    """The timm network of an export, with its head where it has one, in evaluation mode.

    Raises:
        WeightsError: the weights are of another network; says so of `source`.
    """
    network = create(settings["name"], num_classes=len(settings.get("classes", ())), **settings["args"])
    load_state(network, state, source=source)
    return network.eval()


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save

    from pecobook.utils.files import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(file, save(own, metadata={"format": "pt"}))


def write_export(folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str) -> None:
    """Write an export folder."""
    from pecobook.utils.files import write_atomically

    write_tensors(folder / "model.safetensors", state)
    write_atomically(folder / "README.md", card.encode())
    # Last, since its presence makes the folder an export.
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


_CARD = """---
library_name: timm
tags: [pecobook, {origin_tag}]
---
# {name}, trained by {origin}

A plain timm network, trained at {image_size} pixels. Input: RGB in [0, 1], minus mean {mean}, divided by std {std}.

```python
{lines}
```
"""


def export_backbone(
    folder: Path,
    state: dict[str, Tensor],
    *,
    name: str,
    args: dict[str, Any],
    image_size: int,
    origin: str,
    classes: tuple[str, ...] | None = None,
    crop: float = 1.0,
    target: str = "",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> str:
    """Write a timm network as an export folder.

    Args:
        folder: where to.
        state: plain timm state dict.
        name: timm's name of the network.
        args: further arguments of timm.create_model.
        image_size: side it was trained at, pixels.
        origin: what trained it, for the card.
        classes: names of the classes when it has a head.
        crop: share of an image's shorter side that a classifier was evaluated on.
        target: what it predicted of hidden patches, where it was pre-trained so.
        mean: of the input's normalisation.
        std: of the input's normalisation.

    Returns:
        The lines of Python that load it, with `{path}` where the run folder goes.
    """
    made = {"num_classes": len(classes) if classes else 0, **args}
    arguments = "".join(f", {key}={value!r}" for key, value in made.items())
    lines = (
        "import timm, safetensors.torch\n"
        f'model = timm.create_model("{name}"{arguments})\n'
        'model.load_state_dict(safetensors.torch.load_file("{path}/export/model.safetensors"))'
    )
    config: dict[str, Any] = {"kind": "classifier" if classes else "backbone", "name": name, "args": args}
    config |= {"mean": list(mean), "std": list(std), "image_size": image_size}
    if classes:
        config |= {"classes": list(classes), "crop": crop}
    if target:
        config["target"] = target
    shown = lines.replace("{path}/export/", "")
    tag = origin.lower().replace(" ", "-")
    card = _CARD.format(
        name=name, origin=origin, origin_tag=tag, image_size=image_size, mean=mean, std=std, lines=shown
    )
    write_export(folder, config, state, card)
    return lines.replace("{", "{{").replace("}", "}}").replace("{{path}}", "{path}")


def create(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` with errors that a person can use. Raises WeightsError."""
    import timm

    bare = name.removeprefix("timm:")
    if not timm.is_model(bare.partition(".")[0]):
        raise WeightsError(f"timm has no network '{bare}'.{did_you_mean(bare, timm.list_models())}")
    try:
        network: nn.Module = timm.create_model(bare, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise WeightsError(f"timm's '{bare}' does not take these arguments: {error}") from None
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if not pretrained:
            raise WeightsError(f"timm cannot make '{bare}' with {kwargs}: {first_line(error)}") from None
        raise WeightsError(
            f"The weights of timm's '{bare}' cannot be fetched ({first_line(error)}).\n"
            "Check the network, give a local file with weights, or ask for random ones."
        ) from None
    return network


def load_backbone(
    spec: str,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    pool_mean: bool = False,
    drop_path: float = 0.0,
    any_size: bool = False,
) -> Backbone:
    """A backbone without head.

    Args:
        spec: `timm:NAME`, or a run folder of pecobook (contrast, pretrain or finetune).
        weights: None for the network's own pre-trained weights, `random` for none, or a local file.
        image_size: side of the images it will see; a transformer's position tables are interpolated to it.
        pool_mean: make a transformer pool the mean of its patches instead of its class token.
        drop_path: stochastic depth.
        any_size: make a transformer of absolute positions interpolate them to whatever image it sees.

    Raises:
        ConfigError: a file of weights, without its network.
        WeightsError: unknown name, or weights missing or not fitting.
    """
    if Path(spec).is_file():
        raise ConfigError(
            f"'{spec}' is a file of weights, which needs its network: --backbone timm:NAME --weights {spec} "
            "(or --perceptual.network and --perceptual.weights)."
        )
    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        return _load_timm(name, weights, image_size, pool_mean, _further(name, drop_path, any_size))
    if not Path(spec).exists() and "/" not in spec:
        raise WeightsError(f"'{spec}' is neither a run folder nor a network: networks of timm are written timm:NAME.")
    config, state = read_export(spec)
    if config.get("kind") not in ("backbone", "classifier"):
        raise WeightsError(f"'{spec}' is a {config.get('kind')}, not a backbone: give a contrast or pretrain run.")
    args = config["args"] | _pooling(config["name"], pool_mean)
    network = create(config["name"], num_classes=0, **_further(config["name"], drop_path, any_size), **args)
    if weights != "random":
        load_state(network, state if weights is None else read_weights(weights), source=weights or spec)
    size = config["image_size"]
    if image_size is not None and image_size != size and is_transformer(config["name"]):
        network.set_input_size(img_size=image_size)  # type: ignore[operator]
        args, size = args | {"img_size": image_size}, image_size
    return Backbone(network, config["name"], args, tuple(config["mean"]), tuple(config["std"]), size)


def _load_timm(
    name: str, weights: str | None, image_size: int | None, pool_mean: bool, further: dict[str, Any]
) -> Backbone:
    args: dict[str, Any] = _pooling(name, pool_mean)
    sized = {"img_size": image_size} if image_size is not None and is_transformer(name) else {}
    from_file = weights not in (None, "random")
    made = args if from_file else args | sized  # a file's position tables are of the network's own size
    # Where the mean is pooled, timm has the last norm under another name, so its own weights are read without that.
    renamed = weights is None and bool(args)
    network = create(name, pretrained=weights is None and not renamed, num_classes=0, **further, **made)
    if renamed:
        load_state(network, create(name, pretrained=True, num_classes=0, **sized).state_dict(), source=f"timm:{name}")
    settings = getattr(network, "pretrained_cfg", None) or {}
    if from_file:
        state = read_weights(str(weights))
        load_state(network, state, source=str(weights))
        if sized:
            network.set_input_size(**sized)  # type: ignore[operator]
        if is_moco(state):  # timm's own weights of the same network may want another normalisation
            settings = {**settings, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    size = image_size or settings.get("input_size", (3, 224, 224))[-1]
    mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    return Backbone(network, name, args | sized, tuple(mean), tuple(std), size)


def is_transformer(name: str) -> bool:
    """Whether timm's `name` is a ViT, which is made for one size of image."""
    return name.startswith(("vit_", "beit", "deit", "eva"))


def _further(name: str, drop_path: float, any_size: bool) -> dict[str, Any]:
    """Arguments that change how a network runs, not what its weights are."""
    depth = {"drop_path_rate": drop_path} if drop_path > 0 else {}  # VGG and DenseNet do not know the argument
    return {**depth, **(any_size_args(name) if any_size else {})}


def any_size_args(name: str) -> dict[str, Any]:
    """Arguments with which timm's `name` reads images of any size; BEiT knows none (see `models.dense.pyramid`)."""
    dynamic = is_transformer(name) and not name.startswith("beit")
    return {"dynamic_img_size": True, "dynamic_img_pad": True} if dynamic else {}


def _pooling(name: str, pool_mean: bool) -> dict[str, Any]:
    if not (pool_mean and is_transformer(name)):
        return {}
    return {"global_pool": "avg", **({"use_fc_norm": True} if name.startswith("beit") else {})}
