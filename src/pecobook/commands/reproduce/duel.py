"""The duel: does a ViT learn more from perceptual codes than from a control's, and than from pixels? (docs/study.md).

One seed is a whole chain of a feature network, codebooks, token banks, ViTs and their probes. `duel-tuning` trains
every setting of every arm; `duel` uses for each arm the setting with the best validation accuracy that it finds in the
folder.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pecobook.analysis.evidence import LEVEL, difference, signed
from pecobook.commands.duel_arms import Setting, run_name, settings_of
from pecobook.commands.jobs import Job
from pecobook.commands.reproduce.few_labels import FOLDERS, few_labels
from pecobook.data.images import check_labels
from pecobook.data.source import Splits
from pecobook.recipes import codebook, contrast, finetune, pretrain
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.codebook import CodebookConfig, ExplicitConfig
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.pretrain import DecoderConfig, MaskConfig, PretrainConfig
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.tokenize import VIEW_SETTINGS, TokenizeConfig
from pecobook.settings.training import BackboneConfig, OptimConfig
from pecobook.settings.values import replace
from pecobook.utils.json_files import NUMBER, OBJECT, Kind, is_number, last_evaluation, read_json

POWER = 2.0
"""Number of points by which a power control must beat the pixel codebook; otherwise the budget can show nothing."""
FIRST = ("supervised", "classification", "pixel")
"""The arms from which the power is read; they are trained first, starting with the longest chain of jobs."""


@dataclasses.dataclass(frozen=True)
class DuelBudget:
    """The settings of every kind of run of the duel."""

    contrast: ContrastConfig
    supervised: FinetuneConfig
    """The same network, trained from random weights on the labels."""
    codebook: CodebookConfig
    pretrain: PretrainConfig
    pixels: PretrainConfig
    """MAE's setting: visible patches only, 75% hidden at random."""
    few: FinetuneConfig
    views: int
    """Number of views in a token bank."""


def duel_budget(name: str) -> DuelBudget:
    """Return the budget `tiny` (32 pixels), `small` (64 pixels, for CPUs) or `paper` (224 pixels, for a GPU)."""
    if name == "tiny":
        network = dataclasses.replace(contrast.tiny(), batch_size=256, max_steps="160")
        return _budget(network, codebook.tiny(), pretrain.tiny(), "20 epochs", views=4)
    if name == "small":
        network = dataclasses.replace(contrast.cifar10(), batch_size=256, image_size=64, max_steps="20 epochs")
        base = codebook.imagenette()
        decoder = dataclasses.replace(base.model, decoder_width=0.5)
        tokenizer = dataclasses.replace(base, image_size=64, max_steps="2 epochs", precision="fp32", model=decoder)
        vit = BackboneConfig(
            name="vit_tiny_patch16_224", args='{"patch_size": 16, "depth": 6, "embed_dim": 192, "init_values": 0.1}'
        )
        masked = dataclasses.replace(pretrain.tiny(), max_steps="25 epochs", image_size=64, model=vit, save_every=500)
        return _budget(network, tokenizer, masked, "60 epochs", views=4)
    masked = dataclasses.replace(
        pretrain.imagenette(), max_steps="200 epochs", image_size=224, mask=MaskConfig(num_masked=75)
    )
    return _budget(contrast.imagenette(), codebook.imagenette_224(), masked, "100 epochs", views=10)


def _budget(
    network: ContrastConfig, tokenizer: CodebookConfig, masked: PretrainConfig, length: str, *, views: int
) -> DuelBudget:
    few = FinetuneConfig(
        batch_size=100,
        max_steps=length,
        image_size=masked.image_size,
        precision=masked.precision,
        optim=OptimConfig(lr=1e-3, warmup="10%", layer_decay=0.75),
        min_crop=0.3,
        eval_crop=1.0,
        drop_path=0.0,
        **finetune.PLAIN,
    )
    supervised = dataclasses.replace(
        finetune.tiny(),
        weights="random",
        batch_size=network.batch_size,
        max_steps=network.max_steps,
        image_size=network.image_size,
        precision=network.precision,
        optim=OptimConfig(lr=1e-3, warmup="10%"),
    )
    num_patches = (tokenizer.image_size // tokenizer.model.stride) ** 2
    pixels = dataclasses.replace(
        masked,
        target="pixels",
        visible_only=True,
        mask=MaskConfig(kind="random", num_masked=3 * num_patches // 4, min_block=1),
        decoder=DecoderConfig(depth=2, width=128, num_heads=4)
        if num_patches < 64
        else DecoderConfig(depth=4, width=256, num_heads=8),
    )
    return DuelBudget(network, supervised, tokenizer, masked, pixels, few, views)


class Duel:
    """The jobs of the duel, and how its figures are read.

    Args:
        config: the command's settings.
        splits: the images, with labels.
        add: adds a job to the plan, as `Plan.add` does.
        run: returns the settings of a training, given base, name, seed and changes, as the plan makes them.

    Raises:
        DataError: the images have no labels.
    """

    def __init__(
        self, config: ReproduceConfig, splits: Splits, add: Callable[..., None], run: Callable[..., Any]
    ) -> None:
        check_labels(splits, config.data)
        self.config, self.splits, self._add, self._run = config, splits, add, run
        self.budget = duel_budget(config.budget)
        self.out = Path(config.out)

    def add(self, arms: Mapping[str, Setting], seed: int) -> None:
        """Plan a seed: first what determines the power, then the other arms' probes, last the secondary figures."""
        for arm in sorted(arms, key=lambda arm: FIRST.index(arm) if arm in FIRST else len(FIRST)):
            self.add_probe(arm, arms[arm], seed)
        for arm, setting in arms.items():
            self._add_secondary(arm, setting, seed)

    def add_tuning(self, arm: str, setting: Setting, seed: int) -> None:
        """Plan what tuning needs: an arm's probe or, for random weights, which are not pre-trained, fine-tuning."""
        if arm == "scratch":
            self._add_few("tune", arm, setting, seed, *self._vit("pixels", Setting(), seed))
        else:
            self.add_probe(arm, setting, seed)

    def add_probe(self, arm: str, setting: Setting, seed: int) -> None:
        """Plan an arm's ViT, everything it needs, and its probe."""
        vit, vit_job = self._vit(arm, setting, seed)
        weights = "random" if arm == "scratch" else ""
        name = f"probe-{run_name(arm, setting)}-{seed}"
        out = f"{self._out(name)}.json"
        self._add(name, "probe", ProbeConfig(backbone=vit, weights=weights, out=out, **self._common(seed)), vit_job)

    def _add_secondary(self, arm: str, setting: Setting, seed: int) -> None:
        """Plan fine-tuning on few labels and the analysis of the codes."""
        self._add_few("few", arm, setting, seed, *self._vit(arm, setting, seed))
        if arm not in ("scratch", "pixels"):
            tokenizer, job = self._codebook(arm, setting, seed)
            name = f"analysis-{run_name(arm, setting)}-{seed}"
            analysis = AnalyzeConfig(tokenizer=tokenizer, out=self._out(name), **self._common(seed))
            self._add(name, "analyze", analysis, job)

    def _add_few(self, kind: str, arm: str, setting: Setting, seed: int, vit: str, vit_job: str) -> None:
        """Plan fine-tuning on few labels: `few` is tested on the test images, `tune` on other training images."""
        name = f"{kind}-{run_name(arm, setting)}-{seed}"
        changes: dict[str, Any] = {"data": str(self.out / FOLDERS[kind]), "backbone": vit}
        if arm == "scratch":
            changes |= {"weights": "random", "optim.layer_decay": 1.0, "optim.lr": setting.lr}
        few = self._run(self.budget.few, name, seed, num_images=self._num_learned[kind], **changes)
        self._add(name, "finetune", few, vit_job)

    @cached_property
    def _num_learned(self) -> dict[str, int]:
        """The number of images that each kind of fine-tuning learns from; choosing among a million takes a while."""
        return {kind: len(few_labels(self.splits, kind)[0][1]) for kind in FOLDERS}

    def _common(self, seed: int) -> dict[str, Any]:
        return {"data": self.config.data, "value_range": self.config.value_range, "seed": seed}

    def chosen(self, arm: str) -> Setting:
        """Return the arm's setting of the best validation accuracy in the folder; the default if nothing was tuned."""
        return self._choice(arm)[0]

    def _choice(self, arm: str) -> tuple[Setting, bool]:
        """Return the arm's setting, and whether a tuning chose it.

        Seeds at which all settings of the arm were trained count equally. Those of the study do not count: if tuning
        changes an arm with two settings, its earlier seeds have both, and would choose again.
        """
        candidates, complete = settings_of(arm), self._complete_tunings(arm)
        if not complete:
            return candidates[0], False
        return max(candidates, key=lambda setting: statistics.fmean(scores[setting] for scores in complete)), True

    def _complete_tunings(self, arm: str) -> list[dict[Setting, float]]:
        """Return every setting's validation accuracy, for each seed at which all settings were trained."""
        by_seed: dict[str, dict[Setting, float]] = {}
        runs, is_scratch = self.out / "runs", arm == "scratch"
        kind, end = ("tune", "/export/config.json") if is_scratch else ("probe", ".json")
        for setting in settings_of(arm):
            prefix = f"{kind}-{run_name(arm, setting)}-"
            for file in runs.glob(f"{prefix}*{end}"):
                seed = str(file.relative_to(runs)).removeprefix(prefix).removesuffix(end)
                if seed not in self._seeds_of_study:
                    score = last_evaluation(file.parents[1])["top1"] if is_scratch else validation_accuracy(file)
                    by_seed.setdefault(seed, {})[setting] = score
        return [scores for scores in by_seed.values() if len(scores) == len(settings_of(arm))]

    @cached_property
    def _seeds_of_study(self) -> set[str]:
        """The seeds of this command and of earlier ones; only the study fine-tunes on the few labels."""
        earlier = {run.name.rpartition("-")[2] for run in (self.out / "runs").glob("few-*")}
        return {*map(str, self.config.seeds), *earlier}

    def remarks(self, arms: Iterable[str]) -> list[str]:
        """Return a line on the settings of the arms that were tuned, and one on those that were not."""
        tuned, others = list[str](), list[str]()
        for arm in arms:
            setting, is_tuned = self._choice(arm)
            (tuned if is_tuned else others).append(f"{arm} {setting.name}")
        heads = {
            "Settings, chosen on validation images": tuned,
            "Settings, not tuned (run duel-tuning with another seed first)": others,
        }
        return [f"{head}: {', '.join(names)}." for head, names in heads.items() if names]

    def _out(self, name: str) -> str:
        return str(self.out / "runs" / name)

    def _network(self, arm: str, seed: int) -> tuple[str, str]:
        """Plan an arm's perceptual network; return it and its job's name, which is empty for a given network."""
        if arm == "supervised":
            if self.config.supervised:
                return self.config.supervised, ""
            contrast_folder, contrast_job = self._network("perceptual", seed)  # names the architecture
            name = f"network-labels-{seed}"  # unlike the names of the tables' runs, which are other runs
            settings = self._run(self.budget.supervised, name, seed, backbone=contrast_folder)
            self._add(name, "finetune", settings, contrast_job)
        else:
            name = f"network-contrast-{seed}"
            self._add(name, "contrast", self._run(self.budget.contrast, name, seed))
        return self._out(name), name

    def _codebook(self, arm: str, setting: Setting, seed: int) -> tuple[str, str]:
        """Plan an arm's tokenizer; return its folder and its job's name."""
        head, _, how = arm.partition("-")
        name = f"codebook-{arm}+{'rising' if setting.rising else 'steady'}-{seed}"
        base, network_job = self.budget.codebook, ""
        if head in ("pixel", "classification"):
            explicit = ExplicitConfig() if head == "pixel" else ExplicitConfig(kind="classification")
            base = dataclasses.replace(base, perceptual=PerceptualConfig(network="none"), explicit=explicit)
        elif arm == "public":
            given = self.config
            names = {"network": given.network, "weights": given.network_weights, "layers": given.network_layers}
            base = replace(base, {f"perceptual.{name}": value for name, value in names.items()})
        else:
            network, network_job = self._network(head, seed)
            weights, shuffle = "random" if how == "random" else "", how == "shuffled"
            perceptual = dataclasses.replace(base.perceptual, network=network, weights=weights, shuffle=shuffle)
            base = dataclasses.replace(base, perceptual=perceptual)
        settings = self._run(base, name, seed)
        if setting.rising:
            settings = replace(settings, {"perceptual.warmup": int(settings.max_steps) // 2})
        self._add(name, "codebook", settings, network_job)
        return self._out(name), name

    def _vit(self, arm: str, setting: Setting, seed: int) -> tuple[str, str]:
        """Plan an arm's pre-training; return its folder and its job's name."""
        if arm == "scratch":  # the run names the architecture; its weights are not used
            return self._vit("pixels", self.chosen("pixels"), seed)
        name = f"vit-{run_name(arm, setting)}-{seed}"
        rate = {"optim.lr": setting.lr}
        if arm == "pixels":
            self._add(name, "pretrain", self._run(self.budget.pixels, name, seed, **rate))
            return self._out(name), name
        tokenizer, codebook_job = self._codebook(arm, setting, seed)
        settings = self._run(self.budget.pretrain, name, seed, tokenizer=tokenizer, **rate)
        bank = f"bank-{arm}{'+rising' if setting.rising else ''}-{seed}"
        same = {field: getattr(settings, field) for field in (*VIEW_SETTINGS, "data", "value_range", "tokenizer")}
        self._add(bank, "tokenize", TokenizeConfig(**same, views=self.budget.views, out=self._out(bank)), codebook_job)
        self._add(name, "pretrain", dataclasses.replace(settings, tokens=self._out(bank)), bank, codebook_job)
        return self._out(name), name


_LAYERS = Kind(
    "an object with an accuracy of each layer", lambda v: OBJECT.holds(v) and v and all(map(is_number, v.values()))
)
_PROBE = {"linear": {"accuracy": NUMBER, "layers": _LAYERS}, "knn": {"accuracy": NUMBER}}


def _read_probe(file: Path) -> dict[str, Any]:
    return read_json(file, _PROBE, remedy="Delete that file, and start again.")


def validation_accuracy(file: Path) -> float:
    """Return the best validation accuracy over the layers of a probe, percent."""
    return float(max(_read_probe(file)["linear"]["layers"].values()))


def probe_figures(jobs: Mapping[str, Job], run: str) -> dict[str, float]:
    """Return linear, knn and validation from a run's probe, if it is finished."""
    job = jobs.get(f"probe-{run}")
    if job is None or not job.finished:
        return {}
    probe = _read_probe(job.out)
    values = {kind: float(probe[kind]["accuracy"]) for kind in ("linear", "knn")}
    return values | {"validation": validation_accuracy(job.out)}


def reading(linear: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return what the study's rule of reading says (docs/study.md).

    Args:
        linear: the linear probe of each arm by seed.
    """
    pixel = linear.get("pixel", {})
    controls = {arm: difference(arm, linear.get(arm, {}), pixel) for arm in ("classification", "supervised")}
    measured = {arm: gain.mean for arm, gain in controls.items() if gain.values}
    if not measured:
        return []
    told = ", ".join(f"{arm} {signed(mean, limit=POWER)}" for arm, mean in measured.items())
    lines = [f"Power: the controls that know the labels, over the pixel codebook: {told} points."]
    if max(measured.values()) < POWER:
        none = f"Neither leads by {POWER:g} points: this budget has no power, and nothing else is read from it."
        unknown = "The other control is not measured, so the power is not known."
        return [*lines, none if len(measured) == len(controls) else unknown]
    gain = difference("", linear.get("perceptual", {}), linear.get("perceptual-random", {}))
    low, high = gain.interval
    if low >= -1 and high <= 1:
        lines.append(f"Perceptual minus control lies within 1 point ({LEVEL:.0%}): a gain of a point is denied.")
    return lines
