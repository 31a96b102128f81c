"""Backbones and classifiers: built by timm name or loaded from a pecobook run, and exported.

Nothing in this module unpickles code.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, first_line
from pecobook.models.checkpoints import Checkpoint, left_aside, load_state, read_checkpoint
from pecobook.models.export import Card, Exported, read_export, read_settings
from pecobook.models.makers import (
    Normalisation,
    activation_note,
    file_normalisation,
    maker_args,
    neighbour_network,
    overridden,
    timm_normalisation,
)
from pecobook.models.network_traits import NetworkTraits, differing_layer, network_traits, trained_size, without_memory
from pecobook.models.networks import create_network
from pecobook.models.snippets import BEST_CLASSES, normalise, open_square, quoted
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD
from pecobook.utils.given import given
from pecobook.utils.images import as_images

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "Classifier", "create_network", "load_backbone"]


class Backbone(Exported):
    """A network without a head, together with the input that it expects.

    Args:
        network: a timm network with `forward_features` and `forward_intermediates`.
        name: timm's name of the network.
        args: additional arguments for timm.create_model.
        mean: mean for normalising the input, RGB in [0, 1].
        std: standard deviation for normalising the input, RGB in [0, 1].
        image_size: side of the training images, in pixels; None if the network takes any size.
        target: prediction target of masked pre-training (`tokens` or `pixels`); empty if there was none.
        notes: lines that tell the user what was loaded from where.
        classes: names of the classes of a classifier.
        crop: side of the central square that the network reads, as a fraction of the image's shorter side.
    """

    kind = "backbone"
    trained_by = "contrast or pretrain"

    def __init__(
        self,
        network: nn.Module,
        name: str,
        args: dict[str, Any],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int | None,
        *,
        target: str = "",
        notes: tuple[str, ...] = (),
        classes: tuple[str, ...] = (),
        crop: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.name, self.args, self.target, self.notes = network, name, args, target, notes
        self.mean, self.std, self.image_size, self.classes, self.crop = mean, std, image_size, classes, crop or 1.0

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), float in [0, 1] or uint8, to pooled features (B, F); a classifier returns logits.

        Raises:
            ValueError: the shape, the type or the values are invalid.
        """
        images = as_images(images, (1, 3)).to(next(self.network.parameters()).dtype)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return self.network((images - mean) / std)  # type: ignore[no-any-return]

    @property
    def body(self) -> nn.Module:
        """The network itself, so that an export contains a plain timm state dict."""
        return self.network

    def settings(self) -> dict[str, Any]:
        """Return name, arguments and expected input of the network, as JSON values."""
        network = {"name": self.name, "args": self.args, "mean": list(self.mean), "std": list(self.std)}
        return {**network, "image_size": self.image_size, **({"target": self.target} if self.target else {})}

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """Build the network that `settings` describes, with random weights."""
        network = create_network(settings["name"], num_classes=len(settings.get("classes", ())), **settings["args"])
        _check_pooling(network, settings)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        return cls(network, **values)

    def load_exported(self, state: dict[str, Tensor]) -> None:
        """Load the weights of an export. Raises WeightsError if they do not fit."""
        load_state(self.network, state, source="model.safetensors")

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the plain timm network from the export folder `source` and reads one image."""
        return self._timm_code(quoted(f"{source}/model.safetensors"), quoted(f"{source}/config.json"))

    def hub_loading_code(self, repo_id: str) -> str:
        """Return the same code for the repository `repo_id` on the hub."""
        weights, config = (
            f"huggingface_hub.hf_hub_download({quoted(repo_id)}, {quoted(name)})"
            for name in ("model.safetensors", "config.json")
        )
        return self._timm_code(weights, config, "import huggingface_hub\n")

    def _timm_code(self, weights: str, config: str, imports: str = "") -> str:
        """Return the code; `weights` and `config` are expressions for the paths of the export's files."""
        imports = "import json\n" * bool(self.classes) + imports
        create_args = {"num_classes": len(self.classes), **self.args}
        arguments = "".join(f", {key}={value!r}" for key, value in create_args.items())
        lines = (
            f"model = timm.create_model({quoted(self.name)}{arguments}).eval()\n"
            f"model.load_state_dict(safetensors.torch.load_file({weights}))"
        )
        names = f'json.load(open({config}))["classes"]'
        return self._image_code(f"{imports}import safetensors.torch\n", lines, names)

    def timm_folder_code(self, folder: str) -> str:
        """Return Python code that applies an export in timm's format to an image file."""
        line = f"model = timm.create_model({quoted(f'local-dir:{folder}')}, pretrained=True).eval()"
        return self._image_code("", line, 'model.pretrained_cfg["label_names"]')

    def _image_code(self, imports: str, lines: str, names: str) -> str:
        """Return code from `imports` and `lines`, which build `model`; `names` is an expression for the classes."""
        return f"""\
{imports}import numpy as np
import timm
import torch
from PIL import Image, ImageOps

{lines}
{open_square(self.image_size or 224, self.crop, self.value_range)}
{normalise(self.mean, self.std)}
{self._application(names)}"""

    def _application(self, names: str) -> str:
        if not self.classes:
            return "features = model(pixels[None])[0].detach()  # (F,)\nprint(features)"
        return f"probabilities = model(pixels[None]).softmax(1)[0].detach()\nclasses = {names}\n{BEST_CLASSES}"

    def card(self, origin: str) -> Card:
        """Return the model card: name, origin and expected input."""
        tag = origin.lower().replace(" ", "-")
        return Card(
            title=f"{self.name}, trained by {origin or 'pecobook'}",
            text=f"A plain timm network, trained at {self.image_size} pixels. Input: RGB in [0, 1], minus mean "
            f"{self.mean}, divided by std {self.std}."
            + (
                " Its feature is the mean of the patches; masked modelling trains no class token."
                if self.target
                else ""
            ),
            tags=("pecobook", tag) if tag else ("pecobook",),
            pipeline="image-classification" if self.classes else "image-feature-extraction",
            library="timm",
        )


class Classifier(Backbone):
    """A network with a classification head that maps images to class logits; arguments as for `Backbone`."""

    kind = "classifier"
    trained_by = "finetune"

    def settings(self) -> dict[str, Any]:
        """Return name, arguments, expected input and classes of the network, as JSON values."""
        return {**super().settings(), "classes": list(self.classes), "crop": self.crop}


def _check_pooling(network: nn.Module, settings: dict[str, Any]) -> None:
    """Raise WeightsError for an export of masked modelling that pools the class token, which was not trained."""
    if settings.get("target") and getattr(network, "global_pool", "") == "token":
        raise WeightsError("it is of masked modelling before version 0.1.0, and pools a class token without training.")


def load_backbone(
    spec: str,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    pool_mean: bool = False,
    drop_path: float = 0.0,
    any_size: bool = False,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Backbone:
    """Load a backbone without a head.

    Args:
        spec: `timm:NAME`, or a pecobook run folder (contrast, pretrain or finetune).
        weights: None for the network's pre-trained weights, `random` for random weights, or a local file.
        image_size: side of the input images, in pixels; a transformer's position tables are interpolated to this size.
        pool_mean: make a transformer pool the mean of the patches instead of the class token.
        drop_path: rate of stochastic depth.
        any_size: make a transformer with absolute positions interpolate them to the size of each input image.
        mean: mean for normalising the input, RGB in [0, 1]; if empty, that of the weights.
        std: standard deviation for normalising the input; if empty, that of the weights.

    Raises:
        ConfigError: `spec` is a file of weights.
        WeightsError: the name is unknown, or the weights are missing or do not fit.
    """
    if Path(spec).is_file():
        raise ConfigError(
            f"'{spec}' is a file of weights; also name the network: --backbone timm:NAME --weights "
            f"{shlex.quote(spec)} (or --perceptual.network and --perceptual.weights)."
        )
    is_timm = spec.startswith("timm:")
    if not is_timm and not Path(spec).exists() and "/" not in spec and given("backbone", spec) is None:
        raise WeightsError(f"'{spec}' is neither a run folder nor a network: networks of timm are written timm:NAME.")
    file = weights if weights not in (None, "random") else None
    checkpoint = read_checkpoint(file) if file is not None and not file.endswith(".npz") else None
    options: dict[str, Any] = {"pool_mean": pool_mean, "drop_path": drop_path, "any_size": any_size}
    load = _load_timm if is_timm else _load_run
    name = spec.removeprefix("timm:")
    network, args, size, normalisation, left = load(name, weights, checkpoint, image_size, options)
    name = name if is_timm else read_settings(spec)["name"]
    normalisation = overridden(normalisation, mean, std)
    aside = left_aside(file, checkpoint, left) if file and checkpoint else ""
    heads = f"{spec} is built with {args['num_heads']} heads, as in MoCo v3." if is_timm and "num_heads" in args else ""
    of_mean = is_timm and not pool_mean and "global_pool" in args
    pooling = f"{spec} pools the mean of the patches, since the file has a norm after it (fc_norm)." if of_mean else ""
    activation = activation_note(network, name, weights) if is_timm else ""
    notes = tuple(note for note in (aside, heads, pooling, activation, normalisation.line(spec)) if note)
    return Backbone(network, name, args, normalisation.mean, normalisation.std, size, notes=notes)


_Loaded = tuple[nn.Module, dict[str, Any], int | None, Normalisation, tuple[str, ...]]


def _load_run(
    spec: str, weights: str | None, checkpoint: Checkpoint | None, image_size: int | None, options: dict[str, Any]
) -> _Loaded:
    """Load a run; return the network, its arguments, the image size, the normalisation and the unused names."""
    config, state = read_export(spec, kinds=("backbone", "classifier"))
    if config.get("kind") not in ("backbone", "classifier"):
        raise WeightsError(f"'{spec}' is a {config.get('kind')}, not a backbone: give a contrast or pretrain run.")
    name, size = config["name"], config.get("image_size")
    traits = network_traits(name, config["args"])
    args = config["args"] | _pooling_args(traits, options["pool_mean"])
    if image_size is not None and image_size != size and traits.takes_size:
        args, size = args | {"img_size": image_size}, image_size
    network = create_network(name, num_classes=0, **_runtime_args(traits, options), **args)
    _check_pooling(network, config)
    normalisation = Normalisation(tuple(config["mean"]), tuple(config["std"]), "as the run was trained")
    left: tuple[str, ...] = ()
    if weights is None:
        load_state(network, state, source=spec)
    elif weights != "random":
        left, normalisation = load_file(network, name, args, weights, checkpoint)
    return network, args, size, normalisation, left


def _load_timm(
    name: str, weights: str | None, checkpoint: Checkpoint | None, image_size: int | None, options: dict[str, Any]
) -> _Loaded:
    """Load a timm network; return what `_load_run` returns."""
    traits = network_traits(name)
    # A network that has a norm after the mean of the patches was trained without an output of the class token.
    state = checkpoint.state if checkpoint is not None else {}
    of_mean = traits.pools_token and any(key.endswith("fc_norm.weight") for key in state)
    pooling: dict[str, Any] = _pooling_args(traits, options["pool_mean"] or of_mean)
    side = image_size
    if side is None and checkpoint is not None:
        side = trained_size(name, state)  # of the file's position tables, if it is not the default
    size_args = {"img_size": side} if side is not None and traits.takes_size else {}
    own = maker_args(state) if traits.is_plain else {}
    args, download = pooling | size_args | own, weights is None and not pooling
    network = create_network(name, download, num_classes=0, **_runtime_args(traits, options), **args)
    left: tuple[str, ...] = ()
    normalisation = timm_normalisation(network, f"timm:{name}")
    if weights is None and pooling:
        # If the mean is pooled, timm gives the last norm another name, so its weights are loaded without mean pooling.
        plain = create_network(name, True, num_classes=0, **size_args)
        load_state(network, plain.state_dict(), source=f"timm:{name}")
    elif weights not in (None, "random"):
        left, normalisation = load_file(network, name, args, str(weights), checkpoint)
    settings = getattr(network, "pretrained_cfg", None) or {}
    size = side or settings.get("input_size", (3, 224, 224))[-1]
    return network, args, size, normalisation, left


def load_file(
    network: nn.Module, name: str, args: dict[str, Any], file: str, checkpoint: Checkpoint | None
) -> tuple[tuple[str, ...], Normalisation]:
    """Load a file of weights into the timm network `name`, built with `args`.

    Args:
        network: the network.
        name: timm's name of the network.
        args: arguments that timm built it with.
        file: path of the file.
        checkpoint: the content of the file; None for an `.npz`, which is read here.

    Returns:
        the names in the file that were not used, and the normalisation that its network expects.

    Raises:
        WeightsError: the weights do not fit.
    """
    if checkpoint is None:  # timm reads it into a network whose last norm has its usual place
        plain = create_network(
            name, num_classes=0, **{k: v for k, v in args.items() if k not in ("global_pool", "use_fc_norm")}
        )
        _load_npz(plain, file)
        checkpoint = Checkpoint(plain.state_dict())
    left = load_state(network, checkpoint.state, source=file)
    if not (own := maker_args(checkpoint.state)).items() <= args.items():
        raise WeightsError(f"The weights of '{file}' do not fit this network: MoCo v3's has the arguments {own}.")
    _check_described(network, name, args, file)
    return left, file_normalisation(checkpoint.state, checkpoint.wrapper, file, network, f"timm:{name}")


def _check_described(network: nn.Module, name: str, args: dict[str, Any], file: str) -> None:
    """Raise WeightsError if config.json beside a file describes a network that computes something else."""
    described = neighbour_network(file, name, args)
    if described is None:
        return
    try:
        difference = differing_layer(network, without_memory(*described))
    except WeightsError:  # a network of a newer timm, say
        return
    if difference:
        text = f"config.json beside it describes {described[0]}, whose {difference}"
        raise WeightsError(f"The weights of '{file}' do not fit this network: {text}.")


def _load_npz(network: nn.Module, path: str) -> None:
    """Load Google's weights in NumPy's format (augreg, BiT) with timm's own reader. Raises WeightsError."""
    if not Path(path).is_file():
        raise WeightsError(f"There is no file of weights '{path}'.")
    if not hasattr(network, "load_pretrained"):
        raise WeightsError(f"{type(network).__name__} reads no .npz file ('{path}'): give safetensors or .pth.")
    try:
        network.load_pretrained(path)  # type: ignore[operator]
        # timm resamples patches of another size, and leaves blocks out that the network does not have.
        theirs = _numbers_in_npz(path)
        ours = sum(value.numel() for name, value in network.named_parameters() if _BODY.search(name))
    except Exception as error:  # names and shapes of another network, or a damaged file
        raise WeightsError(f"The weights of '{path}' do not fit this network: {first_line(error)}.") from None
    if theirs != ours:
        text = f"its patches and blocks hold {theirs:,} numbers, not {ours:,}"
        raise WeightsError(f"The weights of '{path}' do not fit this network: {text}.")


# The patch projection and the blocks, under timm's names and under Google's.
_BODY = re.compile(r"(^|\.)blocks\.\d|(patch_embed|embeds)\.proj\.weight")
_BODY_IN_NPZ = re.compile(r"embedding/kernel|encoderblock|block\d")


def _numbers_in_npz(path: str) -> int:
    """Return how many numbers Google's file has for the patch projection and the blocks of the image's network."""
    with np.load(path, allow_pickle=False) as arrays:
        first = next((name for name in arrays if name.endswith("embedding/kernel")), "")
        start = first.removesuffix("embedding/kernel")
        return sum(arrays[name].size for name in arrays if name.startswith(start) and _BODY_IN_NPZ.search(name))


def _runtime_args(traits: NetworkTraits, options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of timm.create_model that change the forward pass but not the weights."""
    # VGG and DenseNet do not accept the argument of stochastic depth.
    depth = {"drop_path_rate": options["drop_path"]} if options["drop_path"] > 0 else {}
    return {**depth, **(traits.any_size if options["any_size"] else {})}


def _pooling_args(traits: NetworkTraits, pool_mean: bool) -> dict[str, Any]:
    """Return arguments of timm.create_model that make a transformer pool the mean of the patches."""
    if not (pool_mean and traits.pools_mean):
        return {}
    return {"global_pool": "avg", **({"use_fc_norm": True} if traits.norm_moves else {})}
