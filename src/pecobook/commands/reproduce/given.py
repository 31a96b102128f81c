"""Checks of what the user names for a plan's jobs, made before the first job, which may run days before the last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

from pecobook.commands.analyze.classifier import open_classifier
from pecobook.commands.jobs import Job
from pecobook.commands.reproduce.plan import Plan
from pecobook.data.images import open_images
from pecobook.errors import ConfigError, PecobookError, Preflight
from pecobook.models.networks import without_downloads
from pecobook.models.tokenizers import FOREIGN, load_tokenizer
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.codebook import CodebookStage
from pecobook.stages.pretrain import PretrainStage

_FLAGS = {
    "--perceptual.layers": "--network-layers",
    "--perceptual.weights": "--network-weights",
    "--model.": "--backbone.",
}
"""Names here of the flags that the checking commands use."""


def check_given(plan: Plan, preflight: Preflight, *, download: bool) -> None:
    """Check the networks, tokenizers and images that jobs read and no job of the plan makes.

    Public networks are downloaded for this only with `download`; without it, their weights are not checked.
    """
    checked = set[object]()
    for job in plan.jobs.values():
        if not job.finished:
            for kind, flag, check in _checks(plan, job):
                if kind not in checked:
                    checked.add(kind)
                    preflight.check(partial(_check, flag, check, download=download))


def _checks(plan: Plan, job: Job) -> Iterator[tuple[object, str, Callable[[], object]]]:
    """Yield each input that no job makes, the flag that names it, and a function that checks it."""
    of, config = job.config, plan.config
    made = {plan.jobs[need].config.out for need in job.needs}
    if job.command == "codebook":
        perceptual = of.perceptual
        if perceptual.network not in made:
            kind = perceptual.network, perceptual.layers, perceptual.weights, of.image_size
            flag = "--supervised" if perceptual.network == config.supervised else "--network"
            yield kind, flag, partial(CodebookStage.check, of)
        if of.data != config.data:
            yield of.data, "--more-data", partial(open_images, of.data)
    elif job.command == "analyze":
        if of.tokenizer.partition(":")[0] in FOREIGN:
            yield of.tokenizer, "--dalle", partial(load_tokenizer, of.tokenizer)
        if of.classifier and of.classifier not in made:
            flag = "--classifier" if config.classifier else "--supervised"
            yield ("classifier", of.classifier), flag, partial(open_classifier, of, plan.splits)
    elif job.command == "finetune" and of.weights != "random" and of.backbone not in made:
        yield ("backbone", of.backbone), "--dino", partial(ClassifyStage.check, of)
    elif job.command == "pretrain" and of.model == config.backbone:
        yield ("pretrain", of.visible_only), "--backbone.name", partial(_check_backbone, plan, job)


def _check(flag: str, check: Callable[[], object], *, download: bool) -> None:
    try:
        with nullcontext() if download else without_downloads():
            check()
    except PecobookError as error:  # the message names the flags of another command
        text = str(error).replace("--data", "--more-data") if flag == "--more-data" else str(error)
        for old, new in _FLAGS.items():
            text = text.replace(old, new)
        raise type(error)(text if "--" in text else f"{flag}: {text}") from None


def _check_backbone(plan: Plan, job: Job) -> None:
    """Build the ViT of --backbone, and compare its patches with the codes of a tokenizer that is not yet trained."""
    of = job.config
    alone = {"target": "pixels", "tokenizer": "", "tokens": "", "tokenizer_size": 0}
    stage = PretrainStage.check(replace(of, {**alone, "mask.num_masked": 1, "mask.min_block": 1}))
    for need in job.needs:
        if plan.jobs[need].command == "codebook":
            codes = (of.tokenizer_size or of.image_size) // plan.jobs[need].config.model.stride
            if stage.model.grid != (codes, codes):
                rows, columns = stage.model.grid
                patch = json.dumps({"patch_size": of.image_size // codes})
                raise ConfigError(
                    f"--backbone.name '{of.model.name}' makes {rows} x {columns} patches of {of.image_size} pixels, "
                    f"and the tokenizer {codes} x {codes} codes: give --backbone.args '{patch}'."
                )
