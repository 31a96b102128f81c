"""Backbones and classifiers: built by timm's name or loaded from a pecobook run, and exported.

Nothing in this module unpickles code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, did_you_mean, first_line
from pecobook.models.checkpoints import is_moco, load_state, read_weights
from pecobook.models.export import Card, Exported, read_export

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's defaults


class Backbone(Exported):
    """A network without a head, and the input that it expects.

    Args:
        network: a timm network with `forward_features` and `forward_intermediates`.
        name: timm's name of the network.
        args: further arguments of timm.create_model.
        mean: mean of the input's normalisation, RGB in [0, 1].
        std: standard deviation of the input's normalisation, RGB in [0, 1].
        image_size: side of the training images, pixels; None if the network takes any size.
        target: prediction target of masked pre-training (`tokens` or `pixels`); empty without such pre-training.
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
    ) -> None:
        super().__init__()
        self.network, self.name, self.args, self.target = network, name, args, target
        self.mean, self.std, self.image_size = mean, std, image_size

    def forward(self, images: Tensor) -> Tensor:
        """Map float images (B, 3, H, W) in [0, 1] to pooled features (B, F); a classifier returns logits."""
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
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        return cls(network, **values)

    def load_exported(self, state: dict[str, Tensor]) -> None:
        """Load the weights of an export. Raises WeightsError if they do not fit."""
        load_state(self.network, state, source="model.safetensors")

    def _num_classes(self) -> int:
        return 0

    def loading_code(self, source: str) -> str:
        """Return Python code that loads the plain timm network from the export folder `source`."""
        return "import timm, safetensors.torch\n" + self._timm_loading_code(f'"{source}/model.safetensors"')

    def hub_loading_code(self, repo_id: str) -> str:
        """Return Python code that loads the plain timm network from the repository `repo_id` on the hub."""
        file = f'huggingface_hub.hf_hub_download("{repo_id}", "model.safetensors")'
        return "import huggingface_hub, timm, safetensors.torch\n" + self._timm_loading_code(file)

    def _timm_loading_code(self, file: str) -> str:
        create_args = {"num_classes": self._num_classes(), **self.args}
        arguments = "".join(f", {key}={value!r}" for key, value in create_args.items())
        return (
            f'model = timm.create_model("{self.name}"{arguments})\n'
            f"model.load_state_dict(safetensors.torch.load_file({file}))"
        )

    def card(self, origin: str) -> Card:
        """Return the model card: name, origin and expected input."""
        tag = origin.lower().replace(" ", "-")
        return Card(
            title=f"{self.name}, trained by {origin or 'pecobook'}",
            text=f"A plain timm network, trained at {self.image_size} pixels. Input: RGB in [0, 1], minus mean "
            f"{self.mean}, divided by std {self.std}.",
            tags=("pecobook", tag) if tag else ("pecobook",),
            pipeline="image-classification" if self._num_classes() else "image-feature-extraction",
            library="timm",
        )


class Classifier(Backbone):
    """A network with a classification head: maps images to logits of the classes.

    Args:
        network: a timm network.
        name: timm's name of the network.
        args: further arguments of timm.create_model.
        mean: mean of the input's normalisation, RGB in [0, 1].
        std: standard deviation of the input's normalisation, RGB in [0, 1].
        image_size: side of the training images, pixels.
        classes: names of the classes.
        crop: side of the centre crop in evaluation, as a share of the image's shorter side.
    """

    kind = "classifier"
    trained_by = "finetune"

    def __init__(
        self,
        network: nn.Module,
        name: str,
        args: dict[str, Any],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int | None,
        *,
        classes: tuple[str, ...],
        crop: float = 1.0,
    ) -> None:
        super().__init__(network, name, args, mean, std, image_size)
        self.classes, self.crop = classes, crop

    def settings(self) -> dict[str, Any]:
        """Return name, arguments, expected input and classes of the network, as JSON values."""
        return {**super().settings(), "classes": list(self.classes), "crop": self.crop}

    def _num_classes(self) -> int:
        return len(self.classes)


def exported_network(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> nn.Module:
    """Build the timm network of an export and load the weights.

    Args:
        settings: settings of the export.
        state: weights of the export.
        source: name of the export, for error messages.

    Returns:
        the network in evaluation mode, with a head if the export has one.

    Raises:
        WeightsError: the weights do not fit the network.
    """
    network = create_network(settings["name"], num_classes=len(settings.get("classes", ())), **settings["args"])
    load_state(network, state, source=source)
    return network.eval()


def architecture_arguments(timm_name: str) -> set[str]:
    """Return the names of the arguments that shape a network of timm.

    These are the arguments of the network's class and of the classes beside it in timm's module, without those of
    `timm.create_model` itself, such as `checkpoint_path` and `pretrained_cfg`, and of timm's loading of weights.
    """
    import inspect

    import timm

    module = sys.modules[timm.model_entrypoint(timm_name.partition(".")[0]).__module__]
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    names = {name for kind in classes for name in inspect.signature(kind.__init__).parameters}
    own = inspect.signature(timm.create_model).parameters
    return {name for name in names | _BUILDER_ARGUMENTS if name not in own and not name.startswith("pretrained")}


# Arguments that functions of timm read on the way to the class.
_BUILDER_ARGUMENTS = {"drop_path_rate", "global_pool", "in_chans", "num_classes", "output_stride"}


def create_network(name: str, download: bool = False, /, **kwargs: Any) -> nn.Module:
    """Call `timm.create_model` with arguments of the architecture alone.

    The arguments may come from the config.json of a run that somebody else made, and timm's function also has arguments
    that load files and request addresses.

    Args:
        name: timm's name of the network.
        download: whether to take timm's pre-trained weights; positional only, so that no config.json can ask for it.
        kwargs: arguments of the network.

    Raises:
        WeightsError: there is no such network, or it does not accept the arguments.
    """
    import timm

    timm_name = name.removeprefix("timm:")
    if not timm.is_model(timm_name.partition(".")[0]):
        suggestion = did_you_mean(timm_name, timm.list_models()) or " timm.list_models() in Python lists the networks."
        raise WeightsError(f"timm has no network '{timm_name}'.{suggestion}")
    refused = sorted(kwargs.keys() - architecture_arguments(timm_name))
    if refused:
        raise WeightsError(f"timm's '{timm_name}' does not accept these arguments: {', '.join(refused)}.")
    try:
        network: nn.Module = timm.create_model(timm_name, pretrained=download, **kwargs)
    except TypeError as error:
        raise WeightsError(f"timm's '{timm_name}' does not accept these arguments: {error}") from None
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if not download:
            raise WeightsError(f"timm cannot build '{timm_name}' with {kwargs}: {first_line(error)}") from None
        raise WeightsError(
            f"The weights of timm's '{timm_name}' cannot be downloaded ({first_line(error)}).\n"
            "Check the internet connection, give a local file of weights, or use random weights."
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
    """Load a backbone without a head.

    Args:
        spec: `timm:NAME`, or a run folder of pecobook (contrast, pretrain or finetune).
        weights: None for the network's pre-trained weights, `random` for random weights, or a local file.
        image_size: side of the input images, pixels; position tables of a transformer are interpolated to this size.
        pool_mean: let a transformer pool the mean of the patches instead of the class token.
        drop_path: rate of stochastic depth.
        any_size: let a transformer with absolute positions interpolate the positions to the size of each input image.

    Raises:
        ConfigError: `spec` is a file of weights.
        WeightsError: the name is unknown, or the weights are missing or do not fit.
    """
    if Path(spec).is_file():
        raise ConfigError(
            f"'{spec}' is a file of weights; also name the network: --backbone timm:NAME --weights {spec} "
            "(or --perceptual.network and --perceptual.weights)."
        )
    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        return _load_timm(name, weights, image_size, pool_mean, _runtime_args(name, drop_path, any_size))
    if not Path(spec).exists() and "/" not in spec:
        raise WeightsError(f"'{spec}' is neither a run folder nor a network: networks of timm are written timm:NAME.")
    config, state = read_export(spec)
    if config.get("kind") not in ("backbone", "classifier"):
        raise WeightsError(f"'{spec}' is a {config.get('kind')}, not a backbone: give a contrast or pretrain run.")
    args = config["args"] | _pooling_args(config["name"], pool_mean)
    network = create_network(
        config["name"], num_classes=0, **_runtime_args(config["name"], drop_path, any_size), **args
    )
    if weights != "random":
        load_state(network, state if weights is None else read_weights(weights), source=weights or spec)
    size = config["image_size"]
    if image_size is not None and image_size != size and is_transformer(config["name"]):
        network.set_input_size(img_size=image_size)  # type: ignore[operator]
        args, size = args | {"img_size": image_size}, image_size
    return Backbone(network, config["name"], args, tuple(config["mean"]), tuple(config["std"]), size)


def _load_timm(
    name: str, weights: str | None, image_size: int | None, pool_mean: bool, runtime_args: dict[str, Any]
) -> Backbone:
    args: dict[str, Any] = _pooling_args(name, pool_mean)
    size_args = {"img_size": image_size} if image_size is not None and is_transformer(name) else {}
    from_file = weights not in (None, "random")
    create_args = args if from_file else args | size_args  # position tables in a file have the network's default size
    # If the mean is pooled, timm gives the last norm another name, so timm's weights are loaded without mean pooling.
    renamed = weights is None and bool(args)
    network = create_network(name, weights is None and not renamed, num_classes=0, **runtime_args, **create_args)
    if renamed:
        load_state(
            network,
            create_network(name, True, num_classes=0, **size_args).state_dict(),
            source=f"timm:{name}",
        )
    settings = getattr(network, "pretrained_cfg", None) or {}
    if from_file:
        state = read_weights(str(weights))
        load_state(network, state, source=str(weights))
        if size_args:
            network.set_input_size(**size_args)  # type: ignore[operator]
        if is_moco(state):  # timm's weights of the same network may use another normalisation
            settings = {**settings, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    size = image_size or settings.get("input_size", (3, 224, 224))[-1]
    mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    return Backbone(network, name, args | size_args, tuple(mean), tuple(std), size)


def is_transformer(name: str) -> bool:
    """Return whether timm's `name` is a vision transformer, which is built for one image size."""
    return name.startswith(("vit_", "beit", "deit", "eva"))


def _runtime_args(name: str, drop_path: float, any_size: bool) -> dict[str, Any]:
    """Return arguments of timm.create_model that change the forward pass but not the weights."""
    depth = {"drop_path_rate": drop_path} if drop_path > 0 else {}  # VGG and DenseNet do not accept the argument
    return {**depth, **(any_size_args(name) if any_size else {})}


def any_size_args(name: str) -> dict[str, Any]:
    """Return arguments with which timm's `name` takes any image size; none for BEiT (see `models.dense.pyramid`)."""
    dynamic = is_transformer(name) and not name.startswith("beit")
    return {"dynamic_img_size": True, "dynamic_img_pad": True} if dynamic else {}


def _pooling_args(name: str, pool_mean: bool) -> dict[str, Any]:
    """Return arguments of timm.create_model with which a transformer pools the mean of the patches."""
    if not (pool_mean and is_transformer(name)):
        return {}
    return {"global_pool": "avg", **({"use_fc_norm": True} if name.startswith("beit") else {})}
