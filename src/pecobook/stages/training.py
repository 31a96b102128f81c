"""Train any stage: check everything, create the run folder, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pecobook import recipes
from pecobook.analysis.rank import feature_scores
from pecobook.data.given import GivenView
from pecobook.data.images import check_labels, check_readable, write_example
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import Splits
from pecobook.data.stream import Stream
from pecobook.data.summary import aligned, describe
from pecobook.engine import launch, log, run_folder
from pecobook.engine.dry_run import estimate
from pecobook.engine.loop import fit
from pecobook.engine.preamble import describe_run
from pecobook.engine.probing import Probe, describe_probe, open_probe
from pecobook.engine.run_folder import stored_settings
from pecobook.engine.stage import Stage
from pecobook.engine.value_range import set_value_range
from pecobook.engine.world import is_leader
from pecobook.errors import Preflight, RunFolderError, first_line
from pecobook.models.cost import known_flop
from pecobook.models.networks import without_downloads
from pecobook.models.snippets import example_image, with_image
from pecobook.settings.changes import changed_settings
from pecobook.settings.durations import steps
from pecobook.settings.images import AUTO
from pecobook.settings.training import ProbedTrainConfig, TrainConfig
from pecobook.settings.values import to_dict
from pecobook.utils.distributed import on_first_rank
from pecobook.utils.given import hook
from pecobook.utils.printer import doing, of_run, show

C = TypeVar("C", bound=TrainConfig)
_LISTED = 6
"""Number of settings that the line on the recipe names; config.diff has all."""
_NO_TENSORBOARD = "metrics.jsonl and curves.png; TensorBoard's event files need pip install 'pecobook[tensorboard]'"


def train(stage_type: type[Stage[C]], config: C, recipe: str = "") -> Path:
    """Train a stage from its settings to its export; return the run folder, which a dry run does not create.

    `recipe` names the recipe that the settings are compared with; if empty, nothing is compared.

    Raises:
        PreflightError: all problems found before the run folder was created.
        PecobookError: an error during the run.
    """
    if config.dry_run:
        with of_run(quiet=not is_leader()):
            ready = preflight(stage_type, config)
            if is_leader():
                _dry_run(stage_type, ready, recipe)
        return Path(config.out)
    with launch.signals(config), of_run(quiet=not is_leader()):
        begun = launch.begin(
            config,
            lambda: preflight(stage_type, config),
            lambda ready: run_folder.prepare(
                ready.config,
                stage_type.command,
                ready.splits,
                recipe,
                _changes(ready.config, stage_type.command, recipe),
            ),
        )
        config, splits, stage, _ = begun.ready
        try:
            preamble = _preamble(begun.ready, recipe) if is_leader() else []
            outcome = _fit(stage_type, begun.fabric, begun.ready, preamble)
            if outcome.finished:
                _export(config, stage, splits)
        finally:  # also after an error: the Python process may go on, and train again
            if begun.lock is not None:
                begun.lock.release()
    if not outcome.finished:
        raise SystemExit(130)
    return Path(config.out)


class Ready(NamedTuple, Generic[C]):
    """The checked parts of a run, before its folder is created."""

    config: C
    """The settings, with the resolved precision."""
    splits: Splits
    stage: Stage[C]
    probe: Splits | None = None
    """The images of --probe-data."""


def preflight(stage_type: type[Stage[C]], config: C) -> Ready[C]:
    """Check and build everything before anything is written. Raises PreflightError with all problems."""
    problems = Preflight()
    precision = problems.check(lambda: launch.resolve_precision(config))
    if precision is not None:  # --resume compares resolved precisions, not `auto`
        config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
        problems.check(lambda: launch.check_low_precision(config))
    if config.resume and config.value_range == AUTO:
        config = dataclasses.replace(config, value_range=run_folder.recorded_range(config.out))
    splits = problems.check(lambda: _open(stage_type, config))
    if splits is not None:
        count = len(splits.train)
        problems.check(lambda: steps(config.max_steps, num_images=count, batch_size=config.batch_size))
    if splits is not None and splits.train.value_range is not None:
        config = dataclasses.replace(config, value_range=tuple(splits.train.value_range))
    if is_leader() and (config.out or not config.dry_run):
        num_images = 0 if splits is None else len(splits.train)
        problems.check(lambda: run_folder.check(config, stage_type.command, num_images))
    probe = problems.check(lambda: open_probe(config))
    doing("building the networks")
    torch.manual_seed(config.seed)  # seeds all random weights of the stage
    with without_downloads() if problems.problems else contextlib.nullcontext():
        prebuilt = problems.check(lambda: stage_type.check(config))
    problems.check(lambda: launch.micro_batch_size(config))
    loggers = problems.check(lambda: log.resolve_loggers(config.loggers))
    if loggers is not None:
        config = dataclasses.replace(config, loggers=loggers)
    problems.finish()
    assert splits is not None
    return Ready(config, splits, stage_type.build(config, splits, prebuilt), probe)


def _open(stage_type: type[Stage[C]], config: C) -> Splits:
    doing(f"listing {config.data}")
    splits = stage_type.open(config)
    given = ("tokenizer", "backbone", "perceptual", "target_features", "init")
    names = (getattr(config, name, "") for name in given)
    models = [name if isinstance(name, str) else name.network for name in names]  # the perceptual network is a group
    set_value_range(splits, config.value_range, models)
    check_readable(splits.train)
    if stage_type.needs_labels(config):
        check_labels(splits, config.data)
    stage_type.check_data(config, splits)
    return splits


def _changes(config: TrainConfig, command: str, recipe: str) -> list[str]:
    """Return a line for each setting that differs from the recipe and changes what is learned."""
    if not recipe:
        return []
    return changed_settings(to_dict(recipes.recipe(command, recipe)), to_dict(config))


def _preamble(ready: Ready[Any], recipe: str) -> list[str]:
    """Return lines that say what the run learns from, with what, and for how long."""
    config, splits, stage, _ = ready
    changes = _changes(config, stage.command, recipe)
    # The data are listed above; a setting without a value in the recipe, such as a tokenizer, is not a change.
    changed = [
        re.sub(": .* -> ", " ", line) for line in changes if not re.search(r"^data: |: (auto|\['auto'\]|) -> ", line)
    ]
    listed = ", ".join(changed[:_LISTED]) + (f" and {len(changed) - _LISTED} more" if len(changed) > _LISTED else "")
    settings = [("settings", f"of the recipe {recipe}{f', but {listed}' if changed else ''}")] if recipe else []
    weights = [("weights", note) for note in (*stage.notes, *_rates_of_random_weights(config))]
    probes = []
    if ready.probe is not None and isinstance(config, ProbedTrainConfig):
        probes = [("probe", describe_probe(config, ready.probe))]
    logs = [] if find_spec("tensorboard") else [("logs", _NO_TENSORBOARD)]
    run = describe_run(stage, config, len(splits.train), splits.train.unit)
    return aligned([*describe(splits), *weights, *run, *probes, *logs, *settings])


def _rates_of_random_weights(config: TrainConfig) -> list[str]:
    """Return a line on the learning rates of a network with random weights, or nothing."""
    if getattr(config, "weights", "") != "random":
        return []
    if config.optim.layer_decay == 1:
        return ["random, so all layers learn at one rate (--optim.layer-decay 1, unless it is given)"]
    lowers = f"--optim.layer-decay {config.optim.layer_decay:g} slows the lower layers, which hold nothing to keep"
    return [f"random, and {lowers}: 1 does not"]


def _dry_run(stage_type: type[Stage[C]], ready: Ready[C], recipe: str) -> None:
    """Print the settings to standard output, and to standard error what the run would learn from and cost."""
    config, splits, stage, _ = ready
    show(json.dumps(stored_settings(config, stage_type.command, recipe), indent=2), stdout=True)
    preamble = _preamble(ready, recipe)
    cost = estimate(stage, _training_stream(stage_type, config, stage, splits), config)
    last = f"Nothing was written. Without --dry-run the same command trains and writes to {config.out or '--out'}."
    show("\n".join([*preamble, *aligned(cost), last]))


def _training_stream(stage_type: type[Stage[C]], config: C, stage: Stage[C], splits: Splits) -> Stream:
    view, transform = stage_type.view(config), hook("transform")
    view = view if transform is None else GivenView(transform, view)
    return Stream(
        splits.train,
        view,
        config.seed,
        companion=stage.companions()[0],
        num_views=stage.num_views(),
        repeats=stage.repeats(),
        window=config.shuffle_window,
    )


def _fit(stage_type: type[Stage[C]], fabric: Any, ready: Ready[C], preamble: list[str]) -> Any:
    config, splits, stage, probed = ready
    probe, probe_view = None, stage_type.probe_view(config)
    if probed is not None and probe_view is not None and isinstance(config, ProbedTrainConfig):
        probe = partial(Probe, config, probed, probe_view, feature_scores)
    reference = None
    count = min(getattr(config, "knn_images", 0), len(splits.train))
    view = stage_type.reference_view(config)
    if view is not None and count and splits.train.labels is not None:
        subset = splits.train.subset(fixed_permutation(i, len(splits.train)) for i in range(count))
        reference = Stream(subset, view, 0)
    return fit(
        fabric,
        stage,
        _training_stream(stage_type, config, stage, splits),
        Stream(splits.evaluation, stage_type.evaluation_view(config), 0, companion=stage.companions()[1]),
        config=config,
        command=stage_type.command,
        reference=reference,
        probe=probe,
        flop=lambda: known_flop(stage_type.command, config),
        preamble=preamble,
        draw=_draw_curves,
        on_step=hook("on_step"),
    )


def _draw_curves(metrics: Path) -> bytes:
    from pecobook.analysis.charts import run_curves

    return run_curves(metrics)


def _export(config: TrainConfig, stage: Stage[Any], splits: Splits) -> None:
    state = get_model_state_dict(stage, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    folder = Path(config.out) / "export"

    def write() -> None:
        example = example_image(config.out)
        try:
            write_example(splits.evaluation, example)
            lines = stage.export(folder, cast("dict[str, Tensor]", state))
        except OSError as error:
            raise RunFolderError(
                f"The export cannot be written to '{folder}': {first_line(error).rstrip('.')}.\n"
                "The last checkpoint is complete. Free disk space, then continue with --resume."
            ) from None
        show(f"\nDone: {folder}\n\n{with_image(lines, example)}")

    on_first_rank(write)
