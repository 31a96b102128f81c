"""The plan: the jobs of all rows by name; a job that several rows or tables need occurs once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pecobook.commands.duel_arms import DUEL, TUNING, parse_run, run_name
from pecobook.commands.jobs import Job
from pecobook.commands.paper_tables import ATTACKED, EPOCHS, Arm, PaperTable
from pecobook.commands.reproduce.budgets import Budget, make_budget, with_backbone
from pecobook.commands.reproduce.duel import Duel
from pecobook.commands.reproduce.transfers import DATA_FLAGS, kinds_of, transfer_data
from pecobook.data.images import has_labels
from pecobook.data.source import Splits
from pecobook.models.cost import Cost, job_cost
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.codebook import AdversarialConfig, CodebookConfig, ExplicitConfig
from pecobook.settings.durations import steps
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.predict import AttackConfig, PredictConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.tokenize import VIEW_SETTINGS, TokenizeConfig
from pecobook.settings.training import CompileTrainConfig, TrainConfig
from pecobook.settings.values import replace

FROM_SCRATCH = ("scratch", "deit")
NO_TOKENIZER = (*FROM_SCRATCH, "dino", "moco", "mae")
"""Targets of arms that train a backbone without a tokenizer."""
_OF_LABELS = ("finetuned", "classified", "codeword_probe", "crossed_probe", *(figure for figure, _ in ATTACKED))
_GIVEN = (
    *("network", "network_weights", "supervised", "classifier", "dino", "dalle", "more_data"),
    *("segmentation_data", "detection_data", "kinetics", "ssv2"),
)
"""Settings that name a network or a source that the tables may not need."""


class Plan:
    """The jobs of all rows and seeds.

    Args:
        config: the command's settings.
        tables: the tables by name.
        splits: the images.
        opens: whether other images are opened; without them a plan tells only which jobs are finished.
    """

    def __init__(self, config: ReproduceConfig, tables: dict[str, PaperTable], splits: Splits, opens: bool = True):
        self.config, self.tables, self.splits = config, tables, splits
        self.budget = make_budget(config.budget)
        if config.backbone.name:
            self.budget = with_backbone(self.budget, config.backbone)
        self.has_labels = has_labels(splits)
        self.classifier = config.classifier
        if not config.classifier and len(splits.train.classes or ()) == 1000:  # the classes of ImageNet-1K
            self.classifier = self.budget.classifier
        is_study = tables.keys() <= {DUEL, TUNING}  # its runs are small at every budget
        self.gpus_per_run = config.gpus_per_run or (1 if is_study else self.budget.gpus_per_run)
        self.transfer_data = transfer_data(config, self.budget.transfers, opens)
        self.jobs: dict[str, Job] = {}
        self._source = {"data": config.data, "value_range": config.value_range}
        self.duel = Duel(config, splits, self.add, self._run_settings) if {DUEL, TUNING} & tables.keys() else None
        for seed in config.seeds:
            for name, table in tables.items():
                if name in (DUEL, TUNING):
                    self._add_study(name, [row.arm for row in table.all_rows], seed)
                    continue
                for row in () if self._waits_for_data(table) else table.all_rows:
                    if not self.missing_for_arm(row.arm):
                        arm = self.canonical(row.arm)
                        if (target := Arm.parse(arm).target) not in NO_TOKENIZER:
                            self._add_analysis(target, seed, classified="classified" in dict(table.figures))
                        if config.transfer:
                            self._add_transfers(kinds_of(dict(table.figures)), arm, seed)

    def _add_study(self, table: str, arms: list[str], seed: int) -> None:
        assert self.duel is not None
        arms = [arm for arm in arms if not self.missing_for_arm(arm)]
        if table == TUNING:
            for arm in arms:
                self.duel.add_tuning(*parse_run(arm), seed)
        else:
            self.duel.add({arm: self.duel.chosen(arm) for arm in arms}, seed)

    def missing_for_arm(self, arm: str) -> str:
        """Return what is missing to train an arm; an empty string if nothing is."""
        part = Arm.parse(arm)
        arm = part.target.partition("+")[0]  # the tuning's arms name a setting, too
        if part.vit not in self.budget.vits or (arm == "deit" and arm not in self.budget.vits[part.vit].own):
            return "another --budget"
        if arm == "dino" and not self.config.dino:
            return "--dino timm:vit_base_patch16_224.dino"
        if arm == "dalle" and not self.config.dalle:
            return "--dalle FOLDER"
        if arm == "more-data" and not self.config.more_data:
            return "--more-data SOURCE"
        if arm == "public" and not self.config.network:
            return "--network NETWORK"
        if arm == "half-depth" and self.budget.codebook.model.num_blocks < 2:
            return "a budget whose decoder has two blocks to halve"
        supervised = () if self.config.supervised or self.budget.supervised is None else ("supervised",)
        if not self.has_labels and arm.partition("-")[0] in (*FROM_SCRATCH, "classification", *supervised):
            return "labels"
        return ""

    def missing_for_figure(self, figure: str) -> str:
        """Return what is missing to measure a figure; an empty string if nothing is."""
        if not self.has_labels and figure in _OF_LABELS:
            return "labels"
        kind = next(iter(kinds_of([figure])), "")
        if kind and not self.config.transfer:
            return "--transfer"
        if kind in DATA_FLAGS and kind not in self.transfer_data:
            return DATA_FLAGS[kind]
        if figure == "classified" and not self.classifier and self.budget.supervised is None:
            return "--classifier"
        return ""

    def unmeasured(self, figures: Iterable[tuple[str, str]]) -> list[str]:
        """Return a line for each of these (figure, heading) that cannot be measured."""
        missing = {heading: self.missing_for_figure(figure) for figure, heading in figures}
        return [f"Not measured: {heading} (needs {needs})." for heading, needs in missing.items() if needs]

    def left_out(self) -> list[str]:
        """Return a line for each table column and row that is not measured, with what it needs."""
        tables = self.tables.values()
        missing = {row.label: self.missing_for_arm(row.arm) for table in tables for row in table.all_rows}
        rows = [f"Not trained: {label} (needs {needs})." for label, needs in missing.items() if needs]
        return [*self.unmeasured(pair for table in tables for pair in table.figures), *rows, *self._unused()]

    def _unused(self) -> list[str]:
        """Return a line for each given network or source that no job reads."""
        used = "".join(repr(job.config) for job in self.jobs.values()).replace("dalle:", "")
        given = {name: getattr(self.config, name) for name in _GIVEN} | {"backbone.name": self.config.backbone.name}
        unused = [name for name, value in given.items() if value and repr(value) not in used]
        return [f"Not used by these tables: --{name.replace('_', '-')} {given[name]}." for name in unused]

    def _waits_for_data(self, table: PaperTable) -> bool:
        """Return whether all figures of a table lack their images or clips."""
        return all(self.missing_for_figure(figure) in DATA_FLAGS.values() for figure, _ in table.figures)

    def canonical(self, arm: str) -> str:
        """Return one name for arms with equal training: the default network of all rows also has a row in Table 5."""
        part = Arm.parse(arm)
        head, dash, how = part.target.partition("-")
        target = f"perceptual{dash}{how}" if head == self.budget.default else part.target
        return dataclasses.replace(part, target=target).name

    def run_of(self, table: str, arm: str) -> str:
        """Return the name of an arm's jobs in a table."""
        if self.duel is not None and table in (DUEL, TUNING):
            return arm if table == TUNING else run_name(arm, self.duel.chosen(arm))
        return self.canonical(arm)

    def add(self, name: str, command: str, config: Any, *needs: str) -> None:
        """Add a job unless the plan has it.

        Args:
            name: `KIND-ARM-SEED`; jobs whose names differ only in the seed are alike.
            command: the pecobook command that the job runs.
            config: settings of the command, whose `out` is `self.out(name)`.
            needs: names of the jobs that must finish first; empty names are ignored.
        """
        accept = self.config.accept_data_change
        self.jobs.setdefault(name, Job(command, config, tuple(filter(None, needs)), accept))

    def out(self, name: str) -> str:
        """Return the folder of a job."""
        return str(Path(self.config.out) / "runs" / name)

    @functools.cached_property
    def costs(self) -> dict[str, Cost]:
        """The cost of every job, from its settings."""
        sizes = len(self.splits.train), len(self.splits.evaluation)
        others = {job.config.out: job.config for job in self.jobs.values()}
        return {name: job_cost(job.command, job.config, *sizes, others) for name, job in self.jobs.items()}

    def _run_settings(
        self, base: TrainConfig, name: str, seed: int, *, times: float = 1.0, num_images: int = 0, **changes: Any
    ) -> Any:
        """Return the settings of a run with folder, seed, and length in steps, `times` that of `base`."""
        num_images = num_images or len(self.splits.train)
        length = steps(base.max_steps, num_images=num_images, batch_size=base.batch_size) * self.config.length
        length = max(round(length * times), 1)
        changes = self._scaled_rates(base, num_images) | changes
        common: dict[str, Any] = {**self._source, "seed": seed, "out": self.out(name)}
        common |= {"micro_batch_size": self.config.micro_batch_size}
        common |= {"compile": self.config.compile} if isinstance(base, CompileTrainConfig) else {}
        saving = {"loggers": (), "save_minutes": 5.0, "keep_checkpoints": 1, "save_every": max(length // 3, 1)}
        return replace(base, {**common, **saving, "max_steps": str(length), "sample_every": length, **changes})

    def _scaled_rates(self, base: TrainConfig, num_images: int) -> dict[str, Any]:
        """Return the learning rate's warm-up and milestones in steps, scaled with the length of the training."""
        factor, optim = self.config.length, base.optim
        if factor == 1:
            return {}

        def scaled(text: str) -> str:
            if "%" in text:
                return text
            return str(round(factor * steps(text, num_images=num_images, batch_size=base.batch_size)))

        return {"optim.warmup": scaled(optim.warmup), "optim.milestones": tuple(map(scaled, optim.milestones))}

    # ---------------------------------------------------------------------------------------- networks and codebooks

    def _network(self, kind: str, seed: int) -> tuple[str, str]:
        """Plan the perceptual network `resnet`, `vit` or `supervised`.

        Returns:
            the network, and the name of the job that trains it, empty if no job does.
        """
        budget, config = self.budget, self.config
        if kind == budget.default and config.network:
            return config.network, ""
        if kind == "supervised" and (config.supervised or budget.supervised is None):
            return config.supervised or budget.supervised_network, ""
        name = f"network-{kind}-{seed}"
        if kind == "supervised":
            assert budget.supervised is not None
            self.add(name, "finetune", self._run_settings(budget.supervised, name, seed))
        else:
            self.add(name, "contrast", self._run_settings(budget.contrast[kind], name, seed))
        return self.out(name), name

    def _codebook(self, arm: str, seed: int) -> tuple[str, str, int]:
        """Plan an arm's tokenizer.

        Returns:
            the tokenizer, the name of the job that trains it (empty if no job does), and the stride in pixels.
        """
        if arm == "dalle":
            return f"dalle:{self.config.dalle}", "", 8
        settings, network_job = self.codebook_settings(arm, seed)
        name = f"codebook-{arm}-{seed}"
        changes: dict[str, Any] = {"data": self.config.more_data} if arm == "more-data" else {}
        self.add(name, "codebook", self._run_settings(settings, name, seed, **changes), network_job)
        return self.out(name), name, settings.model.stride

    def codebook_settings(self, arm: str, seed: int) -> tuple[CodebookConfig, str]:
        """Return the settings of an arm's tokenizer, and the job that trains its perceptual network.

        The job's name is empty if no job trains the network.
        """
        budget = self.budget
        base, head, _, how = budget.codebook, *arm.partition("-")
        if arm in ("pixel", "classification", "contrastive"):
            base = dataclasses.replace(base, perceptual=PerceptualConfig(network="none"))
            explicit = ExplicitConfig() if arm == "pixel" else ExplicitConfig(kind=arm)  # type: ignore[arg-type]
            return dataclasses.replace(base, explicit=explicit), ""
        kind = head if head in budget.layers else budget.default
        network, job = self._network(kind, seed)
        is_given = kind == budget.default and self.config.network
        layers = self.config.network_layers if is_given else budget.layers[kind]
        weights = "random" if how == "random" else self.config.network_weights if is_given else ""
        perceptual = dataclasses.replace(
            base.perceptual, network=network, layers=layers, weights=weights, shuffle=how == "shuffled"
        )
        return _variant(dataclasses.replace(base, perceptual=perceptual), budget, arm), job

    def _add_analysis(self, arm: str, seed: int, *, classified: bool) -> None:
        """Add the analysis of an arm's tokenizer; `classified` says whether its reconstructions are classified."""
        tokenizer, job, _ = self._codebook(arm, seed)
        classifier, classifier_job = "", ""
        # An analysis with a classifier holds all figures of one without.
        is_judged = self.finished_analysis(arm, seed) == Path(self.out(f"judged-{arm}-{seed}"))
        if (classified or is_judged) and self.has_labels:
            classifier = self.classifier
            if not classifier and self.budget.supervised is not None:
                classifier, classifier_job = self._network("supervised", seed)
        name = f"{'judged' if classifier else 'analysis'}-{arm}-{seed}"
        if f"judged-{arm}-{seed}" in self.jobs:
            return
        self.jobs.pop(f"analysis-{arm}-{seed}", None)
        common: dict[str, Any] = {**self._source, "seed": seed, "out": self.out(name)}
        if most := self.budget.max_images:
            common |= {"max_train": most, "max_test": most}
        settings = AnalyzeConfig(tokenizer=tokenizer, classifier=classifier, **common)
        self.add(name, "analyze", settings, job, classifier_job)

    def finished_analysis(self, arm: str, seed: int) -> Path | None:
        """Return the folder of an arm's finished analysis, if possible of one with a classifier."""
        jobs = [Job("analyze", AnalyzeConfig(out=self.out(f"{kind}-{arm}-{seed}"))) for kind in ("judged", "analysis")]
        return next((job.out for job in jobs if job.finished), None)

    # -------------------------------------------------------------------------------------------------------- transfer

    def _add_transfers(self, kinds: list[str], arm: str, seed: int) -> None:
        if "classifier" in kinds and self.has_labels:
            self._add_classifier(arm, seed)
        if "attack" in kinds and self.has_labels:
            run, job = self._add_classifier(arm, seed)
            name, attack = f"attack-{arm}-{seed}", replace(AttackConfig(), {"names": tuple(dict(ATTACKED))})
            source: dict[str, Any] = {"images": self.config.data, "value_range": self.config.value_range}
            self.add(name, "predict", PredictConfig(run=run, out=self.out(name), attack=attack, **source), job)
        for kind in [kind for kind in kinds if kind in self.transfer_data]:
            part, name, data = Arm.parse(arm), f"{kind}-{arm}-{seed}", self.transfer_data[kind]
            is_scratch = part.target in FROM_SCRATCH
            backbone, job = self._add_classifier(arm, seed) if is_scratch else self._backbone(part, seed)
            changes = {"backbone": backbone, "num_images": data.num_images, **data.settings}
            base = self.budget.transfers.get(f"{kind}-{part.target}", self.budget.transfers[kind])
            command = "finetune" if isinstance(base, FinetuneConfig) else kind
            self.add(name, command, self._run_settings(base, name, seed, **changes), job)

    def _add_classifier(self, arm: str, seed: int) -> tuple[str, str]:
        """Add an arm's classifier; return the run and its job's name."""
        part, name = Arm.parse(arm), f"classifier-{arm}-{seed}"
        backbone, job = self._backbone(part, seed)
        runs = self.budget.vits[part.vit]
        base = runs.own.get(part.target, runs.finetune)
        self.add(name, "finetune", self._run_settings(base, name, seed, backbone=backbone), job)
        return self.out(name), name

    def _backbone(self, arm: Arm, seed: int) -> tuple[str, str]:
        """Plan an arm's backbone; return it and the name of the job that trains it."""
        runs = self.budget.vits[arm.vit]
        if arm.target in FROM_SCRATCH:
            named = runs.own[arm.target].backbone
            # Without a timm name, a run names the architecture; its weights are not used.
            return (named, "") if named else self._backbone(dataclasses.replace(arm, target="moco"), seed)
        if arm.target == "dino":
            return self.config.dino, ""
        # A ViT is fine-tuned at several image sizes, but pre-trained once.
        name = f"vit-{dataclasses.replace(arm, vit=arm.vit.partition('-')[0]).name}-{seed}"
        times = arm.epochs / EPOCHS
        if arm.target == "moco":
            self.add(name, "contrast", self._run_settings(runs.moco, name, seed, times=times))
        elif arm.target == "mae":
            self.add(name, "pretrain", self._run_settings(runs.mae, name, seed, times=times))
        else:
            self._add_masked_modelling(name, runs.pretrain, arm.target, seed, times)
        return self.out(name), name

    def _add_masked_modelling(self, name: str, base: PretrainConfig, target: str, seed: int, times: float) -> None:
        tokenizer, job, stride = self._codebook(target, seed)
        side = base.tokenizer_size or base.image_size  # of the crops in the default tokenizer
        size = side // self.budget.codebook.model.stride * stride
        changes: dict[str, Any] = {"tokenizer": tokenizer, "tokenizer_size": 0 if size == base.image_size else size}
        views_of = f"{target}-visible" if base.visible_only else target  # MAE's views are other crops
        self.add_pretraining(name, self._run_settings(base, name, seed, times=times, **changes), views_of, job)

    def add_pretraining(self, name: str, settings: PretrainConfig, target: str, *needs: str) -> None:
        """Add a pre-training on the tokens of `target`, which come from a bank if that saves time.

        The bank is a separate job, which all pre-trainings with the same views share.
        """
        views, seed = self.config.views, settings.seed
        if views < 0:
            views = num_views(int(settings.max_steps) * settings.batch_size / max(len(self.splits.train), 1))
        if not views:
            self.add(name, "pretrain", settings, *needs)
            return
        bank = f"bank-{target}-{settings.tokenizer_size or settings.image_size}px-{views}views-{seed}"
        same = {field: getattr(settings, field) for field in (*VIEW_SETTINGS, "data", "value_range", "tokenizer")}
        self.add(bank, "tokenize", TokenizeConfig(**same, views=views, out=self.out(bank)), *needs)
        self.add(name, "pretrain", dataclasses.replace(settings, tokens=self.out(bank)), bank, *needs)


def num_views(epochs: float) -> int:
    """Return the number of token bank views for a pre-training of this length; 0 if a bank saves too little.

    One view per 20 epochs, but at least 4. In 300 epochs 16 views had no measurable cost, 4 views did
    (docs/results/transfer.md).
    """
    views = max(4, round(epochs / 20))
    return views if epochs >= 2 * views else 0


def _variant(base: CodebookConfig, budget: Budget, arm: str) -> CodebookConfig:
    """Return the settings with an arm's changes other than the perceptual network."""
    model = base.model
    if arm.startswith("lambda-"):
        # The paper's default is 1. That of a smaller budget can differ, so the table is of multiples of the default.
        weight = float(arm.removeprefix("lambda-")) * base.perceptual.weight
        return dataclasses.replace(base, perceptual=dataclasses.replace(base.perceptual, weight=weight))
    if arm == "adversarial":
        term = AdversarialConfig(weight=0.4, num_layers=budget.discriminator_layers)
        return dataclasses.replace(base, adversarial=term)
    if arm == "half-stride":  # one level less and half the pixels: equally many tokens an image
        model = dataclasses.replace(model, channels=model.channels[:-1])
        return dataclasses.replace(base, model=model, image_size=base.image_size // 2)
    models = {
        "transformers": budget.transformers,
        "lite": budget.lite,
        "half-width": dataclasses.replace(model, decoder_width=0.5),
        "half-depth": dataclasses.replace(model, decoder_blocks=max(model.num_blocks // 2, 1)),
    }
    return dataclasses.replace(base, model=models.get(arm, model))
