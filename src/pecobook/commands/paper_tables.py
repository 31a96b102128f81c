"""The paper's tables: the rows, the paper's numbers, and the arm that each row trains.

The numbers are from arXiv 2111.12710v3: ImageNet-1K, ViT-B/16 unless a row names another ViT. An arm is a tokenizer, or
another way to pre-train a backbone (`Arm`); `pecobook reproduce` trains every arm, and the shell completion knows the
table names.
"""

from __future__ import annotations

import dataclasses

from pecobook.commands.duel_arms import ARMS, DUEL, TUNING, run_name, settings_of
from pecobook.errors import ConfigError, did_you_mean

PROBE = ("codeword_probe", "linear probe of codewords, %")
CROSSED = ("crossed_probe", "probe with position removed, %")
"""The probe of codewords at positions other than those it was trained on; the paper gives no such figure."""
CLASSIFIED = ("classified", "reconstructions classified, %")
FINETUNED = ("finetuned", "fine-tuned, %")
DENSE = (("miou", "ADE20K mIoU, %"), ("box_ap", "COCO box AP, %"), ("mask_ap", "COCO mask AP, %"))
CLIPS = (("kinetics", "Kinetics-400, %"), ("ssv2", "Something-Something v2, %"))
ATTACKED = (("bim", "under BIM, %"), ("mi-fgsm", "under MI-FGSM, %"))
MORE = (
    ("position", "position in codes, %"),
    ("null_position", "in permuted codes, %"),
    ("codes_used", "codewords used"),
    ("psnr", "PSNR, dB"),
)
"""Additional figures that are measured; the paper gives none of them."""


EPOCHS = 300
"""Epochs of pre-training in all of the paper's tokenizer comparisons, and of an arm that names none."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm, written `perceptual`, or `perceptual@800` with the epochs, or `perceptual@800@large` with the ViT too."""

    target: str
    """A tokenizer, or a way to train a ViT without a tokenizer."""
    epochs: int = EPOCHS
    """Epochs of pre-training at budget paper; other budgets scale them in proportion."""
    vit: str = "base"

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Return the arm that a row names."""
        target, *rest = text.split("@")
        return cls(target, int(rest[0]) if rest else EPOCHS, *rest[1:])

    @property
    def name(self) -> str:
        """The shortest text that `parse` reads as this arm."""
        words = [self.target, str(self.epochs), self.vit]
        return "@".join(words[: 3 if self.vit != "base" else 2 if self.epochs != EPOCHS else 1])

    def control(self, how: str) -> str:
        """The arm with this length and ViT whose perceptual network has `random` or `shuffled` weights."""
        return dataclasses.replace(self, target=f"{self.target}-{how}").name


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table."""

    label: str
    arm: str
    paper: tuple[float | None, ...] = ()
    """The paper's numbers in the order of the table's figures; None or a missing entry: the paper has no number."""
    control: bool = False
    """Whether the row is a control that the paper does not have."""


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    figures: tuple[tuple[str, str], ...]
    """(figure, heading) of each column."""
    rows: tuple[Row, ...]
    controls: tuple[str, ...] = ("perceptual",)
    """Arms whose perceptual network is also trained with random and with shuffled weights."""
    note: str = ""
    """A remark below the table."""
    more_pairs: tuple[tuple[str, str], ...] = ()
    """Further arms (a, b) whose difference a - b is printed below the table."""

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The paper's rows, and the controls."""
        labels = {row.arm: row.label for row in self.rows}
        rows = list(self.rows)
        for arm in self.controls:
            label = labels.get(arm, "perceptual loss")
            controls = {how: Arm.parse(arm).control(how) for how in ("random", "shuffled")}
            rows += [Row(f"{label}, {how} weights", name, control=True) for how, name in controls.items()]
        return tuple(rows)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Arms (a, b) whose difference a - b is printed: each perceptual loss, the pixel loss and the controls."""
        pairs = []
        for arm in self.controls:
            part = Arm.parse(arm)
            pixel = dataclasses.replace(part, target="pixel").name
            pairs += [(arm, control) for control in (pixel, part.control("random"), part.control("shuffled"))]
        return (*pairs, *self.more_pairs)

    def paper_number(self, row: Row, figure: str) -> float | None:
        """Return the paper's number for a row and figure, or None if the paper has none."""
        numbers = dict(zip((name for name, _ in self.figures), row.paper, strict=False))
        return numbers.get(figure)

    def has_paper_numbers(self, figure: str) -> bool:
        """Return whether the paper gives a number for this figure in any row."""
        return any(self.paper_number(row, figure) is not None for row in self.rows)


_RECIPES = (
    "At budget paper networks from scratch and MAE are trained by their own recipes; all others are fine-tuned by "
    "PeCo's."
)
_TABLE_1 = f"{_RECIPES} BEiT's tokenizer is DALL-E's, trained on other images."
_DENSE = "ADE20K stands for the images of --segmentation-data, COCO for those of --detection-data."
TABLES = {
    "tables1-2": PaperTable(
        "Tables 1 and 2: classification with ViT-B, by what it was pre-trained on",
        (FINETUNED,),
        (
            Row("DeiT, from scratch", "deit", (81.8,)),
            Row("ViT, from scratch", "scratch", (82.3,)),
            Row("DINO", "dino", (82.8,)),
            Row("MoCo v3, 300 epochs", "moco", (83.2,)),
            Row("MAE, 1,600 epochs", "mae@1600", (83.6,)),
            Row("BEiT, 300 epochs", "dalle", (82.8,)),
            Row("BEiT, 800 epochs", "dalle@800", (83.2,)),
            Row("pixel codebook, 300 epochs", "pixel"),
            Row("PeCo lite, 300 epochs", "lite", (84.0,)),
            Row("PeCo lite, 800 epochs", "lite@800", (84.5,)),
            Row("PeCo, 300 epochs", "perceptual", (84.1,)),
            Row("PeCo, 800 epochs", "perceptual@800", (84.5,)),
        ),
        note=f"{_TABLE_1} The paper's DINO was trained for 300 epochs, the public ViT-B of DINO's authors for 400. The "
        "paper also quotes BootMAE at 84.2% after 800 epochs, and 77.9% for a ViT from scratch at 384 pixels.",
    ),
    "table1-large": PaperTable(
        "Table 1: classification with ViT-L",
        (FINETUNED,),
        (
            Row("ViT, from scratch", "scratch@300@large", (82.6,)),
            Row("MoCo v3, 300 epochs", "moco@300@large", (84.1,)),
            Row("MAE, 1,600 epochs", "mae@1600@large", (85.9,)),
            Row("BEiT, 800 epochs", "dalle@800@large", (85.2,)),
            Row("PeCo, 800 epochs", "perceptual@800@large", (86.5,)),
        ),
        controls=(),
        note=f"{_TABLE_1} The paper also quotes BootMAE at 85.9% after 800 epochs, and 76.5% for a ViT from scratch "
        "at 384 pixels.",
    ),
    "table1-huge": PaperTable(
        "Table 1: classification with ViT-H, at 224 and 448 pixels",
        (FINETUNED,),
        (
            Row("ViT, from scratch", "scratch@300@huge", (83.1,)),
            Row("MAE, 1,600 epochs", "mae@1600@huge", (86.9,)),
            Row("MAE, 1,600 epochs, 448 pixels", "mae@1600@huge-448", (87.8,)),
            Row("PeCo, 800 epochs", "perceptual@800@huge", (87.5,)),
            Row("PeCo, 800 epochs, 448 pixels", "perceptual@800@huge-448", (88.3,)),
        ),
        controls=(),
        note=_RECIPES,
    ),
    "table3": PaperTable(
        "Table 3: segmentation (UperNet) and detection (Mask R-CNN)",
        DENSE,
        (
            Row("DeiT, from scratch", "deit", (47.4, 44.1, 39.8)),
            Row("MoCo v3, 300 epochs", "moco", (47.3, 44.9, 40.4)),
            Row("BEiT, 800 epochs", "dalle@800", (47.1, 46.3, 41.1)),
            Row("MAE, 800 epochs", "mae@800", (47.6, 46.8, 41.9)),
            Row("MAE, 1,600 epochs", "mae@1600", (48.1, 47.2, 42.0)),
            Row("pixel codebook, 800 epochs", "pixel@800"),
            Row("PeCo, 800 epochs", "perceptual@800", (48.5, 47.8, 42.6)),
        ),
        controls=("perceptual@800",),
        note=f"{_DENSE} DeiT begins with its classifier, all others with the pre-trained ViT.",
    ),
    "table4": PaperTable(
        "Table 4: how well codewords predict classes",
        (PROBE, CLASSIFIED, CROSSED),
        (
            Row("DALL-E", "dalle", (6.1, 18.2)),
            Row("pixel loss alone", "pixel", (10.2, 17.9)),
            Row("perceptual loss", "perceptual", (29.7, 51.7)),
        ),
        note="The paper classifies reconstructions with a DeiT-T, whose accuracy on originals is 72.2%.",
    ),
    "table5": PaperTable(
        "Table 5: the perceptual network",
        (FINETUNED, PROBE, CROSSED),
        (
            Row("pixel loss alone", "pixel", (82.9,)),
            Row("self-supervised ResNet", "resnet", (84.0,)),
            Row("self-supervised ViT", "vit", (84.1,)),
            Row("supervised network", "supervised", (84.1,)),
        ),
        controls=("resnet", "vit", "supervised"),
        note="The paper's supervised network is a VGG.",
    ),
    "table6": PaperTable(
        "Table 6: semantics in codewords, from a loss on codewords or from a loss on images",
        (FINETUNED, PROBE, CROSSED),
        (
            Row("classification loss on codewords", "classification", (82.9,)),
            Row("contrastive loss on codewords", "contrastive", (82.9,)),
            Row("perceptual loss on images", "perceptual", (84.1,)),
        ),
    ),
    "table7": PaperTable(
        "Table 7: terms of the loss",
        (FINETUNED, PROBE, CROSSED),
        (
            Row("pixel loss", "pixel", (82.9,)),
            Row("pixel and perceptual loss", "perceptual", (84.1,)),
            Row("pixel, perceptual and adversarial loss", "adversarial", (83.9,)),
        ),
    ),
    "table8": PaperTable(
        "Table 8: accelerated pre-training, in which the ViT reads the visible patches alone",
        (FINETUNED, *DENSE),
        (
            Row("MAE, 800 epochs", "mae@800", (83.4, 47.6, 46.8, 41.9)),
            Row("PeCo, visible patches, 800 epochs", "perceptual@800@visible", (84.2, 48.2, 47.3, 42.2)),
            Row("PeCo, all patches, 800 epochs", "perceptual@800", (84.5, 48.5, 47.8, 42.6)),
        ),
        controls=("perceptual@800@visible",),
        note=f"{_DENSE} The last of the paper's rows stands in its Tables 1 and 3.",
    ),
    "table9": PaperTable(
        "Table 9: classification of videos with divided space-time attention",
        CLIPS,
        (
            Row("DeiT, from scratch", "deit", (75.4, 57.6)),
            Row("BEiT, 800 epochs", "dalle@800", (75.5, 60.2)),
            Row("pixel codebook, 800 epochs", "pixel@800"),
            Row("PeCo, 800 epochs", "perceptual@800", (76.5, 61.8)),
        ),
        controls=("perceptual@800",),
        note="Kinetics-400 stands for the clips of --kinetics, Something-Something v2 for those of --ssv2. DeiT begins "
        "with its classifier, all others with the pre-trained ViT.",
    ),
    "table10": PaperTable(
        "Table 10: weight of the perceptual loss, in multiples of the recipe's (1 in the paper)",
        (FINETUNED, PROBE, CROSSED),
        (
            Row("lambda 0", "pixel", (82.9,)),
            Row("lambda 0.3", "lambda-0.3", (84.1,)),
            Row("lambda 1", "perceptual", (84.1,)),
            Row("lambda 3", "lambda-3", (83.6,)),
            Row("lambda 10", "lambda-10", (83.5,)),
        ),
    ),
    "table11": PaperTable(
        "Table 11: accuracy under attack, eps 2/255, 20 steps",
        (FINETUNED, *ATTACKED),
        (
            Row("DeiT, from scratch", "deit", (81.8, 46.2, 50.2)),
            Row("MoCo v3, 300 epochs", "moco", (83.2, 51.8, 54.9)),
            Row("BEiT, 300 epochs", "dalle", (82.8, 50.2, 53.2)),
            Row("MAE, 1,600 epochs", "mae@1600", (83.6, 37.2, 42.2)),
            Row("pixel codebook, 300 epochs", "pixel"),
            Row("PeCo, 300 epochs", "perceptual", (84.1, 52.5, 55.3)),
        ),
        note="The paper does not give the step of the attacks; ours is eps / 20 (docs/decisions.md).",
    ),
    "table12": PaperTable(
        "Table 12: the tokenizer's architecture",
        (FINETUNED, PROBE, CROSSED),
        (
            Row("transformers", "transformers", (83.6,)),
            Row("half the stride, on half the pixels", "half-stride", (83.8,)),
            Row("convolutions", "perceptual", (84.1,)),
            Row("convolutions, decoder of half the width", "half-width", (84.0,)),
            Row("convolutions, decoder of half the depth", "half-depth", (84.1,)),
        ),
    ),
    "v1-table7": PaperTable(
        "Table 7 of version 1: more data for the tokenizer",
        (FINETUNED, PROBE, CROSSED),
        (Row("tokenizer trained on the same images", "perceptual"), Row("on more images", "more-data")),
        note="The numbers of this table are not known to us; the paper's text says that more data does not help.",
    ),
    DUEL: PaperTable(
        "A study fixed beforehand: what a ViT learns from perceptual codes, a control's and pixels",
        (
            ("linear", "linear probe of the ViT, %"),
            ("few", "fine-tuned on 100 labels a class, %"),
            ("knn", "k-NN, %"),
            ("crossed_probe", "probe of codes with position removed, %"),
        ),
        tuple(Row(label, arm) for arm, label in ARMS.items()),
        note="The rule of reading stands in docs/study.md. Steps are equal in all arms, operations are not.",
        more_pairs=(("classification", "pixel"), ("supervised", "pixel")),
    ),
    TUNING: PaperTable(
        "Tuning of the study, on validation images",
        (
            ("validation", "linear probe of the ViT on validation images, %"),
            ("tune", "fine-tuned on 100 labels a class, on validation images, %"),
        ),
        tuple(
            Row(f"{arm}, {setting.name.replace('-', ', ')}", run_name(arm, setting))
            for arm in (*ARMS, "perceptual-random", "perceptual-shuffled")
            for setting in settings_of(arm)
        ),
        controls=(),
        note="The best setting of each arm is taken by `reproduce duel` in this folder; use another seed there.",
    ),
}
ALIASES = {
    "table1": "tables1-2",
    "table1-base": "tables1-2",
    "table2": "tables1-2",
    "v1-table1": "tables1-2",
    "v1-table5": "table4",
    "v1-table6": "table5",
    "video": "table9",
}


def chosen_tables(names: tuple[str, ...]) -> dict[str, PaperTable]:
    """Return tables by name; a name without the prefix `v1-` refers to version 3 of the paper.

    Raises:
        ConfigError: no table is named, or a table does not exist.
    """
    if not names:
        raise ConfigError(f"Name tables: pecobook reproduce table4 ... The tables: {', '.join(TABLES)}.")
    tables = {}
    for name in names:
        key = name.lower().removeprefix("v3-")
        key = ALIASES.get(key, key)
        if key not in TABLES:
            suggestion = did_you_mean(name, [*TABLES, *ALIASES])
            raise ConfigError(f"There is no table '{name}'.{suggestion} The tables: {', '.join(TABLES)}.")
        tables[key] = TABLES[key]
    return tables
