"""Train a feature network on your own images: MoCo v3 (arXiv 2104.02057), the paper's perceptual network.

In shapes, B is the number of images of this rank and F the feature width of the backbone.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.sampler import key
from pecobook.data.stream import ViewFunction
from pecobook.data.views import central_view, colour_draws, photometric, random_crop
from pecobook.engine.launch import check_min_batch
from pecobook.engine.schedule import cosine
from pecobook.engine.stage import Stage, StageOutput, submodule_state
from pecobook.models.checkpoints import load_state
from pecobook.models.contrastive import can_initialise_moco, contrastive_loss, ema_update, initialise_moco, mlp
from pecobook.models.dry_run import dry_run, refusing
from pecobook.models.initial import start_backbone, take_parts, training_weights, write_training_weights
from pecobook.models.network_traits import network_traits
from pecobook.models.weights import Backbone, create_network
from pecobook.settings.contrast import ContrastConfig
from pecobook.utils.images import Normalised, channels_last, to_float


class MocoStage(Normalised, Stage[ContrastConfig]):
    """Two views of each image, an encoder, and a momentum encoder: the encoder's moving average."""

    command = "contrast"

    min_batch_size = 2  # images are contrasted with each other, and normalised together

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config
        args = _backbone_args(config)
        self.backbone = create_network(config.model.name, num_classes=0, **args)
        width = int(self.backbone.head_hidden_size)  # type: ignore[arg-type]  # differs from num_features in VGG and MobileNet
        is_vit = hasattr(self.backbone, "patch_embed")
        hidden, out = config.hidden_dim, config.output_dim
        self.projector = mlp([width, hidden, *([hidden] if is_vit else []), out], final_norm=True)
        self.predictor = mlp([out, hidden, out], final_norm=is_vit)
        if is_vit and config.fixed_positions and can_initialise_moco(self.backbone):
            initialise_moco(self.backbone)
        if is_vit and config.freeze_patch_embed:
            self.backbone.patch_embed.requires_grad_(False)
        self.start = start_backbone(
            self.backbone, config.init, name=config.model.name, args=args, image_size=config.image_size
        )
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if config.init:
            self._take_heads()
        self.notes = self.start.notes
        self.set_normalisation(self.start.mean, self.start.std)

    def _take_heads(self) -> None:
        """Copy the heads and the momentum encoder from the run of `--init`."""
        state = training_weights(self.start.source)
        if "predictor.0.weight" not in state:
            self.start.left.append("projector and predictor (not in it)")
            return
        load_state(self.momentum_backbone, submodule_state(state, "momentum_backbone"), source=self.start.source)
        self.start.taken.append("momentum_backbone")
        heads = {name: value for name, value in state.items() if not name.startswith("momentum_backbone.")}
        take_parts(self, heads, self.start, skip=("backbone", "momentum_backbone"))

    def forward(self, batch: Batch) -> StageOutput:
        """Return the symmetric contrastive loss of two views, uint8 (B, 3, H, W) each; in evaluation also features."""
        if "probe" in batch:
            return StageOutput(None, {}, rows={"features": self._features(batch["image"])})
        rows = {} if self.training else self._knn_rows(batch)
        if "view0" not in batch:  # labelled training images, for k-NN in evaluation
            return StageOutput(self.mean.new_zeros(()), {}, rows=rows)
        draws = batch["colour0"], batch["colour1"]
        if not self.training and len(batch["view0"]) < 2:  # the right key would be the only one: nothing to measure
            return StageOutput(None, {}, rows=rows)
        views = [self._prepare_view(view, draws[n], n) for n, view in enumerate((batch["view0"], batch["view1"]))]
        if "ahead" in batch:
            return StageOutput(None, {}, rows=dict(zip(("keys0", "keys1"), self._keys(views), strict=True)))
        queries = [self.predictor(self.projector(self.backbone(view))) for view in views]  # (B, out) each
        keys = [batch["keys0"], batch["keys1"]] if "keys0" in batch else self._keys(views)
        temperature = self.config.temperature
        first, accuracy = contrastive_loss(queries[0], keys[1], temperature)
        second, _ = contrastive_loss(queries[1], keys[0], temperature)
        metrics = {"accuracy": 100 * accuracy.detach()}
        if len(queries[0]) > 1:
            deviation = F.normalize(queries[0].detach().float(), dim=1).std(0).mean()
            metrics["spread"] = deviation * self.config.output_dim**0.5
        return StageOutput(first + second, metrics, rows=rows)

    @property
    def needs_full_batch_keys(self) -> bool:
        """Return True: all images of a step are contrasted, however few a device holds at a time."""
        return True

    @torch.no_grad()
    def _keys(self, views: list[Tensor]) -> list[Tensor]:
        """Return the keys of each view, (B, out) each; queries of one view are compared with keys of the other."""
        return [self.momentum_projector(self.momentum_backbone(view)) for view in views]

    def _knn_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Return features (B, F) and labels (B,) of central crops."""
        if "label" not in batch or self.config.knn_images == 0:
            return {}
        return {"features": self._features(batch["image"]), "labels": batch["label"]}

    def _features(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of uint8 images (B, 3, S, S)."""
        return self.backbone(self._normalise(to_float(images))).float()  # type: ignore[no-any-return]

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return the k-NN accuracy of held-out images among training images, in percent."""
        if not reference_rows:
            return {}
        from pecobook.analysis.probe import knn_probe

        train = reference_rows["features"], reference_rows["labels"]
        return {"knn": knn_probe(*train, rows["features"], rows["labels"]).accuracy}

    def _prepare_view(self, view: Tensor, draws: Tensor, number: int) -> Tensor:
        """Apply the colour augmentation to view 0 or 1, uint8 (B, 3, H, W), and normalise it for the backbone."""
        return self._normalise(photometric(to_float(view), draws, self.config.view_colour(number)))

    def _normalise(self, images: Tensor) -> Tensor:
        """Normalise float images (B, 3, H, W) in [0, 1] for the backbone."""
        return channels_last(self.normalise(images))

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Move the momentum encoder towards the encoder; the momentum rises to 1 if the length of training is known."""
        momentum = self.config.momentum
        if self.config.optim.schedule != "constant":
            momentum = cosine(step - 1, total=total, start=momentum, end=1.0)
        ema_update(self.momentum_backbone, self.backbone, momentum)
        ema_update(self.momentum_projector, self.projector, momentum)

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Return a warning if all images get nearly the same feature (a spread of 1 is uniform on the sphere)."""
        if metrics["spread"] > 0.05 or step < 100:
            return None
        return "The features have collapsed to a point: try a lower --optim.lr or a longer --optim.warmup."

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the backbone as a plain timm network."""
        args, size = _backbone_args(self.config), self.config.image_size
        backbone = Backbone(self.backbone, self.config.model.name, args, self.start.mean, self.start.std, size)
        backbone.value_range, backbone.init = self.config.value_range, self.start.summary
        write_training_weights(folder, state, leave_out=("backbone.",))
        backbone.save_pretrained(folder, state=submodule_state(state, "backbone"), origin="MoCo v3")
        return backbone.loading_code(str(folder))

    @classmethod
    def check(cls, config: ContrastConfig) -> MocoStage:
        """Build the stage with random weights. Raises PecobookError for unusable settings."""
        check_min_batch(config)
        name = config.model.name
        with refusing(name, "be trained by MoCo v3"):
            stage = cls(config)
        images = torch.zeros(2, 3, config.image_size, config.image_size)
        dry_run(stage.backbone, (images,), network=name, purpose=f"learn from images of {config.image_size} pixels")
        return stage

    @classmethod
    def view(cls, config: ContrastConfig) -> ViewFunction:
        """Return the function that takes two random crops of an image and draws their colour augmentation."""
        return partial(_two_views, size=config.image_size, min_area=config.min_crop)

    @classmethod
    def evaluation_view(cls, config: ContrastConfig) -> ViewFunction:
        """Return the function that takes two random crops and the central crop of a held-out image."""
        return partial(_evaluation_view, size=config.image_size, min_area=config.min_crop)

    @classmethod
    def reference_view(cls, config: ContrastConfig) -> ViewFunction:
        """Return the function that takes the central crop of a labelled training image."""
        return partial(central_view, size=config.image_size)

    probe_view = reference_view


def _backbone_args(config: ContrastConfig) -> dict[str, Any]:
    args = config.model.kwargs()
    if network_traits(config.model.name, args).takes_size:
        args = {"img_size": config.image_size, **args}
    return args


def _two_views(image: Tensor, view_key: int, *, size: int, min_area: float) -> dict[str, Tensor]:
    first, second = key(view_key, 10), key(view_key, 11)
    return {
        "view0": random_crop(image, size, first, min_area=min_area),
        "view1": random_crop(image, size, second, min_area=min_area),
        "colour0": colour_draws(first),
        "colour1": colour_draws(second),
    }


def _evaluation_view(image: Tensor, view_key: int, *, size: int, min_area: float) -> dict[str, Tensor]:
    return _two_views(image, view_key, size=size, min_area=min_area) | central_view(image, view_key, size=size)
