"""What is trained for which row: jobs by name, each once, whichever tables ask for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.commands.jobs import Job
from pecobook.commands.reproduce.budgets import Budget, budget, perceptual, with_backbone
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.codebook import AdversarialConfig, ExplicitConfig
from pecobook.settings.durations import steps
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace

if TYPE_CHECKING:
    from pecobook.commands.reproduce.paper import PaperTable
    from pecobook.data.source import Splits
    from pecobook.settings.codebook import CodebookConfig
    from pecobook.settings.reproduce import ReproduceConfig

NO_TOKENIZER = ("scratch", "vit-contrast", "pixels")
"""Arms that are other ways to a backbone."""


class Plan:
    """Jobs of all rows and seeds.

    Args:
        config: what was asked for.
        tables: the tables.
        splits: the images.
    """

    def __init__(self, config: ReproduceConfig, tables: dict[str, PaperTable], splits: Splits) -> None:
        self.config, self.tables, self.splits = config, tables, splits
        own = budget(config.budget)
        self.own = with_backbone(own, config.backbone) if config.backbone.name else own
        self.labelled = splits.train.labels is not None
        self.gpus_per_run = config.gpus_per_run or self.own.gpus_per_run
        self.jobs: dict[str, Job] = {}
        for seed in config.seeds:
            for table in tables.values():
                for row in table.all_rows:
                    if not self.missing(row.arm):
                        self.add(self.canonical(row.arm), seed, judged="classified" in dict(table.figures))

    def missing(self, arm: str) -> str:
        """What an arm cannot do without, nothing when it is there."""
        if arm == "dalle" and not self.config.dalle:
            return "--dalle FOLDER"
        if arm == "more-data" and not self.config.more_data:
            return "--more-data SOURCE"
        if arm == "half-depth" and self.own.codebook.model.num_blocks < 2:
            return "a budget whose decoder has two blocks to halve"
        if arm in ("classification", "supervised") and not self.labelled:
            return "labels"
        return ""

    def lacking(self, figure: str) -> str:
        """What a figure cannot be measured without, nothing when it is there."""
        if not self.labelled and figure in ("finetuned", "classified", "codeword_probe"):
            return "labels"
        if figure == "finetuned" and not self.config.transfer:
            return "--transfer"
        if figure == "classified" and not self.config.classifier and self.own.supervised is None:
            return "--classifier"
        return ""

    def unmeasured(self, figures: Iterable[tuple[str, str]]) -> list[str]:
        """A line for each of these (figure, heading) that cannot be measured."""
        lacking = [(heading, self.lacking(figure)) for figure, heading in dict.fromkeys(figures)]
        return [f"Not measured: {heading} (needs {lacks})." for heading, lacks in lacking if lacks]

    def canonical(self, arm: str) -> str:
        """One name for what is the same training: the network of all rows is also a row of Table 5."""
        head, dash, how = arm.partition("-")
        return f"perceptual{dash}{how}" if head == self.own.default and arm not in NO_TOKENIZER else arm

    def add(self, arm: str, seed: int, *, judged: bool) -> None:
        """Add everything that an arm needs."""
        if arm not in NO_TOKENIZER:
            self._analysis(arm, seed, judged=judged)
        if self.config.transfer and self.labelled:
            self._transfer(arm, seed)

    def add_job(self, name: str, command: str, config: Any, needs: tuple[str, ...] = ()) -> str:
        """Add a job, unless it is there; returns its name."""
        if name not in self.jobs:
            self.jobs[name] = Job(command, config, needs)
        return name

    def finish(self, base: TrainConfig, name: str, seed: int, **more: Any) -> Any:
        """Settings of a run with its folder, its seed and its length in steps."""
        count = len(self.splits.train)
        length = steps(base.max_steps, num_images=count, batch_size=base.batch_size) * self.config.length
        length = max(round(length), 1)
        common = {"data": self.config.data, "seed": seed, "out": str(Path(self.config.out) / "runs" / name)}
        common |= {"micro_batch_size": self.config.micro_batch_size, "compile": self.config.compile}
        saving = {"loggers": (), "save_minutes": 5.0, "keep_checkpoints": 1, "save_every": max(length // 3, 1)}
        return replace(base, {**common, **saving, "max_steps": str(length), "sample_every": length, **more})

    # ---------------------------------------------------------------------------------------- networks and codebooks

    def network(self, kind: str, seed: int) -> tuple[str, str]:
        """The network `resnet`, `vit`, `backbone` or `supervised`, and the job that trains it, `` when none does."""
        own, config = self.own, self.config
        if kind == own.default and config.network:
            return config.network, ""
        if kind == "supervised" and (config.supervised or own.supervised is None):
            return config.supervised or own.supervised_network, ""
        name = f"network-{kind}-{seed}"
        if kind == "supervised":
            assert own.supervised is not None
            self.add_job(name, "finetune", self.finish(own.supervised, name, seed))
        else:
            self.add_job(name, "contrast", self.finish(own.contrast[kind], name, seed))
        return self.jobs[name].config.out, name

    def codebook(self, arm: str, seed: int) -> tuple[str, str, int]:
        """The tokenizer of an arm, the job that trains it, and its stride in pixels."""
        if arm == "dalle":
            return f"dalle:{self.config.dalle}", "", 8
        settings, needs = self.codebook_settings(arm, seed)
        name = f"codebook-{arm}-{seed}"
        changes = {"data": self.config.more_data} if arm == "more-data" else {}
        self.add_job(name, "codebook", self.finish(settings, name, seed, **changes), needs)
        return self.jobs[name].config.out, name, settings.model.stride

    def codebook_settings(self, arm: str, seed: int) -> tuple[CodebookConfig, tuple[str, ...]]:
        """Settings of the tokenizer of an arm, and the jobs that it needs."""
        own = self.own
        base, head, _, how = own.codebook, *arm.partition("-")
        if arm in ("pixel", "classification", "contrastive"):
            base = dataclasses.replace(base, perceptual=PerceptualConfig(network="none"))
            explicit = ExplicitConfig() if arm == "pixel" else ExplicitConfig(kind=arm)  # type: ignore[arg-type]
            return dataclasses.replace(base, explicit=explicit), ()
        kind = head if head in own.layers else own.default
        network, job = self.network(kind, seed)
        given = kind == own.default and self.config.network
        layers = self.config.network_layers if given else own.layers[kind]
        weights = "random" if how == "random" else self.config.network_weights if given else ""
        seen = perceptual(own, network, layers, weights, shuffle=how == "shuffled")
        base = dataclasses.replace(base, perceptual=seen)
        return _variant(base, own, arm), (job,) if job else ()

    def _analysis(self, arm: str, seed: int, *, judged: bool) -> str:
        tokenizer, job, _ = self.codebook(arm, seed)
        needs = (job,) if job else ()
        classifier = self.config.classifier
        judged = judged and self.labelled
        if judged and not classifier and self.own.supervised is not None:
            classifier, own = self.network("supervised", seed)
            needs = (*needs, own)
        judged = judged and bool(classifier)
        name = f"{'judged' if judged else 'analysis'}-{arm}-{seed}"
        if f"judged-{arm}-{seed}" in self.jobs:
            return name
        self.jobs.pop(f"analysis-{arm}-{seed}", None)  # a judged one holds all of it
        out = str(Path(self.config.out) / "runs" / name)
        given = classifier if judged else ""
        settings = AnalyzeConfig(tokenizer=tokenizer, data=self.config.data, out=out, classifier=given, seed=seed)
        return self.add_job(name, "analyze", settings, needs)

    # -------------------------------------------------------------------------------------------------------- transfer

    def _transfer(self, arm: str, seed: int) -> None:
        backbone, job = self.backbone(arm, seed)
        name = f"classifier-{arm}-{seed}"
        # Random weights have no layers that were pre-trained and should change little.
        more = {"weights": "random", "optim.layer_decay": 1.0} if arm == "scratch" else {}
        settings = self.finish(self.own.finetune, name, seed, backbone=backbone, **more)
        self.add_job(name, "finetune", settings, (job,) if job else ())

    def backbone(self, arm: str, seed: int) -> tuple[str, str]:
        """The backbone of an arm and the job that trains it."""
        if arm == "scratch":
            return self.backbone("pixels", seed)  # its architecture, with random weights
        if arm == "vit-contrast":
            return self.network("backbone" if "backbone" in self.own.contrast else "vit", seed)
        name = f"vit-{arm}-{seed}"
        own = self.own.pretrain
        if arm == "pixels":
            self.add_job(name, "pretrain", self.finish(own, name, seed, target="pixels"))
        else:
            tokenizer, job, stride = self.codebook(arm, seed)
            side = self._patches() * stride
            size = 0 if side == own.image_size else side
            settings = self.finish(own, name, seed, tokenizer=tokenizer, tokenizer_size=size)
            self.add_job(name, "pretrain", settings, (job,) if job else ())
        return self.jobs[name].config.out, name

    def _patches(self) -> int:
        """Patches along a side of the ViT."""
        return self.own.pretrain.image_size // self.own.codebook.model.stride


def _variant(base: CodebookConfig, own: Budget, arm: str) -> CodebookConfig:
    """What an arm changes beside its perceptual network."""
    model = base.model
    if arm.startswith("lambda-"):
        lam = float(arm.removeprefix("lambda-"))
        return dataclasses.replace(base, perceptual=dataclasses.replace(base.perceptual, weight=lam))
    if arm == "adversarial":
        term = AdversarialConfig(weight=0.4, num_layers=own.discriminator_layers)
        return dataclasses.replace(base, adversarial=term)
    if arm == "half-stride":  # one stage removed, half the pixels: as many tokens of an image
        model = dataclasses.replace(model, channels=model.channels[:-1])
        return dataclasses.replace(base, model=model, image_size=base.image_size // 2)
    changed = {
        "transformers": own.transformers,
        "lite": own.lite,
        "half-width": dataclasses.replace(model, decoder_width=0.5),
        "half-depth": dataclasses.replace(model, decoder_blocks=max(model.num_blocks // 2, 1)),
    }
    return dataclasses.replace(base, model=changed.get(arm, model))
