"""Networks by name: timm's, or a backbone that a run of pecobook exported. Nothing here unpickles code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError, did_you_mean, first_line
from pecobook.models.checkpoints import is_moco, load_state, read_weights
from pecobook.models.export import Card, Exported, read_export

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's default


class Backbone(Exported):
    """A network without its head, and the input it was made for.

    Args:
        network: a timm network with `forward_features` and `forward_intermediates`.
        name: timm's.
        args: further arguments of timm.create_model.
        mean: of the input's normalisation, RGB in [0, 1].
        std: the same.
        image_size: side it was trained at, pixels; None when any will do.
        target: what it predicted of hidden patches, where it was pre-trained so.
    """

    kind = "backbone"
    comes_from = "contrast or pretrain"

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
        """Float images (B, 3, H, W) in [0, 1] to pooled features (B, F), or to logits of a classifier."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return self.network((images - mean) / std)  # type: ignore[no-any-return]

    @property
    def body(self) -> nn.Module:
        """The network: an export is a plain timm state dict."""
        return self.network

    def settings(self) -> dict[str, Any]:
        """Its name, arguments and input."""
        own = {"name": self.name, "args": self.args, "mean": list(self.mean), "std": list(self.std)}
        return {**own, "image_size": self.image_size, **({"target": self.target} if self.target else {})}

    @classmethod
    def rebuild(cls, settings: dict[str, Any]) -> Self:
        """The network that `settings` describes, with random weights."""
        network = create(settings["name"], num_classes=len(settings.get("classes", ())), **settings["args"])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        return cls(network, **values)

    def load_exported(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an export. Raises WeightsError when they do not fit."""
        load_state(self.network, state, source="model.safetensors")

    def _num_classes(self) -> int:
        return 0

    def lines(self, source: str) -> str:
        """Python that loads the plain timm network from the export folder `source`."""
        return "import timm, safetensors.torch\n" + self._timm_lines(f'"{source}/model.safetensors"')

    def hub_lines(self, repo_id: str) -> str:
        """Python that loads the plain timm network from the hub's repository `repo_id`."""
        file = f'huggingface_hub.hf_hub_download("{repo_id}", "model.safetensors")'
        return "import huggingface_hub, timm, safetensors.torch\n" + self._timm_lines(file)

    def _timm_lines(self, file: str) -> str:
        made = {"num_classes": self._num_classes(), **self.args}
        arguments = "".join(f", {key}={value!r}" for key, value in made.items())
        return (
            f'model = timm.create_model("{self.name}"{arguments})\n'
            f"model.load_state_dict(safetensors.torch.load_file({file}))"
        )

    def card(self, origin: str) -> Card:
        """Its name, origin and input."""
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
    """A network with its head: images to logits of classes.

    Args:
        network: a timm network.
        name: timm's.
        args: further arguments of timm.create_model.
        mean: of the input's normalisation, RGB in [0, 1].
        std: the same.
        image_size: side it was trained at, pixels.
        classes: their names.
        crop: share of an image's shorter side that it was evaluated on.
    """

    kind = "classifier"
    comes_from = "finetune"

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
        """Its name, arguments, input and classes."""
        return {**super().settings(), "classes": list(self.classes), "crop": self.crop}

    def _num_classes(self) -> int:
        return len(self.classes)


def exported_network(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> nn.Module:
    """The timm network of an export, with its head where it has one, in evaluation mode.

    Raises:
        WeightsError: the weights are of another network; says so of `source`.
    """
    network = create(settings["name"], num_classes=len(settings.get("classes", ())), **settings["args"])
    load_state(network, state, source=source)
    return network.eval()


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
