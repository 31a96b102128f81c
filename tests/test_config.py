"""Settings: durations, types, replacing, the round trip to disk, and the messages for wrong values."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pecobook.settings
from pecobook.settings.changes import FREE_ON_RESUME, changed_settings, complete
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.tracking import TrackingConfig
from pecobook.settings.training import BackboneConfig, BaseOptimConfig, CropTrainConfig, OptimConfig
from pecobook.settings.values import (
    between,
    coerce,
    flag,
    flags,
    load,
    positive,
    replace,
    to_dict,
)
from pecobook.utils.files import write_json
from tests.test_durations import refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(CropTrainConfig):
    """Settings with a field of every kind."""

    model: BackboneConfig = BackboneConfig()
    layers: tuple[int, ...] = (3, 6)
    limit: int | None = None
    share: float = 0.5


# -------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        ("3", int, 3),
        (3.0, int, 3),
        ("3", float, 3.0),
        (3, float, 3.0),
        ("1e-4", float, 1e-4),
        (True, bool, True),
        ("False", bool, False),
        ("true", bool, True),
        ("text", str, "text"),
        (5000, str, "5000"),
        (Path("a/b"), str, "a/b"),
        ("adam", Literal["adamw", "adam"], "adam"),
        ([1, "2"], tuple[int, ...], (1, 2)),
        (7, tuple[int, ...], (7,)),
        ("tensorboard", tuple[str, ...], ("tensorboard",)),
        ([], tuple[int, ...], ()),
        ([0.9, 0.95], tuple[float, float], (0.9, 0.95)),
        (None, int | None, None),
        ("4", int | None, 4),
    ],
)
def test_coerce__takes_values_of_json_python_and_flags(value: Any, kind: Any, expected: Any) -> None:
    coerced = coerce(value, kind, "field_name")
    assert coerced == expected
    assert type(coerced) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (1.5, int, "--field-name takes a whole number, not '1.5'"),
        ("1.5", int, "--field-name takes a whole number, not '1.5'"),
        (True, int, "--field-name takes a whole number, not 'True'"),
        ("many", float, "--field-name takes a number, not 'many'"),
        (False, float, "--field-name takes a number, not 'False'"),
        (None, float, "--field-name takes a number, not 'None'"),
        (1, bool, "--field-name takes true or false, not '1'"),
        ("yes", bool, "--field-name takes true or false, not 'yes'"),
        (True, str, "--field-name takes a text, not 'True'"),
        ([1], str, "--field-name takes a text, not '[1]'"),
        ("adamx", Literal["adamw", "adam"], "--field-name is one of adamw, adam, not 'adamx'. Did you mean 'adam"),
        ([0.9], tuple[float, float], "--field-name takes 2 values, not 1"),
        (["a"], tuple[int, ...], "--field-name takes a whole number, not 'a'"),
        ("x", int | None, "--field-name takes a whole number, not 'x'"),
    ],
)
def test_coerce__names_the_flag_the_value_and_the_values_it_takes(value: Any, kind: Any, message: str) -> None:
    with refused(message):
        coerce(value, kind, "field_name")


def test_flags__name_every_field_once() -> None:
    types = flags(Sample)
    assert types["optim.weight-decay"] is float
    assert types["max-steps"] is str
    assert types["model.args"] is str
    assert types["limit"] == int | None
    assert "optim" not in types
    groups = (BaseOptimConfig, BackboneConfig, TrackingConfig)
    assert len(types) == len(dataclasses.fields(Sample)) - len(groups) + sum(len(flags(group)) for group in groups)
    assert flag("max_steps") == "max-steps"


# ---------------------------------------------------------------------------------------------------------- replacing


def test_replace__by_nested_dictionaries_and_dotted_names() -> None:
    config = Sample()
    nested = replace(config, {"optim": {"lr": 1, "betas": [0.9, 0.95]}, "seed": "7"})
    dotted = replace(config, {"optim.lr": 1.0, "optim.betas": (0.9, 0.95), "seed": 7})
    mixed = replace(config, {"optim": {"lr": 1}, "optim.betas": [0.9, 0.95], "seed": 7})
    assert nested == dotted == mixed
    assert nested.optim == BaseOptimConfig(lr=1.0, betas=(0.9, 0.95))
    assert nested.optim.weight_decay == config.optim.weight_decay
    assert config == Sample()
    assert replace(config, {}) == config
    assert type(nested) is Sample


def test_replace__an_unknown_name_suggests_one() -> None:
    with refused("Unknown setting 'batchsize'. Did you mean 'batch_size'?"):
        replace(Sample(), {"batchsize": 3})
    with refused("Unknown setting 'optim.learning'"):
        replace(Sample(), {"optim.learning": 3})
    with refused("Unknown setting 'zzz'.") as caught:
        replace(Sample(), {"zzz": 3})
    assert "Did you mean" not in str(caught.value)


def test_replace__checks_values_again() -> None:
    with refused("--optim.lr must be above 0, not -1.0"):
        replace(Sample(), {"optim": {"lr": -1}})
    with refused("--seed takes a whole number, not '0.5'"):
        replace(Sample(), {"seed": 0.5})


# --------------------------------------------------------------------------------------------------------- round trip


INTEGERS = st.integers(-(2**53), 2**53)


@st.composite
def configs(draw: st.DrawFn) -> Sample:
    positive_floats, below_one = st.floats(1e-12, 1e6), st.floats(0, 1, exclude_max=True)
    return Sample(
        data=draw(st.text(st.characters(exclude_characters="\0"))),
        seed=draw(st.integers(0, 2**31 - 1)),
        batch_size=draw(st.integers(1, 10**6)),
        layers=tuple(draw(st.lists(INTEGERS))),
        limit=draw(st.none() | INTEGERS),
        share=draw(st.floats(allow_nan=False, allow_infinity=False)),
        loggers=tuple(draw(st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow"]), unique=True))),
        optim=OptimConfig(lr=draw(positive_floats), betas=(draw(below_one), draw(below_one))),
        model=BackboneConfig(args=json.dumps(draw(st.dictionaries(st.text(), st.integers())))),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_dump_and_load__are_a_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Sample) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_json(folder / "config.json", to_dict(config))
    assert load(Sample(), folder / "config.json") == config
    assert load(Sample(seed=5), folder) == config  # load also takes a run folder
    assert to_dict(config) == json.loads((folder / "config.json").read_text())


def test_load__takes_a_part_and_drops_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"command": "codebook", "seed": 3, "optim": {"lr": 2}}')
    assert load(Sample(batch_size=7), tmp_path) == Sample(batch_size=7, seed=3, optim=OptimConfig(lr=2.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "does not hold a JSON object"),
        (b'{"colour": 1}', "Unknown setting 'colour'"),
    ],
)
def test_load__refuses_a_broken_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with refused(message):
        load(Sample(), tmp_path / "config.json")


_YAML = """# my run
seed: 3
batch-size: 64   # a flag's name
optim:
  lr: 2e-3
  betas: [0.9, 0.95]
"""
_TOML = """# my run
seed = 3
batch-size = 64   # a flag's name
[optim]
lr = 2e-3
betas = [0.9, 0.95]
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", _YAML),
        ("a.YML", _YAML),
        ("a.toml", _TOML),
        ("b.yaml", "recipe: tiny\nseed: 3\nbatch_size: 64\noptim.lr: 0.002\noptim.betas: [0.9, 0.95]\n"),
        ("b.toml", "seed = 3\nbatch_size = 64\noptim.lr = 0.002\noptim.betas = [0.9, 0.95]\n"),
    ],
)
def test_load__takes_yaml_and_toml(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    expected = Sample(seed=3, batch_size=64, optim=OptimConfig(lr=0.002, betas=(0.9, 0.95)))
    assert load(Sample(), tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\noptim:\n  # rate\n  lr: fast\n", "a.yaml', line 4: --optim.lr takes a number, not 'fast'"),
        ("a.yaml", "seed: 1\noptim.lr: fast\n", "a.yaml', line 2: --optim.lr takes a number"),
        ("a.toml", "seed = 1\n[optim]\n\nlr = 'fast'\n", "a.toml', line 4: --optim.lr takes a number, not 'fast'"),
        ("a.json", '{"seed": 1,\n "optim": {\n  "lr": "fast"}}', "a.json', line 3: --optim.lr takes a number"),
        ("a.yaml", "seed: 1\nbatch-sise: 4\n", "a.yaml', line 2: Unknown setting 'batch_sise'. Did you mean"),
        ("a.yaml", "lr: 3\nbatch-size: -1\n", "a.yaml', line 2: --batch-size must be above 0"),
        ("a.yaml", "seed: 1\n  x: [\n", r"a.yaml', line 2: this is no YAML: mapping values are not allowed"),
        ("a.yaml", "seed: 1\nseed: 2\n", "a.yaml', line 2: 'seed' stands there twice"),
        ("a.json", '{"optim": {"lr": 1, "lr": 2}}', "a.json' cannot be read: 'lr' stands there twice: keep one"),
        ("a.yaml", "seed: 1\noptim:\n  3: 2\n", "a.yaml', line 3: a setting has a name of letters, not '3'"),
        ("a.yaml", "seed: !!python/object:os.system x\n", "a.yaml', line 1: this is no YAML: could not determine"),
        ("a.yaml", "# nothing\n", "a.yaml' holds no settings, which are lines such as"),
        ("a.yaml", "- 1\n", "a.yaml' holds no settings"),
        ("a.toml", "seed = 1\nseed = 2\n", r"a.toml' is no TOML: Cannot overwrite a value (at line 2"),
        ("a.toml", "seed = \n", r"a.toml' is no TOML: Invalid value (at line 1"),
    ],
)
def test_load__names_the_line_of_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with refused(message):
        load(Sample(), tmp_path / name)


@pytest.mark.parametrize("name", ["a.yaml", "a.toml"])
def test_load__refuses_bytes_that_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with refused("cannot be read"):
        load(Sample(), tmp_path / name)


def test_load__refuses_a_missing_file(tmp_path: Path) -> None:
    with refused("There is no configuration file"):
        load(Sample(), tmp_path / "none.json")


# ---------------------------------------------------------------------------------------------------------- comparing


def test_changed_settings__lists_settings_that_must_not_change_on_resume() -> None:
    old, new = Sample(), Sample(seed=4, optim=OptimConfig(lr=0.5), batch_size=8, layers=(1,))
    assert changed_settings(to_dict(old), to_dict(new)) == [
        "batch-size: 256 -> 8",
        "layers: [3, 6] -> [1]",
        "optim.lr: 0.0015 -> 0.5",
        "seed: 0 -> 4",
    ]
    assert changed_settings(to_dict(old), to_dict(old)) == []


def test_changed_settings__ignores_settings_that_are_free_on_resume() -> None:
    changed = dict.fromkeys(FREE_ON_RESUME, "something else")
    assert changed_settings(to_dict(Sample()), to_dict(Sample()) | changed) == []
    # Every name is the name of a setting.
    names = {name for kind in (ContrastConfig, SegmentConfig) for name in flags(kind)}
    assert names >= {flag(name) for name in FREE_ON_RESUME}


def test_changed_settings__lists_a_setting_that_only_one_side_has() -> None:
    assert changed_settings({"a": 1}, {"b": 2}) == ["a: 1 -> None", "b: None -> 2"]


def test_complete__adds_settings_that_an_earlier_version_did_not_have() -> None:
    now = {"a": 0, "part": {"b": 1, "c": 2}, "new": {"d": 3}}
    old = {"a": 5, "part": {"b": 6}, "gone": 7}
    assert complete(old, now) == {"a": 5, "part": {"b": 6, "c": 2}, "new": {"d": 3}, "gone": 7}
    assert complete(now, now) == now
    assert old == {"a": 5, "part": {"b": 6}, "gone": 7}


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be above 0, not 0"),
        ({"image_size": -1}, "--image-size must be above 0, not -1"),
        ({"min_crop": 1.5}, "--min-crop must lie in [0, 1], not 1.5"),
        ({"min_crop": 0.0}, "--min-crop must be above 0, not 0.0"),
        ({"seed": -1}, "--seed must be 0 or above, not -1"),
        ({"devices": "0"}, "--devices must be a number above 0 or auto, not '0'"),
        ({"devices": "two"}, "--devices must be a number above 0 or auto, not 'two'"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"loggers": ("tensorbord",)}, "--loggers takes auto, tensorboard, wandb and mlflow, not 'tensorbord'"),
        ({"max_steps": "ten"}, "--max-steps is 'ten'"),
        ({"max_steps": "0 epochs"}, "--max-steps must be above 0, not 0 epochs"),
        ({"max_steps": "1e999"}, "--max-steps must be at most 1e+12 steps, not 1e999"),
        ({"max_steps": "5%"}, "--max-steps is the length of the training"),
    ],
)
def test_train_config__refuses(values: dict[str, Any], message: str) -> None:
    with refused(message):
        CropTrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"lr": 0}, "--lr must be above 0"), ({"layer_decay": 1.1}, "--layer-decay"), ({"clip_grad": -1}, "--clip-grad")],
)
def test_optim_config__refuses(values: dict[str, Any], message: str) -> None:
    with refused(message):
        OptimConfig(**values)


def test_backbone_config__reads_json() -> None:
    assert BackboneConfig(args='{"depth": 6}').kwargs() == {"depth": 6}
    with refused("--args is not JSON"):
        BackboneConfig(args="{depth: 6}")
    with refused("--args must be a JSON object"):
        BackboneConfig(args="[6]")


def test_positive_and_between__accept_the_bounds() -> None:
    config = OptimConfig(weight_decay=0.0, layer_decay=1.0)
    positive(config, "lr")
    between(config, 0.0, 1.0, "weight_decay", "layer_decay")
    with refused("--weight-decay must be above 0, not 0.0"):
        positive(config, "lr", "weight_decay")


@pytest.mark.parametrize(
    "file", sorted(Path(pecobook.settings.__file__).parent.glob("*.py")), ids=lambda file: file.stem
)
def test_every_field_has_an_explanation_where_it_is_first_declared(file: Path) -> None:
    module = importlib.import_module(f"pecobook.settings.{file.stem}")
    for node in [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]:
        inherited = {
            name for base in getattr(module, node.name).__mro__[1:] for name in getattr(base, "__annotations__", ())
        }
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                name = ast.unparse(field.target)
                assert explained or name in inherited, f"{node.name}.{name}"
