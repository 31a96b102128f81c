"""The duel: its jobs, the choice of settings on validation images, and the rule by which it is read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pecobook import cli
from pecobook.commands.duel_arms import ARMS, Setting, parse_run, run_name, settings_of
from pecobook.commands.paper_tables import TABLES, chosen_tables
from pecobook.commands.reproduce.duel import DuelBudget, duel_budget, reading, validation_accuracy
from pecobook.commands.reproduce.few_labels import few_labels, write_images
from pecobook.commands.reproduce.plan import Plan
from pecobook.commands.reproduce.tables import gains_over_controls, measured_tables
from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.source import ImageSource
from pecobook.errors import DataError, RunFolderError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import replace
from tests.commands.test_reproduce import InThisProcess
from tests.runs import SMALL

ALL_ARMS = (*ARMS, "perceptual-random", "perceptual-shuffled")


def make_plan(images: Path, out: Path, *tables: str, seeds: tuple[int, ...] = (0,), **settings: Any) -> Plan:
    config = ReproduceConfig(data=str(images), tables=tables, out=str(out), seeds=seeds, **settings)
    return Plan(config, chosen_tables(tables), open_images(str(images)))


def write_probe(folder: Path, run: str, validation: float, test: float) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    figures = {"linear": {"accuracy": test, "layers": {"1": validation - 1, "2": validation}}, "knn": {"accuracy": 1.0}}
    (folder / "runs" / f"probe-{run}.json").write_text(json.dumps(figures))


def test_settings__are_tried_equally_by_all_arms_with_a_network() -> None:
    for arm in ("perceptual", "perceptual-random", "perceptual-shuffled", "supervised"):
        assert len(settings_of(arm)) == 4
    assert [setting.name for setting in settings_of("pixel")] == ["lr0.001", "lr0.003"]
    assert len(settings_of("scratch")) == 2
    for arm in ARMS:
        for setting in settings_of(arm):
            assert parse_run(run_name(arm, setting)) == (arm, setting)


def test_plan__has_a_chain_for_every_arm(images: Path, tmp_path: Path) -> None:
    jobs = make_plan(images, tmp_path, "duel").jobs
    assert jobs["codebook-perceptual+steady-0"].needs == ("network-contrast-0",)
    assert jobs["bank-perceptual-0"].needs == ("codebook-perceptual+steady-0",)
    vit = jobs["vit-perceptual+lr0.001-0"]
    assert (vit.command, vit.needs) == ("pretrain", ("bank-perceptual-0", "codebook-perceptual+steady-0"))
    assert vit.config.tokens == jobs["bank-perceptual-0"].config.out
    assert jobs["probe-perceptual+lr0.001-0"].needs == ("vit-perceptual+lr0.001-0",)
    assert jobs["codebook-perceptual-random+steady-0"].config.perceptual.weights == "random"
    assert jobs["codebook-perceptual-shuffled+steady-0"].config.perceptual.shuffle
    assert jobs["codebook-classification+steady-0"].config.explicit.kind == "classification"
    assert jobs["codebook-supervised+steady-0"].config.perceptual.network == jobs["network-labels-0"].config.out
    for name, job in jobs.items():
        assert job.config.seed == 0
        assert job.config.out.startswith(str(tmp_path / "runs" / name))
        assert set(job.needs) <= jobs.keys()


def test_plan__a_public_network_has_an_arm_of_its_own(images: Path, tmp_path: Path) -> None:
    """It has seen other images, so it stands beside the network that was trained on these."""
    given: dict[str, Any] = {"network": "torchvision:squeezenet1_1", "network_layers": (2,), "network_weights": "w.pt"}
    plan = make_plan(images, tmp_path, "duel", **given)
    codebook = plan.jobs["codebook-public+steady-0"]
    assert codebook.needs == ()
    assert {f"network_{name}": getattr(codebook.config.perceptual, name) for name in ("layers", "weights")} == {
        name: given[name] for name in ("network_layers", "network_weights")
    }
    assert codebook.config.perceptual.network == given["network"]
    assert plan.jobs["codebook-perceptual+steady-0"].needs == ("network-contrast-0",)
    assert plan.duel is not None
    assert "public lr0.001" in plan.duel.remarks(ALL_ARMS)[0]
    tuning = make_plan(images, tmp_path, "duel-tuning", **given)
    assert len([name for name in tuning.jobs if name.startswith("vit-public")]) == 4
    without = make_plan(images, tmp_path, "duel")
    assert not any("public" in name for name in without.jobs)
    (measured,) = measured_tables(without)
    assert "public" not in next(line for line in measured.remarks if line.startswith("Settings"))
    assert without.left_out()[-1].endswith("(needs --network NETWORK).")


def test_plan__names_what_no_job_reads(images: Path, tmp_path: Path) -> None:
    assert make_plan(images, tmp_path, "duel", dino="timm:vit", supervised="timm:resnet18").left_out()[-1] == (
        "Not used by these tables: --dino timm:vit."
    )
    table = make_plan(images, tmp_path, "table7", network="timm:resnet18", dalle="/dalle", network_layers=(1,))
    assert [line for line in table.left_out() if "used" in line] == ["Not used by these tables: --dalle /dalle."]


def test_plan__no_arm_has_a_handicap(images: Path, tmp_path: Path) -> None:
    """All trainings of a kind have equal lengths and views; random weights have no layer decay."""
    jobs = make_plan(images, tmp_path, "duel").jobs
    for kind in ("codebook", "vit", "few"):
        assert len({job.config.max_steps for name, job in jobs.items() if name.startswith(kind)}) == 1
    scratch, pixel = (jobs[f"few-{arm}+lr0.001-0"].config for arm in ("scratch", "pixel"))
    assert (scratch.weights, scratch.optim.layer_decay, pixel.optim.layer_decay) == ("random", 1.0, 0.75)
    assert jobs["probe-scratch+lr0.001-0"].config.weights == "random"
    for few in (scratch, pixel):  # plain augmentation
        assert (few.mixup, few.cutmix, few.random_erasing, few.rand_augment) == (0.0, 0.0, 0.0, "")
    pixels = jobs["vit-pixels+lr0.001-0"].config
    assert (pixels.target, pixels.visible_only, pixels.mask.kind) == ("pixels", True, "random")
    assert pixels.mask.num_masked == 12  # three quarters of 16


def test_plan__trains_first_what_the_power_is_read_from(images: Path, tmp_path: Path) -> None:
    """A budget without power can so be stopped before its other arms."""
    names = list(make_plan(images, tmp_path, "duel", seeds=(0, 1)).jobs)
    probes = [name.removeprefix("probe-").partition("+")[0] for name in names if name.startswith("probe")]
    assert probes[:3] == ["supervised", "classification", "pixel"]
    assert sorted(probes[:8]) == sorted(probes[8:])  # seed by seed
    assert len(set(probes)) == 8
    first_secondary = next(place for place, name in enumerate(names) if name.startswith(("few", "analysis")))
    assert all(name.endswith("-0") for name in names[:first_secondary])
    assert sum(name.startswith("probe") for name in names[:first_secondary]) == 8


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_budgets__leave_the_precision_to_the_hardware(name: str) -> None:
    """On a CPU without bfloat16 a ViT's step took 15 times as long in it as in fp32."""
    budget = duel_budget(name)
    assert {budget.contrast.precision, budget.pretrain.precision, budget.pixels.precision, budget.few.precision} == {
        "auto"
    }


def test_budgets__have_the_masks_of_their_grids() -> None:
    for name, patches in (("tiny", 16), ("small", 16), ("paper", 196)):
        budget = duel_budget(name)
        assert (budget.codebook.image_size // budget.codebook.model.stride) ** 2 == patches
        assert budget.pixels.mask.num_masked == 3 * patches // 4
        assert budget.pretrain.image_size == budget.codebook.image_size == budget.few.image_size
    assert duel_budget("paper").pretrain.mask.num_masked == 75


def test_tuning__chooses_by_validation_and_never_by_test(images: Path, tmp_path: Path) -> None:
    tuning = make_plan(images, tmp_path, "duel-tuning", seeds=(100,))
    assert not any(name.startswith(("few", "analysis")) for name in tuning.jobs)
    assert tuning.jobs["codebook-perceptual+rising-100"].config.perceptual.warmup == 300  # half of 600 steps
    plan = make_plan(images, tmp_path, "duel")
    assert plan.duel is not None
    assert "not tuned" in plan.duel.remarks(ALL_ARMS)[0]
    for number, setting in enumerate(settings_of("perceptual")):
        write_probe(
            tmp_path, f"{run_name('perceptual', setting)}-100", validation=40.0 + number % 3, test=90.0 - number
        )
    write_probe(tmp_path, "perceptual+lr0.001-0", validation=99.0, test=99.0)  # a seed of the study, not of the tuning
    assert plan.duel.chosen("perceptual") == Setting(1e-3, rising=True)
    assert plan.duel.chosen("pixel") == Setting()
    tuned = make_plan(images, tmp_path, "duel")
    assert "vit-perceptual+rising-lr0.001-0" in tuned.jobs
    assert "vit-perceptual+lr0.001-0" not in tuned.jobs
    assert tuned.duel is not None
    chosen, defaults = tuned.duel.remarks(["pixel", "perceptual"])  # an unfinished tuning has not chosen every arm's
    assert chosen == "Settings, chosen on validation images: perceptual rising-lr0.001."
    assert defaults.startswith("Settings, not tuned (run duel-tuning with another seed first): pixel lr0.001")
    assert tuned.duel.remarks([]) == []


def test_tuning__seeds_of_the_study_do_not_choose_again(images: Path, tmp_path: Path) -> None:
    """After the tuning changed an arm, its first seed has runs of both settings."""
    slow, fast = settings_of("pixel")
    for seed, scores in ((100, (40.0, 41.0)), (0, (50.0, 40.0)), (1, (50.0, 40.0))):
        for setting, score in zip((slow, fast), scores, strict=True):
            write_probe(tmp_path, f"{run_name('pixel', setting)}-{seed}", score, score)
    (tmp_path / "runs" / "few-pixel+lr0.001-1").mkdir()  # a seed that this command does not name
    duel = make_plan(images, tmp_path, "duel", seeds=(0,)).duel
    assert duel is not None
    assert duel.chosen("pixel") == fast


def test_table__has_paired_differences_and_the_reading(images: Path, tmp_path: Path) -> None:
    scores = {"pixel": 50.0, "classification": 55.0, "supervised": 51.0, "perceptual": 53.0, "perceptual-random": 50.5}
    scores |= {"perceptual-shuffled": 50.7}
    for seed, noise in enumerate((0.0, 0.3, -0.2)):
        for place, (arm, score) in enumerate(scores.items()):
            write_probe(tmp_path, f"{arm}+lr0.001-{seed}", 1.0, score + noise * place)
    (measured,) = measured_tables(make_plan(images, tmp_path, "duel", seeds=(0, 1, 2)))
    gains = gains_over_controls(measured)
    primary = [gain for gain in gains if gain.startswith("Primary")]
    assert len(primary) == 5  # perceptual over pixel and the two controls, two power controls over pixel
    heading = "Primary: linear probe of the ViT, %: tokens, perceptual loss minus tokens, "
    assert gains[0].startswith(f"{heading}pixel loss alone: +3.1")
    assert "shown to be higher" in gains[0]
    assert any("this budget" in line or "Power" in line for line in measured.remarks)


def test_reading__needs_power_first() -> None:
    arms = {"pixel": {0: 50.0, 1: 51.0}, "perceptual": {0: 60.0, 1: 62.0}, "perceptual-random": {0: 50.0, 1: 50.5}}
    assert reading(arms) == []
    weak = reading(arms | {"classification": {0: 51.0, 1: 52.0}, "supervised": {0: 49.0, 1: 51.0}})
    assert weak[0].endswith("classification +1.0, supervised −0.5 points.")
    assert "no power" in weak[1]
    close = reading(arms | {"classification": {0: 51.96, 1: 52.96}, "supervised": {0: 49.0, 1: 51.0}})
    assert close[0].endswith("classification +1.96, supervised −0.5 points."), "+2.0 is a lead of 2 points"
    assert "Neither leads by 2 points" in close[1]
    assert len(reading(arms | {"classification": {0: 53.0, 1: 54.0}})) == 1  # power, and nothing to deny
    level = {"perceptual-random": {0: 59.9, 1: 62.0, 2: 61.0}, "perceptual": {0: 60.0, 1: 62.1, 2: 61.0}}
    denied = reading(arms | level | {"classification": {0: 53.0, 1: 54.0}})
    assert "denied" in denied[1]


def test_images__have_few_labels_a_class_and_all_test_images(images: Path, tmp_path: Path) -> None:
    source = open_images(str(images))
    write_images(source, "few", tmp_path)
    written = open_images(str(tmp_path / "images"))
    assert len(written.evaluation) == len(source.evaluation)
    assert len(written.train) == len(source.train)  # fewer than 100 of each class here
    assert written.train.classes is not None
    assert source.train.classes is not None
    assert len(written.train.classes) == len(source.train.classes)
    write_images(source, "few", tmp_path)  # a second time nothing is written


def test_images__of_every_format_are_found_again_and_one_that_is_lost_ends_nothing(tmp_path: Path) -> None:
    """Names of Pillow's formats are no extensions: JPEG 2000's, and those of images with a wrong name."""
    root, pixels = tmp_path / "all", np.zeros((8, 8, 3), np.uint8)
    for split, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        folder = root / split / label
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "new.jp2")
        Image.fromarray(pixels).save(folder / "other.png", format="GIF")
        (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    source = open_images(str(root))
    (root / "test" / "b" / "new.jp2").unlink()
    write_images(source, "few", tmp_path)
    written = open_images(str(tmp_path / "images"))
    assert (len(written.train), len(written.evaluation)) == (6, 5)
    assert written.left_out == {}
    bad = [number for number in range(6) if not _can_be_read(written.train, number)]
    assert len(bad) == 2  # the broken ones


def test_images__that_are_arrays_are_found_again(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "all" / place).mkdir(parents=True)
        np.save(tmp_path / "all" / place / "array.npy", np.full((8, 8, 3), 7, np.uint8))
    write_images(open_images(str(tmp_path / "all")), "few", tmp_path)
    written = open_images(str(tmp_path / "images"))
    assert (len(written.train), written.evaluation.read(1).float().mean().item()) == (2, 7.0)


def _can_be_read(source: ImageSource, number: int) -> bool:
    try:
        source.read(number)
    except BadImage:
        return False
    return True


def test_images__of_the_tuning_are_no_test_images(images: Path, tmp_path: Path) -> None:
    source = open_images(str(images))
    write_images(source, "tune", tmp_path)
    written = open_images(str(tmp_path / "images-tuning"))
    (of_learning, learned), (of_judging, judging) = few_labels(source, "tune")
    assert of_learning is of_judging is source.train
    assert not set(learned) & set(judging)
    assert len(written.train) == len(learned) > 0
    assert len(written.evaluation) == len(judging) == len(learned)
    # With 200 images of a class, the tuning learns from the images of the study.
    labels = np.repeat([0, 1], 250)
    many = SimpleNamespace(train=SimpleNamespace(labels=labels), evaluation=range(3))
    (_, few), (_, tested) = few_labels(many, "few")  # type: ignore[arg-type]
    (_, tuned), (_, judging) = few_labels(many, "tune")  # type: ignore[arg-type]
    assert few == tuned
    assert tested == [0, 1, 2]
    assert [int((labels[chosen] == 1).sum()) for chosen in (few, judging)] == [100, 100]


def test_few_labels__are_the_first_of_each_class_in_one_order() -> None:
    labels = np.concatenate([np.random.default_rng(2).integers(0, 5, 700), [7]])  # the last class has one image
    source = SimpleNamespace(train=SimpleNamespace(labels=labels), evaluation=range(3))
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    for kind in ("few", "tune"):
        learned, judging = list[int](), list[int]()
        for label in (0, 1, 2, 3, 4, 7):
            numbers = [number for number in order if labels[number] == label]
            size = min(100, len(numbers) if kind == "few" else max(len(numbers) // 2, 1))
            learned += numbers[:size]
            judging += numbers[size : 2 * size]
        (_, chosen), (_, tested) = few_labels(source, kind)  # type: ignore[arg-type]
        assert chosen == sorted(learned)
        assert 700 in chosen
        assert tested == (sorted(judging) if kind == "tune" else [0, 1, 2])


def test_tuning__gives_random_weights_a_rate_of_their_own(images: Path, tmp_path: Path) -> None:
    tuning = make_plan(images, tmp_path, "duel-tuning", seeds=(100,))
    runs = [tuning.jobs[f"tune-scratch+lr{lr}-100"].config for lr in ("0.001", "0.003")]
    assert [run.optim.lr for run in runs] == [1e-3, 3e-3]
    assert {(run.weights, run.optim.layer_decay, Path(run.data).name) for run in runs} == {
        ("random", 1.0, "images-tuning")
    }
    for run, accuracy in zip(runs, (40.0, 45.0), strict=True):
        (Path(run.out) / "export").mkdir(parents=True)
        (Path(run.out) / "export" / "config.json").write_text("{}")
        lines = ({"step": 1, "evaluation/top1": 90.0}, {"step": 2, "evaluation/top1": accuracy})  # the last one counts
        (Path(run.out) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = make_plan(images, tmp_path, "duel")
    assert plan.duel is not None
    assert plan.duel.chosen("scratch") == Setting(3e-3)
    assert plan.jobs["few-scratch+lr0.003-0"].config.optim.lr == 3e-3
    assert plan.jobs["few-pixel+lr0.001-0"].config.optim.lr == 1e-3
    (Path(runs[0].out) / "metrics.jsonl").write_text('{"step": 1, "evalu')
    with pytest.raises(RunFolderError, match=r"tune-scratch\+lr0\.001-100/metrics\.jsonl' is missing or damaged"):
        make_plan(images, tmp_path, "duel")


def test_duel__needs_labels(unlabelled_images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels"):
        make_plan(unlabelled_images, tmp_path, "duel")
    assert TABLES["duel"].pairs[-1] == ("supervised", "pixel")


def small_duel() -> DuelBudget:
    """The tiny budget with networks of a few thousand weights and two steps of every training."""
    tiny, two = duel_budget("tiny"), {"max_steps": "2"}
    vit = {**SMALL["pretrain"], **two}
    return dataclasses.replace(
        tiny,
        contrast=replace(tiny.contrast, {**SMALL["contrast"], **two}),
        supervised=replace(tiny.supervised, {"batch_size": 8, "image_size": 16, "precision": "fp32", **two}),
        codebook=replace(tiny.codebook, {**SMALL["codebook"], "perceptual.layers": (1, 2), **two}),
        pretrain=replace(tiny.pretrain, vit),
        pixels=replace(tiny.pixels, {**vit, "decoder.depth": 1, "decoder.width": 16, "decoder.num_heads": 2}),
        few=replace(tiny.few, {"batch_size": 8, "image_size": 16, "precision": "fp32", "max_steps": "1 epochs"}),
        views=2,
    )


def test_duel__runs_from_images_to_the_table(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pecobook.commands.reproduce.duel.duel_budget", lambda _: small_duel())
    monkeypatch.setattr("pecobook.commands.reproduce.rehearsal.rehearse", lambda *_: {"network-contrast": 1.0})
    in_this_process = SimpleNamespace(Popen=InThisProcess, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("pecobook.commands.jobs.subprocess", in_this_process)
    rows = tuple(row for row in TABLES["duel"].rows if row.arm in ("scratch", "pixel", "supervised"))
    monkeypatch.setitem(TABLES, "duel", dataclasses.replace(TABLES["duel"], rows=rows, controls=()))
    cli.main(["reproduce", "duel", "--data", str(images), "--out", str(tmp_path / "r"), "--seeds", "0"])
    text = (tmp_path / "r" / "tables.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3  # a header, a line, and every arm
    for line in lines[2:]:
        assert "–" not in line[1:4], line  # linear probe, few labels and k-NN of every arm
    assert "not tuned" in text
    assert "Power: the controls that know the labels" in text
    assert "not judged, one seed has no interval" in text
    probe = json.loads((tmp_path / "r" / "runs" / "probe-supervised+lr0.001-0.json").read_text())
    assert lines[4][1] == f"{probe['linear']['accuracy']:.1f}"
    bank = json.loads((tmp_path / "r" / "runs" / "vit-supervised+lr0.001-0" / "config.json").read_text())["tokens"]
    assert bank == str(tmp_path / "r" / "runs" / "bank-supervised-0")
    capsys.readouterr()
    cli.main(["reproduce", "duel", "--data", str(images), "--out", str(tmp_path / "r"), "--seeds", "0", "--dry-run"])
    assert capsys.readouterr().err.count("1 of them done") == 17  # nothing is left to do


@pytest.mark.parametrize(
    "content", ['{"linear": {"acc', '{"linear": {"accuracy": 3, "layers": {}}, "knn": {"accuracy": 4}}']
)
def test_validation_accuracy__names_a_damaged_probe(tmp_path: Path, content: str) -> None:
    file = tmp_path / "probe.json"
    file.write_text(content)
    with pytest.raises(RunFolderError, match=r"probe\.json.* Delete that file, and start again\."):
        validation_accuracy(file)
