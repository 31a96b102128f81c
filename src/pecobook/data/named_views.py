"""The views of pre-training: `pretrain` trains on them, `tokenize` encodes them, `analyze` draws them.

The seed, the number of the image and the number of the view name a view. The view depends on that name and on the
settings below alone, so the three commands get identical pixels from this one definition.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.views import center_crop, colour_draws, photometric, random_crop
from pecobook.settings.images import PhotometricConfig
from pecobook.utils.images import to_float


@dataclasses.dataclass(frozen=True)
class NamedViews:
    """The settings that define every view, and the functions that make one."""

    seed: int
    """Seed of the crops and colour changes."""
    image_size: int
    """Side of the crops, pixels."""
    tokenizer_size: int
    """Side to which crops are resized for the tokenizer, pixels."""
    min_crop: float
    """Smallest share of the image's area in a random crop, in (0, 1]."""
    colour: PhotometricConfig
    """Strengths of the colour changes."""

    @classmethod
    def of(cls, config: Any) -> NamedViews:
        """Returns the views of a pretrain or tokenize configuration."""
        side = config.image_size
        return cls(config.seed, side, config.tokenizer_size or side, config.min_crop, config.colour)

    @classmethod
    def of_bank(cls, config: dict[str, Any]) -> NamedViews:
        """Returns the views of a token bank from its config.json, which contains `settings()`."""
        fields = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "colour": PhotometricConfig(**config["colour"])})

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain values, for a JSON file."""
        return dataclasses.asdict(self)

    def train(self, image: Tensor, view_key: int) -> dict[str, Tensor]:
        """Returns a random crop uint8 (3, S, S) of a training image and the random numbers (9,) of the colours."""
        crop = random_crop(image, self.image_size, view_key, min_area=self.min_crop)
        return {"image": crop, "colour": colour_draws(view_key)}

    def evaluation(self, image: Tensor, view_key: int) -> dict[str, Tensor]:
        """Returns the central crop of a held-out image, which is equal for every key, in the form of `train`."""
        return {"image": center_crop(image, self.image_size), "colour": colour_draws(view_key)}

    def pixels(self, batch: Batch, *, training: bool) -> Tensor:
        """Returns the input of ViT and tokenizer, float (B, 3, S, S) in [0, 1]; colours change in training only."""
        images = to_float(batch["image"])
        return photometric(images, batch["colour"], self.colour) if training else images
