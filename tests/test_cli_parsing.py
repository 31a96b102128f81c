"""Ways to write a flag, and the precedence of flags, a config file and the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.settings.codebook import CodebookConfig


def parse(*arguments: str) -> CodebookConfig:
    parsed: CodebookConfig = cli.parse(recipe("codebook", "tiny"), list(arguments), "codebook tiny")
    return parsed


@pytest.mark.parametrize(
    "typed", [["--batch-size", "12"], ["--batch-size=12"], ["--batch_size", "12"], ["--batch_size=12"]]
)
def test_parse__accepts_several_ways_to_write_a_flag(typed: list[str]) -> None:
    assert parse(*typed) == parse("--batch-size", "12") != parse()
    assert parse(*typed).batch_size == 12


@pytest.mark.parametrize(
    ("typed", "compiled"),
    [
        (["--compile"], True),
        (["--compile", "true"], True),
        (["--compile=false"], False),
        (["--no-compile"], False),
        (["--no_compile"], False),
    ],
)
def test_parse__accepts_switches(typed: list[str], compiled: bool) -> None:
    assert parse(*typed).compile is compiled


@pytest.mark.parametrize("typed", ["--model.no-latent-norm", "--model.latent-norm=false"])
def test_parse__accepts_a_switch_within_a_group(typed: str) -> None:
    assert parse().model.latent_norm
    assert not parse(typed).model.latent_norm


@pytest.mark.parametrize(
    "typed", [["--model.channels", "8", "16"], ["--model.channels", "8,16"], ["--model.channels=8,16"]]
)
def test_parse__accepts_several_values(typed: list[str]) -> None:
    assert parse(*typed).model.channels == (8, 16)
    assert parse(*typed).model.num_blocks == parse().model.num_blocks


def test_parse__accepts_unusual_values() -> None:
    assert parse("--workers", "-1").workers == -1
    assert parse("--data=a=b").data == "a=b"
    assert parse("--max-steps", "3 epochs").max_steps == "3 epochs"
    assert parse("--loggers").loggers == ()
    assert parse("--out", "123").out == "123"


def test_parse__flags_override_a_config_file_and_the_file_overrides_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"command": "codebook", "seed": 5, "optim": {"lr": 0.5}}))
    config = parse("--config", str(tmp_path), "--seed", "7")
    assert (config.seed, config.optim.lr, config.optim.name) == (7, 0.5, "adam")
    assert config.image_size == 32  # the recipe's


def test_parse__reports_unknown_flags_and_wrong_values_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--optim.lr", "two", "--num-codewords", "x", "--quantizer.decay", "a", "--seed", "--max-steps", "ten")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for part in ("--optim.lr takes", "Unknown flag '--num-codewords'", "decay takes", "--seed needs", "--max-steps is"):
        assert sum(part in line for line in lines) == 1
