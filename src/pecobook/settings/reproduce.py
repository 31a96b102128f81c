"""Settings of `pecobook reproduce`, which retrains the paper's tables."""

from __future__ import annotations

from typing import Literal

from pecobook.settings.images import MAX_LENGTH, ManyRunsConfig
from pecobook.settings.perceptual import check_layers
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import LARGEST, between, not_negative, positive, refuse, settings_class


@settings_class
class ReproduceConfig(ManyRunsConfig):
    """Train the rows of the paper's tables, with controls, and compare with the paper's numbers."""

    tables: tuple[str, ...] = ()
    """Tables of the paper: any of tables1-2, table1-large, table1-huge, table3, table4, table5, table6, table7, table8,
    table9, table10, table11, table12, v1-table7; or duel and duel-tuning, the study of docs/study.md. On the command
    line they may come first, without the flag."""
    out: str = ""
    """Folder to write. An interrupted reproduction resumes there, and tables can be added to it later."""
    budget: Literal["tiny", "small", "paper"] = "tiny"
    """Size of the runs. tiny: 32 pixels, minutes per run on 2 cores. small: five times as long. paper: the paper's
    recipes."""
    length: float = 1.0
    """Factor by which the number of steps of every run is multiplied."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs. Each row of a table is trained once per seed."""
    transfer: bool = True
    """Also pre-train and fine-tune a ViT with every tokenizer. With --no-transfer only the tokenizers are measured."""
    backbone: BackboneConfig = BackboneConfig(name="")
    """The ViT that is pre-trained and fine-tuned; without a name, the budget's ViT."""
    network: str = ""
    """A perceptual network, named as in codebook's --perceptual.network. If empty, one is trained on --data. The study
    `duel` gives the named network its own row."""
    network_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers of the --network network, given as in codebook's --perceptual.layers."""
    network_weights: str = ""
    """A local file of weights for the --network network. If empty, the network's own weights."""
    supervised: str = ""
    """A supervised network for Table 5. If empty, one is trained on the labels of --data, or VGG-16 is used with budget
    paper."""
    classifier: str = ""
    """The classifier for reconstructions, named as in analyze's --classifier. If empty, the supervised network trained
    on --data, or timm:deit_tiny_patch16_224 with budget paper."""
    dino: str = ""
    """A ViT pre-trained with DINO, for its row in Table 1: timm:vit_base_patch16_224.dino has the public weights."""
    dalle: str = ""
    """Folder with DALL-E's public tokenizer, for the rows of DALL-E."""
    segmentation_data: str = ""
    """Images and masks for the segmentation of Tables 3 and 8, as in segment's --data."""
    segmentation_mask_values: tuple[str, ...] = ()
    """Pixel values of the classes, as in segment's --mask-values. If empty, 0, 1, 2, ..., or ADE20K's with budget
    paper."""
    segmentation_ignore: tuple[str, ...] = ()
    """Pixel values or classes that are ignored, as in segment's --ignore. If empty, 255, or ADE20K's with budget
    paper."""
    detection_data: str = ""
    """Images and objects in COCO's format for the detection of Tables 3 and 8, as in detect's --data."""
    kinetics: str = ""
    """A folder of clips for the first column of Table 9, Kinetics-400: videos or folders of frames, as in finetune's
    --data with --clip.frames."""
    ssv2: str = ""
    """A folder of clips for the second column of Table 9, Something-Something v2."""
    more_data: str = ""
    """A larger set of images, on which the tokenizer of a row of `v1-table7` is trained instead of on --data."""
    gpus_per_run: int = 0
    """Number of GPUs per run; other runs use the remaining GPUs. 0 gives each run one GPU, or all GPUs with budget
    paper."""
    micro_batch_size: int = 0
    """Largest number of images that a device processes at once in every training; 0 processes a device's share of the
    batch at once."""
    compile: bool = False
    """Compile the model of every training with torch.compile."""
    views: int = -1
    """Number of views in the token banks that ViTs learn from. -1 chooses it from the length of the pre-training: one
    view per 20 epochs, at least 4, and no bank below 8 epochs. 0 runs the tokenizer in every step instead."""
    train: bool = True
    """Train the missing runs. With --no-train the tables are written from the finished runs alone."""
    dry_run: bool = False
    """Print the plan (its jobs with their GPU-hours and disk space) without training anything."""
    json: bool = False
    """With --dry-run, print the plan as JSON: every job with its command line and the jobs it depends on."""
    commands: str = ""
    """A file to write the plan to, one command per line, instead of training."""
    slurm: str = ""
    """A file for a script that submits the plan to Slurm, instead of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "network_layers")
        positive(self, "length", most=MAX_LENGTH)
        not_negative(self, "gpus_per_run", "micro_batch_size")
        between(self, -1, 1000, "views")
        between(self, 0, LARGEST, "seeds")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            refuse("seeds", f"must be different numbers of 0 or above, not {self.seeds}.")
        if self.json and not self.dry_run:
            refuse("json", "prints the plan: give --dry-run too.")
        if (self.commands or self.slurm) and not self.train:
            refuse("no-train", "writes tables, and --commands and --slurm write plans: give one of them.")
