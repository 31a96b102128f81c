"""A run with a constant schedule goes on after its end as if it had been given its new length at first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook.engine import checkpoint
from pecobook.errors import PecobookError
from tests.runs import export_bytes, logged, losses, train

CONSTANT: dict[str, Any] = {"optim.schedule": "constant", "optim.warmup": "2", "keep_checkpoints": 1}


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    file = run / "checkpoints" / f"step-{step:08d}" / "state.pt"
    content: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return content


def assert_equal(a: Path, b: Path, step: int) -> None:
    first, second = state(a, step), state(b, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("command", ["contrast", "codebook", "pretrain", "finetune"])
def test_resume__with_more_steps_equals_a_run_of_that_length(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    """The momentum of contrast and the start of the codebook do not depend on the length either."""
    more = {**CONSTANT, **needs}
    straight = train(command, images, tmp_path / "straight", **more, max_steps="8", **{"optim.cooldown": "25%"})
    train(command, images, tmp_path / "parts", **more, max_steps="4")
    parts = train(command, images, tmp_path / "parts", **more, max_steps="8", resume=True, **{"optim.cooldown": "25%"})
    assert_equal(parts, straight, 8)
    assert losses(parts) == losses(straight)
    # The settings, the checksums of settings and cards name other folders; the weights are equal bytes.
    assert export_bytes(parts)["model.safetensors"] == export_bytes(straight)["model.safetensors"]
    assert json.loads((parts / "config.json").read_text())["max_steps"] == "8"
    assert (parts / "config.diff").read_text() == (straight / "config.diff").read_text().replace("straight", "parts")


def test_resume__goes_on_from_before_a_cooldown(images: Path, tmp_path: Path) -> None:
    """The checkpoint at the start of the cooldown is kept, though newer ones are; what cooled is trained again."""
    more = {**CONSTANT, "optim.cooldown": "2", "save_every": 1}
    straight = train("codebook", images, tmp_path / "straight", **more, max_steps="8")
    run = train("codebook", images, tmp_path / "run", **more, max_steps="5")
    assert checkpoint.steps(run / "checkpoints") == [3, 5]
    rates = [line["lr"] / 5e-4 for line in logged(run)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.5])
    train("codebook", images, run, **more, max_steps="8", resume=True)
    assert_equal(run, straight, 8)
    assert [line["step"] for line in logged(run)] == list(range(1, 9))
    assert losses(run) == losses(straight)
    notes = json.loads((run / "environment.json").read_text())["data_notes"]
    assert "goes on from its checkpoint of step 3 and trains the steps to 5 again" in notes[-1]
    train("codebook", images, run, **more, max_steps="8", resume=True)  # finished: nothing is left to do


def test_resume__cools_down_early(images: Path, tmp_path: Path) -> None:
    """A run may be given an end that lies ahead of its last step."""
    straight = train("codebook", images, tmp_path / "straight", **CONSTANT, max_steps="5", **{"optim.cooldown": "2"})
    run = train(
        "codebook", images, tmp_path / "run", **{**CONSTANT, "keep_checkpoints": 9}, max_steps="7", save_every=3
    )
    checkpoint.delete_after(run / "checkpoints", 3)  # as if it had been stopped there
    train("codebook", images, run, **CONSTANT, max_steps="5", resume=True, **{"optim.cooldown": "2"})
    assert_equal(run, straight, 5)


def test_resume__refuses_a_length_that_no_checkpoint_leads_to(images: Path, tmp_path: Path) -> None:
    more = {**CONSTANT, "optim.cooldown": "2"}
    run = train("codebook", images, tmp_path / "run", **more, max_steps="6")
    before = export_bytes(run)
    with pytest.raises(PecobookError, match=r"up to 2, .* first checkpoint is of step 4\.\nGive a longer --max-steps"):
        train("codebook", images, run, **more, max_steps="4", resume=True)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    with pytest.raises(PecobookError, match=r"up to 4, .* is of step 6\.[\s\S]*--init .*run and another --out"):
        train("codebook", images, run, **more, max_steps="9", resume=True)
    assert export_bytes(run) == before
    assert json.loads((run / "config.json").read_text())["max_steps"] == "6"


def test_resume__of_a_cosine_names_the_way_to_train_on(images: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "run", max_steps="2")
    with pytest.raises(PecobookError, match=r"max-steps: 2 -> 4\.[\s\S]*cosine schedule ends .* --init .*run and"):
        train("codebook", images, run, max_steps="4", resume=True)
    with pytest.raises(PecobookError, match=r"optim.lr: [\s\S]*Give the settings of that run, or .* --out\.$"):
        train("codebook", images, run, max_steps="4", resume=True, **{"optim.lr": 0.1})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim.schedule": "constant", "optim.warmup": "5%"}, "--optim.warmup is 5% of a length that may change"),
        ({"optim.cooldown": "10%"}, "--optim.cooldown belongs to --optim.schedule constant, not to cosine"),
        ({**CONSTANT, "optim.cooldown": "late"}, "--optim.cooldown is 'late': give steps"),
    ],
)
def test_settings__refuse_lengths_without_meaning(
    settings: dict[str, Any], said: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(PecobookError, match=said):
        train("codebook", images, tmp_path / "run", **settings)
