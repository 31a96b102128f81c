"""Settings of `pecobook contrast`, which trains a feature network with MoCo v3."""

from __future__ import annotations

from functools import partial

from pecobook.settings.images import JitterConfig, PhotometricConfig
from pecobook.settings.initial import network_of
from pecobook.settings.training import BackboneConfig, BaseOptimConfig, ProbedTrainConfig
from pecobook.settings.values import MAX_WIDTH, between, not_negative, positive, settings_class


@settings_class
class ContrastConfig(ProbedTrainConfig):
    """Train a feature network on your images with MoCo v3."""

    model: BackboneConfig = BackboneConfig(name="vit_base_patch16_224")
    optim: BaseOptimConfig = BaseOptimConfig(lr=2.4e-3, weight_decay=0.1, warmup="40 epochs")
    max_steps: str = "300 epochs"
    min_crop: float = 0.08
    batch_size: int = 4096
    """Number of images in one optimizer step, shared by all devices and accumulation steps; each image, in two views,
    is contrasted with all others."""
    momentum: float = 0.99
    """Initial momentum of the key encoder's moving average; it rises to 1 along a half cosine, or stays constant with
    --optim.schedule constant."""
    temperature: float = 0.2
    """Temperature of the contrastive softmax (MoCo v3: 0.2 for ViT, 1.0 for ResNet-50)."""
    hidden_dim: int = 4096
    """Width of the hidden layers of the projector and the predictor."""
    output_dim: int = 256
    """Dimension of the space in which views are compared."""
    freeze_patch_embed: bool = True
    """Freeze a ViT's patch projection at its random initialisation (MoCo v3, section 4); other networks ignore this."""
    fixed_positions: bool = True
    """Give a ViT that has a position table fixed sines and cosines of row and column, and MoCo v3's initialisation."""
    colour: JitterConfig = JitterConfig()
    """Colour augmentation of both views, in addition to --blur and --solarise."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probabilities of blur for the first and the second view."""
    solarise: tuple[float, float] = (0.0, 0.2)
    """Probabilities of solarisation for the first and the second view."""
    knn_images: int = 4096
    """Number of labelled training images among which each evaluation looks for the neighbours of held-out images (k-NN
    accuracy, an early sign that the features are learning something). 0, or data without labels, leaves the k-NN
    accuracy out."""
    implied = staticmethod(partial(network_of, command="contrast"))  # what follows from --init, for `replace`

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature")
        positive(self, "hidden_dim", "output_dim", most=MAX_WIDTH)
        not_negative(self, "knn_images")
        between(self, 0.0, 1.0, "momentum", "blur", "solarise")

    def view_colour(self, number: int) -> PhotometricConfig:
        """Return the whole colour augmentation of view 0 or 1."""
        return PhotometricConfig(**vars(self.colour), blur=self.blur[number], solarise=self.solarise[number])
