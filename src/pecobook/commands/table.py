"""The table of all commands with settings: a description, the settings class, the content of the short help.

The command line, the help pages and the shell completion read this table. A command is the function of the same name
in `pecobook.commands`, or a training stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.bench import BenchConfig
from pecobook.settings.check import CheckConfig
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.compare import CompareConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.demo import DemoConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.embed import EmbedConfig
from pecobook.settings.evaluate import EvaluateConfig
from pecobook.settings.explore import ExploreConfig
from pecobook.settings.export import ExportConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.predict import PredictConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.push import PushConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.tokenize import TokenizeConfig


class Command(NamedTuple):
    """One command of the command line."""

    summary: str
    """What the command does, for `pecobook --help`."""
    settings: type[Any]
    """The command's settings class."""
    usage: str
    """The usage line after the name of the command."""
    examples: tuple[str, str]
    """Two example commands, without `pecobook`."""
    flags: str
    """The names of the flags in the short help, separated by spaces, most used first."""
    words: tuple[str, ...] = ()
    """The flags whose values may come first, without the flag. A flag that takes several values takes all words."""


_RUN = "out dry-run resume overwrite seed devices precision"
COMMANDS: dict[str, Command] = {
    "contrast": Command(
        "train a feature network on your own images (MoCo v3)",
        ContrastConfig,
        "[RECIPE] --data SOURCE --out RUN",
        (
            "contrast tiny --data photos --out runs/contrast",
            "contrast paper --data IMAGENET --out runs/contrast --compile",
        ),
        f"data init {_RUN} batch-size micro-batch-size max-steps optim.lr model.name",
    ),
    "codebook": Command(
        "train a perceptual codebook (the PeCo tokenizer)",
        CodebookConfig,
        "[RECIPE] --data SOURCE --perceptual.network NETWORK --out RUN",
        (
            "codebook tiny --data photos --perceptual.network none --out runs/codebook",
            "codebook paper --data IMAGENET --perceptual.network runs/contrast --out runs/codebook",
        ),
        "data perceptual.network perceptual.layers perceptual.weights perceptual.weight quantizer.num-codewords "
        "init out dry-run resume overwrite max-steps batch-size micro-batch-size",
    ),
    "pretrain": Command(
        "pre-train a ViT on the tokens of your images",
        PretrainConfig,
        "[RECIPE] --data SOURCE --tokenizer RUN --out RUN",
        (
            "pretrain tiny --data photos --tokenizer runs/codebook --out runs/vit",
            "pretrain --data IMAGENET --tokenizer runs/codebook --tokens BANK --out runs/vit --compile",
        ),
        "data tokenizer tokens target init out dry-run resume overwrite model.name max-steps batch-size "
        "micro-batch-size",
    ),
    "finetune": Command(
        "fine-tune a backbone for classification",
        FinetuneConfig,
        "[RECIPE] --data SOURCE --backbone RUN|timm:NAME --out RUN",
        (
            "finetune tiny --data photos --backbone runs/vit --out runs/classifier",
            "finetune --data IMAGENET --backbone timm:vit_base_patch16_224 --out runs/classifier",
        ),
        "data backbone weights init out dry-run resume overwrite optim.lr optim.layer-decay max-steps batch-size "
        "micro-batch-size",
    ),
    "segment": Command(
        "train semantic segmentation on a backbone (UperNet)",
        SegmentConfig,
        "[RECIPE] --data FOLDER --backbone RUN|timm:NAME --out RUN",
        (
            "segment tiny --data SHAPES --backbone runs/vit --out runs/segmenter",
            "segment paper --data ADEChallengeData2016 --backbone runs/vit --out runs/segmenter",
        ),
        "data classes mask-values ignore skip-bad backbone init out dry-run resume overwrite image-size max-steps "
        "batch-size",
    ),
    "detect": Command(
        "train boxes and instance masks on a backbone (Mask R-CNN)",
        DetectConfig,
        "[RECIPE] --data FOLDER --backbone RUN|timm:NAME --out RUN",
        (
            "detect tiny --data NUCLEI --backbone runs/vit --out runs/detector",
            "detect paper --data COCO --backbone runs/vit --out runs/detector",
        ),
        "data skip-bad masks backbone init out dry-run resume overwrite scales max-size image-size max-steps "
        "batch-size",
    ),
    "check": Command(
        "look at every image: what a command would learn from, and what is wrong with it",
        CheckConfig,
        "[COMMAND [RECIPE]] --data SOURCE [COMMAND'S FLAGS]",
        ("check --data IMAGES --out sheet.png", "check segment camvid --data CAMVID --json"),
        "data value-range classes mask-values ignore skip-bad masks out samples json workers",
        words=("task", "recipe"),
    ),
    "tokenize": Command(
        "write the tokens of views of your images once, for pretrain --tokens",
        TokenizeConfig,
        "[RECIPE OF PRETRAIN] --data SOURCE --tokenizer RUN --out BANK --views V",
        (
            "tokenize tiny --data photos --tokenizer runs/codebook --out runs/tokens --views 4",
            "tokenize --data IMAGENET --tokenizer runs/codebook --out runs/tokens --views 20",
        ),
        "data tokenizer views out shard resume overwrite seed image-size tokenizer-size batch-size workers",
    ),
    "analyze": Command(
        "measure what the codewords of tokenizers mean: figures, galleries, a report",
        AnalyzeConfig,
        "--tokenizer RUN [--against RUN ...] --data SOURCE --out DIR",
        (
            "analyze --tokenizer runs/codebook --data photos --out runs/analysis",
            "analyze --tokenizer runs/codebook --against runs/pixel --data IMAGES --out runs/analysis",
        ),
        "tokenizer against tokens backbone data out overwrite classifier perceptual codewords max-train max-test",
    ),
    "evaluate": Command(
        "measure tokenizers as others publish them: rFID, PSNR, SSIM, LPIPS, usage, speed",
        EvaluateConfig,
        "TOKENIZER [TOKENIZER ...] --data SOURCE --out DIR",
        (
            "evaluate runs/codebook runs/pixel --data photos --out runs/evaluation",
            "evaluate taming:vqgan.ckpt --data IMAGENET --metrics rfid psnr --out runs/vqgan",
        ),
        "tokenizers data out overwrite metrics split num-images image-size inception-weights statistics "
        "lpips-weights perceptual batch-size precision",
        words=("tokenizers",),
    ),
    "explore": Command(
        "serve a page on this machine to explore codewords and masks",
        ExploreConfig,
        "RUN [RUN ...] --data SOURCE",
        ("explore runs/codebook --data photos", "explore runs/codebook runs/vit --data IMAGES --port 8000"),
        "runs data images host port upload-mb",
        words=("runs",),
    ),
    "reproduce": Command(
        "rerun the experiments of the paper's tables at a chosen budget, with controls and several seeds",
        ReproduceConfig,
        "TABLE [TABLE ...] --data SOURCE --out DIR",
        (
            "reproduce table4 --data photos --out runs/tables",
            "reproduce table4 table5 --budget small --seeds 0 1 2 3 --data CIFAR10 --out runs/tables",
        ),
        "tables data out budget seeds length transfer network classifier dalle gpus-per-run dry-run commands slurm",
        words=("tables",),
    ),
    "bench": Command(
        "measure how fast pre-training runs here, and how long each part takes",
        BenchConfig,
        "pretrain [RECIPE]",
        ("bench pretrain tiny", "bench pretrain paper --batch-size 128 --compile --out bench.json"),
        "recipe data tokenizer batch-size precision compile steps data-steps out",
        words=("recipe",),
    ),
    "export": Command(
        "write a run's weights for timm, transformers or ONNX",
        ExportConfig,
        "RUN --format timm|hf|onnx --out DIR",
        ("export runs/vit --format timm --out vit-timm", "export runs/codebook --format onnx --out codebook-onnx"),
        "run format out",
        words=("run",),
    ),
    "predict": Command(
        "apply a trained classifier, segmenter or detector to images",
        PredictConfig,
        "RUN IMAGES --out DIR",
        (
            "predict runs/classifier IMAGES --out runs/predictions",
            "predict runs/detector photo.jpg --out found --score 0.7",
        ),
        "run images out pictures score test.mode test.scales test.flip attack.names",
        words=("run", "images"),
    ),
    "probe": Command(
        "measure linear probe and k-NN of a backbone, or of a tokenizer's codewords",
        ProbeConfig,
        "--data SOURCE --backbone RUN|timm:NAME|TOKENIZER",
        ("probe --data photos --backbone runs/vit", "probe --data IMAGES --backbone runs/codebook --out probe.json"),
        "data backbone weights out image-size max-train max-test seed",
    ),
    "embed": Command(
        "write a feature vector for every image to a file; needs no labels",
        EmbedConfig,
        "RUN|timm:NAME --data SOURCE --out FILE.parquet|.npy|.npz",
        (
            "embed runs/vit --data IMAGES --out features.parquet",
            "embed runs/codebook --data IMAGES --codes --out codes.npz",
        ),
        "backbone data out layer pool codes weights image-size batch-size workers shard overwrite",
        words=("backbone",),
    ),
    "compare": Command(
        "set training runs side by side: curves, evaluations, settings that differ",
        CompareConfig,
        "RUN [RUN ...] --out DIR",
        (
            "compare runs/codebook runs/pixel --out runs/comparison",
            "compare low=runs/a high=runs/b --metrics loss evaluation/psnr --out runs/rates",
        ),
        "runs metrics out overwrite",
        words=("runs",),
    ),
    "push": Command(
        "upload the export of a run to the Hugging Face hub, with a complete model card",
        PushConfig,
        "RUN OWNER/NAME",
        ("push runs/codebook me/codebook --license mit --dry-run", "push runs/vit me/vit --private --revision v2"),
        "run repo license private revision message dry-run",
        words=("run", "repo"),
    ),
    "demo": Command(
        "run all stages on built-in photographs in minutes, with a report",
        DemoConfig,
        "[--out DIR]",
        ("demo", "demo --data IMAGES --out runs/demo --length 2"),
        "data out seed budget length max-train max-test",
    ),
}
