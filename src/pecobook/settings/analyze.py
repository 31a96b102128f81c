"""Settings of `pecobook analyze`, which measures what codewords mean."""

from __future__ import annotations

from pecobook.settings.images import ImagesConfig, check_normalisation
from pecobook.settings.perceptual import check_layers
from pecobook.settings.values import LARGEST, between, not_negative, positive, settings_class


@settings_class
class AnalyzeConfig(ImagesConfig):
    """Find out what the codewords of one or more tokenizers mean, on your images."""

    tokenizer: str = ""
    """A codebook run, owner/name on the hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE or fourm:FILE."""
    against: tuple[str, ...] = ()
    """More tokenizers to compare with the first one, on the same images."""
    tokens: tuple[str, ...] = ()
    """Token banks of --data, each written with one of the tokenizers; with a bank, usage and galleries cover all
    training images."""
    backbone: tuple[str, ...] = ()
    """Pretrain runs, to show their predictions of masked patches side by side."""
    out: str = ""
    """Folder for analysis.json, report.html and pictures/. It must be new or empty, unless --overwrite is given."""
    overwrite: bool = False
    """Delete the contents of --out first."""
    classifier: str = ""
    """The classifier for originals and reconstructions: a finetune run, its exported model.safetensors, or timm:NAME;
    empty leaves this measurement out."""
    classifier_weights: str = ""
    """A local file of weights for the classifier timm:NAME; empty takes the weights of the hub."""
    classifier_mean: tuple[float, ...] = ()
    """Mean of the classifier's input, three numbers for RGB in [0, 1]; empty takes what its weights were trained
    with."""
    classifier_std: tuple[float, ...] = ()
    """Standard deviation of the classifier's input, three numbers for RGB in [0, 1]; empty as --classifier-mean."""
    perceptual: str = ""
    """A perceptual network, named as in codebook's --perceptual.network. It measures the distance between an image and
    its reconstruction; empty leaves this measurement out."""
    perceptual_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers of the network of --perceptual, given as in codebook's --perceptual.layers."""
    perceptual_weights: str = ""
    """A local file of weights for the network of --perceptual; empty takes the network's own."""
    judgements: str = ""
    """A folder in the layout of BAPPS's two-alternative judgements; empty leaves this comparison out."""
    codewords: tuple[int, ...] = ()
    """Numbers of codewords that get a gallery, in addition to random codewords and the most used codewords."""
    max_train: int = 10_000
    """Largest number of training images. The probes learn from the codes of these images."""
    max_test: int = 2000
    """Largest number of held-out images. Everything is measured on these images."""
    seed: int = 0
    """Seed of the random choices: codewords and patches of the galleries, and masks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_normalisation(self, "classifier_mean", "classifier_std")
        check_layers(self, "perceptual_layers")
        positive(self, "max_train", "max_test")
        between(self, 0, LARGEST, "seed")
        not_negative(self, "codewords")
