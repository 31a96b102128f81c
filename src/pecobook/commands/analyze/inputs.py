"""The inputs of an analysis, opened and checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pecobook.analysis.similarity import find_bapps
from pecobook.analysis.wording import unique_names
from pecobook.commands.analyze.classifier import RestrictedClassifier, open_classifier
from pecobook.commands.analyze.masked import open_runs
from pecobook.commands.masked_run import MaskedRun
from pecobook.data import record
from pecobook.data.source import Splits
from pecobook.data.tokens import TokenBank, bank_differences
from pecobook.engine.data_check import check_bank
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError, DataError, Preflight, WeightsError
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizers import fingerprint, load_tokenizer
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.evaluate import EvaluateConfig
from pecobook.utils.devices import device
from pecobook.utils.printer import say


@dataclasses.dataclass(frozen=True)
class TokenizerInput:
    """A tokenizer with the name that tables and pictures show."""

    name: str
    source: str
    tokenizer: Any
    bank: TokenBank | None = None


@dataclasses.dataclass(frozen=True)
class AnalysisInputs:
    """The opened inputs of an analysis."""

    splits: Splits
    tokenizers: list[TokenizerInput]
    runs: dict[str, MaskedRun]
    classifier: RestrictedClassifier | None
    distance: PerceptualDistance | None
    judgements: dict[Path, float]
    """Human judgements, as `find_bapps` returns them; empty without --judgements."""


def open_inputs(config: AnalyzeConfig) -> AnalysisInputs:
    """Open all inputs of the settings. Raises PreflightError with all problems, not only the first."""
    preflight = Preflight()
    sources = (config.tokenizer, *config.against)
    splits = preflight.check(lambda: open_readable(config.data, config.value_range, sources))
    tokenizers = []
    for name, source in zip(unique_names(sources), sources, strict=True):
        tokenizer_input = preflight.check(partial(_open, config, name, source))
        tokenizers += [tokenizer_input] if tokenizer_input is not None else []
    if splits is not None and not preflight.problems:
        tokenizers = preflight.check(partial(_with_banks, config, tokenizers, splits)) or tokenizers
    runs = preflight.check(lambda: open_runs(config.backbone))
    classifier = None
    if config.classifier and splits is not None:
        classifier = preflight.check(partial(open_classifier, config, splits))
    sizes = {tokenizer_input.name: tokenizer_input.tokenizer.image_size for tokenizer_input in tokenizers}
    distance = preflight.check(lambda: open_distance(config, sizes)) if config.perceptual else None
    judgements = preflight.check(lambda: find_bapps(Path(config.judgements))) if config.judgements else None
    preflight.finish()
    assert splits is not None
    assert runs is not None
    return AnalysisInputs(splits, tokenizers, runs, classifier, distance, judgements or {})


def _open(config: AnalyzeConfig, name: str, source: str) -> TokenizerInput:
    tokenizer = load_tokenizer(source)
    K = tokenizer.num_codewords
    for codeword in config.codewords:
        if not 0 <= codeword < K:
            raise ConfigError(f"--codewords {codeword}: '{name}' has codewords 0 to {K - 1}.")
    return TokenizerInput(name, source, tokenizer)


def _with_banks(config: AnalyzeConfig, inputs: list[TokenizerInput], splits: Splits) -> list[TokenizerInput]:
    """Assign each bank to its tokenizer. Raises DataError for a bank of another tokenizer or of other images."""
    fingerprints = [fingerprint(tokenizer_input.tokenizer) for tokenizer_input in inputs] if config.tokens else []
    now: record.Record | None = None
    for folder in config.tokens:
        bank = TokenBank(folder)
        differences = bank_differences(bank.config, {"data": splits.train.fingerprint})
        if differences:
            raise DataError(
                f"--tokens '{folder}' was made from other images than --data '{config.data}': {differences[0]}."
            )
        now = now or record.take(splits)
        for note in check_bank(folder, now, data=config.data):
            say(note)
        if bank.config["tokenizer"] not in fingerprints:
            raise DataError(f"--tokens '{folder}' was made by another tokenizer: give that tokenizer too.")
        index = fingerprints.index(bank.config["tokenizer"])
        inputs = [*inputs[:index], dataclasses.replace(inputs[index], bank=bank), *inputs[index + 1 :]]
    return inputs


def open_distance(config: AnalyzeConfig | EvaluateConfig, sizes: Mapping[str, int]) -> PerceptualDistance:
    """Build the distance of --perceptual for tokenizers with these image sizes. Raises PecobookError."""
    try:
        distance = PerceptualDistance(config.perceptual, config.perceptual_layers, config.perceptual_weights or None)
        say("\n".join(distance.notes))
    except (ConfigError, WeightsError) as error:  # the message names the flags of `codebook`, which differ here
        text = str(error).replace("--perceptual.network", "--perceptual")
        text = text.replace("--perceptual.layers", "--perceptual-layers")
        text = text.replace("--perceptual.weights", "--perceptual-weights")
        raise type(error)(text) from None
    for name, size in sizes.items():
        try:
            distance.check_image_size(size, size)
        except WeightsError:
            raise WeightsError(
                f"--perceptual '{config.perceptual}' gives no features of the {size} x {size} pixel images of "
                f"'{name}': give earlier layers with --perceptual-layers, or another network."
            ) from None
    return distance.to(device())
