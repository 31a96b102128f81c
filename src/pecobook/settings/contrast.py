"""Settings of `pecobook contrast`, which trains a feature network by MoCo v3."""

from __future__ import annotations

from functools import partial

from pecobook.settings.images import JitterConfig, PhotometricConfig
from pecobook.settings.initial import network_of
from pecobook.settings.training import BackboneConfig, BaseOptimConfig, ProbedTrainConfig
from pecobook.settings.values import MAX_WIDTH, between, not_negative, positive, settings_class


@settings_class
class ContrastConfig(ProbedTrainConfig):
    """Train a feature network on your images by MoCo v3."""

    model: BackboneConfig = BackboneConfig(name="vit_base_patch16_224")
    optim: BaseOptimConfig = BaseOptimConfig(lr=2.4e-3, weight_decay=0.1, warmup="40 epochs")
    max_steps: str = "300 epochs"
    min_crop: float = 0.08
    batch_size: int = 4096
    """Number of images in one optimizer step. All devices and accumulation steps share these images; each image, in two
    views, is contrasted with all others."""
    momentum: float = 0.99
    """Momentum of the key encoder's moving average at the start; it rises to 1 by a half cosine, and stays the same
    under --optim.schedule constant."""
    temperature: float = 0.2
    """Temperature of the contrastive softmax (MoCo v3: 0.2 for ViT, 1.0 for ResNet-50)."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    output_dim: int = 256
    """Width of the space in which views are compared."""
    freeze_patch_embed: bool = True
    """Leave a ViT's patch projection at its random start (MoCo v3, section 4); other networks ignore this."""
    fixed_positions: bool = True
    """Give a ViT with a position table fixed sines and cosines of row and column, and MoCo v3's initialisation."""
    colour: JitterConfig = JitterConfig()
    """Colour changes of both views, in addition to --blur and --solarise."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probabilities of blur on the first and on the second view."""
    solarise: tuple[float, float] = (0.0, 0.2)
    """Probabilities of solarisation on the first and on the second view."""
    knn_images: int = 4096
    """Number of labelled training images in which each evaluation searches the neighbours of held-out images (k-NN
    accuracy, an early sign of whether the features learn something); 0 leaves the k-NN accuracy out, as do data
    without labels."""
    implied = staticmethod(partial(network_of, command="contrast"))  # what follows from --init, for `replace`

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature")
        positive(self, "hidden_dim", "output_dim", most=MAX_WIDTH)
        not_negative(self, "knn_images")
        between(self, 0.0, 1.0, "momentum", "blur", "solarise")

    def view_colour(self, number: int) -> PhotometricConfig:
        """Return all colour changes of view 0 or 1."""
        return PhotometricConfig(**vars(self.colour), blur=self.blur[number], solarise=self.solarise[number])
