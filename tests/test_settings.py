"""Values that settings refuse, the error messages, and settings that commands no longer have."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

import pecobook.settings
from pecobook import cli
from pecobook.commands.table import COMMANDS
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.settings.changes import changed_settings, complete
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.images import JitterConfig, PhotometricConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.tokenize import TokenizeConfig
from pecobook.settings.training import BaseOptimConfig, OptimConfig
from pecobook.settings.values import flag, flags, load, replace, to_dict


def refused(text: str) -> Any:
    return pytest.raises(ConfigError, match=re.escape(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": "two"}, "--optim.lr takes a number, not 'two'."),
        ({"optim.betas": ("0.9",)}, "--optim.betas takes 2 values, not 1."),
        ({"optim.clip_grad": -1}, "--optim.clip-grad must be 0 or above, not -1.0."),
        ({"optim.warmup": "soon"}, "--optim.warmup is 'soon': give steps (5000), epochs ('10 epochs'), images"),
        ({"quantizer.num_codewords": 0}, "--quantizer.num-codewords must be above 0, not 0."),
        ({"quantizer": {"decay": 2}}, "--quantizer.decay must be at least 0 and below 1, not 2.0."),
        ({"explicit.kind": "both"}, "--explicit.kind is one of none, classification, contrastive, not 'both'."),
    ],
)
def test_replace__names_the_full_flag(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CodebookConfig(), changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_replace__reports_all_wrong_values_one_in_each_line() -> None:
    wrong = {
        "batch_size": "many",
        "optim.lr": "two",
        "optim.eps": 0,
        "quantizer": {"decay": 2, "num_codewords": 0},
        "model.num_heads": 0,  # errors that follow from this one are not reported
        "model.kind": "vit",
        "model.channels": (64, 8),
        "devices": "none",
        "image_size": 0,
        "max_steps": "ten",
        "optim.warmup": "soon",
        "nothing": 1,
    }
    with pytest.raises(ConfigError) as caught:
        replace(CodebookConfig(), wrong)
    assert set(str(caught.value).splitlines()) == {
        "--batch-size takes a whole number, not 'many'.",
        "--optim.lr takes a number, not 'two'.",
        "--optim.eps must be above 0, not 0.0.",
        "--quantizer.decay must be at least 0 and below 1, not 2.0.",
        "--quantizer.num-codewords must be above 0, not 0.",
        "--model.num-heads must be above 0, not 0.",
        "--devices must be a number above 0 or auto, not 'none'.",
        "--image-size must be above 0, not 0.",
        "--max-steps is 'ten': give steps (5000), epochs ('100 epochs') or images ('25600 images').",
        "--optim.warmup is 'soon': give steps (5000), epochs ('10 epochs'), images ('25600 images') or a share of the "
        "training ('5%').",
        "Unknown setting 'nothing'.",
    }
    with pytest.raises(ConfigError) as caught:
        replace(SegmentConfig(), {"scales": (3, 1), "head_width": -1})
    assert set(str(caught.value).splitlines()) == {
        "--scales takes the smallest and the largest factor, not (3.0, 1.0).",
        "--head-width must be 0 or above, not -1.",
    }


# Fields that take every finite number, with the reason.
OPEN_RANGES = {
    "perceptual.mean": "the mean of a normalised input may have either sign",
}


def numeric_fields() -> list[Any]:
    """Return (command, flag, number of values) of every field with one or more numbers."""
    fields = []
    for command, entry in COMMANDS.items():
        for name, kind in flags(entry.settings).items():
            kinds = get_args(kind) if get_origin(kind) is tuple else (kind,)
            count = 3 if kinds[-1] is Ellipsis else len(kinds)
            if {kind for kind in kinds if kind is not Ellipsis} <= {int, float}:
                fields.append(pytest.param(entry.settings, name, count, id=f"{command}-{name}"))
    return fields


@pytest.mark.parametrize(("kind", "name", "count"), numeric_fields())
def test_replace__refuses_impossible_numbers_in_every_field(kind: type[Any], name: str, count: int) -> None:
    for value in (-1e9, math.nan, math.inf):
        if value == -1e9 and name in OPEN_RANGES:
            continue
        with pytest.raises(ConfigError) as caught:
            replace(
                kind(),
                {name.replace("-", "_"): value if count == 1 else tuple(value + number for number in range(count))},
            )
        assert f"--{name}" in str(caught.value)


def test_replace__names_the_flag_of_a_json_argument() -> None:
    with refused("--backbone.args is not JSON"):
        replace(ReproduceConfig(), {"backbone.args": "x"})
    with refused("--model.args must be a JSON object"):
        replace(ContrastConfig(), {"model.args": "[3]"})


def test_replace__reports_a_conflict_only_where_all_values_are_right() -> None:
    with refused("--image-size 20 must be a multiple of 16"):
        replace(CodebookConfig(), {"image_size": 20})
    with pytest.raises(ConfigError) as caught:  # here the conflict may follow from the other mistake
        replace(CodebookConfig(), {"image_size": 20, "model.channels": "two"})
    assert str(caught.value) == "--model.channels takes a whole number, not 'two'."


def test_flags__commands_have_no_setting_that_they_do_not_read() -> None:
    for kind in (ContrastConfig, CodebookConfig, PretrainConfig):
        assert "optim.layer-decay" not in flags(kind)
    for dense in (SegmentConfig, DetectConfig):
        assert "min-crop" not in flags(dense)
        assert "optim.layer-decay" in flags(dense)
    assert "compile" not in flags(DetectConfig)
    assert not DetectConfig().compile
    assert all("compile" in flags(kind) for kind in (ContrastConfig, FinetuneConfig, SegmentConfig))
    assert not {"colour.blur", "colour.solarise"} & flags(ContrastConfig).keys()
    assert {"colour.blur", "colour.solarise"} <= flags(PretrainConfig).keys()
    assert "strategy" not in flags(TokenizeConfig)
    crops = [kind().min_crop for kind in (CodebookConfig, PretrainConfig, ContrastConfig, FinetuneConfig)]
    assert crops == [0.2, 0.2, 0.08, 0.08]


def test_narrow__takes_a_subclass_and_refuses_settings_that_would_not_be_read() -> None:
    config = ContrastConfig(optim=OptimConfig(lr=2.0), colour=PhotometricConfig(hue=0.3))
    assert config == ContrastConfig(optim=BaseOptimConfig(lr=2.0), colour=JitterConfig(hue=0.3))
    with refused("--optim.layer-decay is not a setting of this command"):
        PretrainConfig(optim=OptimConfig(layer_decay=0.5))
    with refused("--colour.blur is not a setting of this command"):
        ContrastConfig(colour=PhotometricConfig(blur=0.5))
    assert FinetuneConfig(optim=OptimConfig(layer_decay=0.5)).optim.layer_decay == 0.5


@pytest.mark.parametrize("command", ["finetune", "segment", "detect"])
def test_random_weights__get_no_layer_decay_unless_it_is_given(command: str, tmp_path: Path) -> None:
    base = recipe(command, "paper")
    assert base.optim.layer_decay < 1
    scratch = replace(base, {"weights": "random"})
    assert scratch.optim == dataclasses.replace(base.optim, layer_decay=1.0)
    assert replace(base, {"weights": "file.pth"}).optim == base.optim
    for asked in ({"optim.layer_decay": "0.5"}, {"optim": {"layer_decay": 0.5}}):
        assert replace(base, {"weights": "random", **asked}).optim.layer_decay == 0.5
        assert replace(scratch, asked).optim.layer_decay == 0.5
    words = ["--weights", "random", "--optim.lr", "0.1"]
    assert cli.parse(base, words, command).optim == dataclasses.replace(base.optim, layer_decay=1.0, lr=0.1)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(scratch, {"optim.layer_decay": 0.7}))))
    assert load(base, tmp_path).optim.layer_decay == 0.7  # of a run from before this rule, or of one that asked for it


def test_load_and_changed_settings__take_runs_of_version_0_1_0(tmp_path: Path) -> None:
    """Of a setting that is gone, a value that had no effect is left out, and another is refused."""
    now = to_dict(CodebookConfig(seed=3))
    old = {**now, "quantizer": {**now["quantizer"], "learning": "ema"}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load(CodebookConfig(), tmp_path) == CodebookConfig(seed=3)
    assert changed_settings(complete(old, now), now) == []
    old["quantizer"]["learning"] = "gradient"
    (tmp_path / "config.json").write_text(json.dumps(old))
    with refused("Unknown setting 'quantizer.learning'"):
        load(CodebookConfig(), tmp_path)
    assert changed_settings(complete(old, now), now) == ["quantizer.learning: gradient -> None"]


def test_changed_settings__take_another_spelling_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for same in (str(tmp_path / "a"), "./a", "b/../a"):
        assert changed_settings({"data": "a"}, {"data": same}) == []
    shards = "a/x-{000..009}.tar"  # no file has this name
    assert changed_settings({"data": shards}, {"data": str(tmp_path / shards)}) == []
    for old, new in (("a", "b"), ("a", "c"), ("", str(tmp_path)), ("a", ["a"]), ("0" * 5000, "a")):
        assert changed_settings({"data": old}, {"data": new}) == [f"data: {old} -> {new}"]


def settings_classes() -> list[type[Any]]:
    modules = [
        importlib.import_module(f"pecobook.settings.{module.name}")
        for module in pkgutil.iter_modules(pecobook.settings.__path__)
    ]
    classes = {c for module in modules for c in vars(module).values() if dataclasses.is_dataclass(c)}
    return sorted((c for c in classes if isinstance(c, type)), key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", settings_classes())
def test_settings__refuse_what_is_none_of_the_choices_also_in_python(kind: type[Any]) -> None:
    hints = typing.get_type_hints(kind)
    assert hasattr(kind.__init__, "__wrapped__"), f"{kind.__name__} is not made by settings_class"
    for field in dataclasses.fields(kind):
        value: Any = ("mirror",) if typing.get_origin(hints[field.name]) is tuple else "mirror"
        if "Literal" in repr(hints[field.name]):
            with refused(f"--{flag(field.name)} "):
                kind(**{field.name: value})


def test_settings__built_in_python_have_the_declared_types() -> None:
    assert CodebookConfig(resume="false").resume is False  # type: ignore[arg-type]
    assert CodebookConfig(resume="auto").resume == "auto"
