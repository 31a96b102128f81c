"""Settings of `pecobook analyze`, which measures what codewords mean."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig, check_normalisation
from pecobook.settings.perceptual import check_layers
from pecobook.settings.values import LARGEST, between, not_negative, positive, settings_class


@settings_class
class AnalyzeConfig(ImagesConfig):
    """Find out what the codewords of one or more tokenizers mean, on your images."""

    tokenizer: str = ""
    """The tokenizer: a codebook run, owner/name on the Hugging Face hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE or fourm:FILE."""
    against: tuple[str, ...] = ()
    """Other tokenizers to compare with the first one, on the same images."""
    tokens: tuple[str, ...] = ()
    """Token banks of --data, each made with one of the tokenizers; with a bank, usage and galleries cover all training
    images."""
    backbone: tuple[str, ...] = ()
    """Pretrain runs whose predictions of masked patches are shown side by side."""
    out: str = ""
    """Folder for analysis.json, report.html and pictures/. It must be new or empty, unless --overwrite is given."""
    overwrite: bool = False
    """Delete the contents of --out first."""
    classifier: str = ""
    """A classifier that is applied to originals and reconstructions: a finetune run, its exported model.safetensors, or
    timm:NAME; leave empty to skip this measurement."""
    classifier_weights: str = ""
    """A local file of weights for the classifier timm:NAME. If empty, the weights on the hub."""
    classifier_mean: tuple[float, ...] = ()
    """Mean of the classifier's input, three numbers for RGB in [0, 1]. If empty, the mean its weights were trained
    with."""
    classifier_std: tuple[float, ...] = ()
    """Standard deviation of the classifier's input, three numbers for RGB in [0, 1]; empty as for --classifier-mean."""
    perceptual: str = ""
    """A perceptual network, named as in codebook's --perceptual.network, which measures the distance between each image
    and its reconstruction; leave empty to skip this measurement."""
    perceptual_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers of the --perceptual network, given as in codebook's --perceptual.layers."""
    perceptual_weights: str = ""
    """A local file of weights for the --perceptual network. If empty, the network's own weights."""
    judgements: str = ""
    """A folder with the layout of BAPPS's two-alternative judgements; leave empty to skip this comparison."""
    codewords: tuple[int, ...] = ()
    """Indices of codewords that get a gallery, in addition to random and the most used codewords."""
    max_train: int = 10_000
    """Largest number of training images. The probes learn from their codes."""
    max_test: int = 2000
    """Largest number of held-out images. Everything is measured on these images."""
    seed: int = 0
    """Seed of the random choices: codewords and patches for the galleries, and masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_normalisation(self, "classifier_mean", "classifier_std")
        check_layers(self, "perceptual_layers")
        positive(self, "max_train", "max_test")
        between(self, 0, LARGEST, "seed")
        not_negative(self, "codewords")
