"""`pecobook COMMAND --help` on one screen, from the explanations of the settings; `--help-all` shows every flag."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from pecobook.recipes import DEFAULT_RECIPE, RECIPES, claim
from pecobook.settings.values import flag, flags

_WIDTH = 100


class Page(NamedTuple):
    """The content of a command's help, in addition to the recipes of the command."""

    usage: str
    """Words after the command's name."""
    examples: tuple[str, str]
    """Words after `pecobook` of two example commands."""
    flags: str
    """Names of the most used flags, separated by spaces, most used first."""


_RUN = "out resume overwrite seed devices precision"
PAGES: dict[str, Page] = {
    "contrast": Page(
        "[RECIPE] --data SOURCE --out RUN",
        (
            "contrast tiny --data photos --out runs/contrast",
            "contrast paper --data IMAGENET --out runs/contrast --compile",
        ),
        f"data {_RUN} batch-size micro-batch-size max-steps optim.lr model.name",
    ),
    "codebook": Page(
        "[RECIPE] --data SOURCE --perceptual.network NETWORK --out RUN",
        (
            "codebook tiny --data photos --perceptual.network none --out runs/codebook",
            "codebook paper --data IMAGENET --perceptual.network runs/contrast --out runs/codebook",
        ),
        "data perceptual.network perceptual.layers perceptual.weights perceptual.weight quantizer.num-codewords "
        "out resume overwrite max-steps batch-size micro-batch-size",
    ),
    "pretrain": Page(
        "[RECIPE] --data SOURCE --tokenizer RUN --out RUN",
        (
            "pretrain tiny --data photos --tokenizer runs/codebook --out runs/vit",
            "pretrain --data IMAGENET --tokenizer runs/codebook --tokens BANK --out runs/vit --compile",
        ),
        "data tokenizer tokens target out resume overwrite model.name max-steps batch-size micro-batch-size",
    ),
    "finetune": Page(
        "[RECIPE] --data SOURCE --backbone RUN|timm:NAME --out RUN",
        (
            "finetune tiny --data photos --backbone runs/vit --out runs/classifier",
            "finetune --data IMAGENET --backbone timm:vit_base_patch16_224 --out runs/classifier",
        ),
        "data backbone weights out resume overwrite optim.lr optim.layer-decay max-steps batch-size micro-batch-size",
    ),
    "segment": Page(
        "[RECIPE] --data FOLDER --backbone RUN|timm:NAME --out RUN",
        (
            "segment tiny --data SHAPES --backbone runs/vit --out runs/segmenter",
            "segment paper --data ADEChallengeData2016 --backbone runs/vit --out runs/segmenter",
        ),
        "data classes mask-values ignore skip-bad backbone out resume overwrite image-size max-steps batch-size",
    ),
    "detect": Page(
        "[RECIPE] --data FOLDER --backbone RUN|timm:NAME --out RUN",
        (
            "detect tiny --data NUCLEI --backbone runs/vit --out runs/detector",
            "detect paper --data COCO --backbone runs/vit --out runs/detector",
        ),
        "data skip-bad masks backbone out resume overwrite scales max-size image-size max-steps batch-size",
    ),
    "tokenize": Page(
        "[RECIPE OF PRETRAIN] --data SOURCE --tokenizer RUN --out BANK --views V",
        (
            "tokenize tiny --data photos --tokenizer runs/codebook --out runs/tokens --views 4",
            "tokenize --data IMAGENET --tokenizer runs/codebook --out runs/tokens --views 20",
        ),
        "data tokenizer views out resume overwrite seed image-size tokenizer-size batch-size workers devices",
    ),
    "analyze": Page(
        "--tokenizer RUN [--against RUN ...] --data SOURCE --out DIR",
        (
            "analyze --tokenizer runs/codebook --data photos --out runs/analysis",
            "analyze --tokenizer runs/codebook --against runs/pixel --data IMAGES --out runs/analysis",
        ),
        "tokenizer against tokens backbone data out overwrite classifier perceptual codewords max-train max-test",
    ),
    "explore": Page(
        "RUN [RUN ...] --data SOURCE",
        ("explore runs/codebook --data photos", "explore runs/codebook runs/vit --data IMAGES --port 8000"),
        "runs data images host port share upload-mb",
    ),
    "reproduce": Page(
        "TABLE [TABLE ...] --data SOURCE --out DIR",
        (
            "reproduce table4 --data photos --out runs/tables",
            "reproduce table4 table5 --budget small --seeds 0 1 2 3 --data CIFAR10 --out runs/tables",
        ),
        "tables data out budget seeds length transfer network classifier dalle gpus-per-run dry-run",
    ),
    "bench": Page(
        "pretrain [RECIPE]",
        ("bench pretrain tiny", "bench pretrain paper --batch-size 128 --compile --out bench.json"),
        "recipe data tokenizer batch-size precision compile steps data-steps out",
    ),
    "export": Page(
        "RUN --format timm|hf|onnx --out DIR",
        ("export runs/vit --format timm --out vit-timm", "export runs/codebook --format onnx --out codebook-onnx"),
        "run format out",
    ),
    "predict": Page(
        "RUN IMAGES --out DIR",
        (
            "predict runs/classifier IMAGES --out runs/predictions",
            "predict runs/detector photo.jpg --out found --score 0.7",
        ),
        "run images out pictures score test.mode test.scales test.flip",
    ),
    "probe": Page(
        "--data SOURCE --backbone RUN|timm:NAME",
        ("probe --data photos --backbone runs/vit", "probe --data IMAGES --backbone timm:resnet50 --out probe.json"),
        "data backbone weights out image-size max-train max-test seed",
    ),
    "demo": Page(
        "[--out DIR]",
        ("demo", "demo --data IMAGES --out runs/demo --length 2"),
        "data out seed budget length max-train max-test",
    ),
}


def page(command: str, config: Any, recipe: str = "") -> str:
    """Return the short help of a command, at most 40 lines of 100 columns.

    Args:
        command: name of the command, a key of `PAGES`.
        config: settings whose values are shown as defaults.
        recipe: name of the recipe of these settings, where there is one.
    """
    content = PAGES[command]
    usage = f"usage: pecobook {command} {content.usage} [--flag\N{NO-BREAK SPACE}value\N{NO-BREAK SPACE}...]"
    usage = "\n".join(textwrap.wrap(usage, _WIDTH, subsequent_indent="    ")).replace("\N{NO-BREAK SPACE}", " ")
    lines = [usage, "", inspect.getdoc(type(config)) or ""]
    if command in RECIPES:
        lines += ["", f"recipes (without one: {DEFAULT_RECIPE}; more: pecobook recipes {command} NAME)"]
        lines += [_cut(f"  {name:<16} {claim(command, name)}") for name in RECIPES[command]]
    lines += ["", "examples", *(f"  pecobook {example}" for example in content.examples), ""]
    lines.append(f"flags (defaults of recipe {recipe})" if recipe else "flags")
    types, texts = flags(type(config)), explanations(type(config))
    for name in content.flags.split():
        ending = _default(attrgetter(name.replace("-", "_"))(config), types[name])
        lines.append(_cut(f"  --{name:<24} {first_sentence(texts[name])}", ending))
    lines.append("  --config FILE              Read settings from the config.json of a run; flags change single ones.")
    return "\n".join([*lines, "", f"--help-all explains all {len(types) + 1} flags."])


def _default(value: Any, kind: Any) -> str:
    """Return the default and the other choices in brackets, or an empty text for a default of nothing."""
    if typing.get_origin(kind) is Literal:
        return f" ({value}; or {', '.join(str(choice) for choice in typing.get_args(kind) if choice != value)})"
    if value is False or value in ("", ()):
        return ""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" ({'on' if value is True else text})"


def _cut(text: str, ending: str = "") -> str:
    room = _WIDTH - len(ending)
    return (text if len(text) <= room else text[: room - 3].rpartition(" ")[0].rstrip(",:;") + " ...") + ending


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop that is followed by a space."""
    head, dot, _ = text.partition(". ")
    return head + "." if dot else text


def explanations(config_type: type[Any], prefix: str = "") -> dict[str, str]:
    """Return the explanation under each field of a settings class by the name of its flag; nested flags have dots."""
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__[:-1]):
        texts |= {prefix + name: text for name, text in _explanations_in(base).items()}
    for name, kind in typing.get_type_hints(config_type).items():
        if dataclasses.is_dataclass(kind):
            texts |= explanations(typing.cast("type[Any]", kind), f"{prefix}{flag(name)}.")
    return texts


@functools.cache
def _explanations_in(kind: type[Any]) -> dict[str, str]:
    """Return the explanations in the source of a class, without the explanations in its base classes."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            text = ast.literal_eval(after.value)  # type: ignore[attr-defined]
            texts[flag(field.target.id)] = " ".join(str(text).split())
    return texts
