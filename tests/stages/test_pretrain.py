from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.config import replace
from pecobook.data.views import colour_draws
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.stages.pretrain import KIND, MaskConfig, PretrainConfig, PretrainStage, make_mask
from tests.runs import SMALL, losses, train


def settings(codebook: Path, **more: Any) -> PretrainConfig:
    config: PretrainConfig = replace(recipe("pretrain", "tiny"), {**SMALL["pretrain"], "tokenizer": str(codebook)})
    return dataclasses.replace(config, **{"drop_path": 0.0, **more})


def make(codebook: Path, **more: Any) -> PretrainStage:
    torch.manual_seed(0)
    return PretrainStage(settings(codebook, **more))


def batch(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "colour": torch.stack([colour_draws(index) for index in range(count)]),
        "mask": torch.stack(
            [make_mask(index, (4, 4), MaskConfig(num_masked=6, min_block=2)) for index in range(count)]
        ),
    }


def test_forward__loss_is_the_cross_entropy_at_masked_positions_only(codebook_run: Path) -> None:
    stage, given = make(codebook_run).eval(), batch()
    with torch.no_grad():
        output = stage(given)
        images = given["image"].float() / 255
        codes = stage.tokenizer.encode(images)
        hidden = stage.model.hidden((images - stage.mean) / stage.std, given["mask"])  # (B, 16, D)
        scores = stage.model.head(hidden).log_softmax(-1)  # every position
    terms, right = [], 0
    for b in range(3):
        for row in range(4):
            for column in range(4):
                if given["mask"][b, row, column]:
                    position = scores[b, 4 * row + column]
                    terms.append(-position[codes[b, row, column]])
                    right += int(position.argmax() == codes[b, row, column])
    assert len(terms) == 18
    assert float(output.loss) == pytest.approx(float(sum(terms)) / 18, rel=1e-5)
    assert float(output.metrics["accuracy"]) == pytest.approx(100 * right / 18)


def test_forward__hides_what_is_under_the_mask(codebook_run: Path) -> None:
    stage, given = make(codebook_run).eval(), batch()
    hidden = given["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = torch.where(hidden, 255 - given["image"], given["image"])
    normal = [(images.float() / 255 - stage.mean) / stage.std for images in (given["image"], changed)]
    with torch.no_grad():
        same = [stage.model(images, given["mask"]) for images in normal]
        seen = [stage.model(images, ~given["mask"]) for images in normal]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(seen[0], seen[1])


def test_forward__the_tokenizer_stays_frozen(codebook_run: Path) -> None:
    stage = make(codebook_run).train()
    assert not stage.tokenizer.training
    before = {name: value.clone() for name, value in stage.tokenizer.state_dict().items()}
    stage(batch()).loss.backward()
    stage.after_step(1, 2)
    assert all(torch.equal(before[name], value) for name, value in stage.tokenizer.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.tokenizer.parameters())
    grouped = {id(p) for group in stage.parameter_groups(stage.config.optim) for p in group["params"]}
    assert grouped == {id(parameter) for parameter in stage.model.parameters()}
    assert all(parameter.grad is not None for parameter in stage.model.parameters())


def test_forward__both_see_the_same_colours(codebook_run: Path) -> None:
    stage, seen = make(codebook_run).train(), []
    stage.tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] + 1) / 2))
    stage.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stage(batch())
    torch.testing.assert_close((seen[0] - stage.mean) / stage.std, seen[1])
    assert not torch.equal(seen[0], batch()["image"].float() / 255)


def test_forward__pictures_show_the_mask(codebook_run: Path) -> None:
    stage, given = make(codebook_run).eval(), batch()
    with torch.no_grad():
        pictures = stage(given).pictures
    assert {name: tuple(value.shape) for name, value in pictures.items()} == dict.fromkeys(
        ("images", "masked", "predicted"), (3, 3, 16, 16)
    )
    grey = (pictures["masked"] == 0.5).all(1)
    assert torch.equal(grey, given["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("kind", ["block", "random"])
def test_make_mask__is_a_function_of_the_view(kind: str) -> None:
    config = MaskConfig(kind=kind, num_masked=6, min_block=2)  # type: ignore[arg-type]
    masks = [make_mask(index, (4, 4), config) for index in range(20)]
    assert all(int(mask.sum()) == 6 for mask in masks)
    assert len({mask.numpy().tobytes() for mask in masks}) > 10
    torch.manual_seed(1)
    assert torch.equal(make_mask(7, (4, 4), config), masks[7])


def test_view__evaluation_is_the_same_whenever_it_is_asked(codebook_run: Path) -> None:
    config = settings(codebook_run)
    image = torch.arange(3 * 20 * 24, dtype=torch.int64).remainder(256).to(torch.uint8).view(3, 20, 24)
    for view in (KIND.view(config), KIND.evaluation_view(config)):
        one, two = view(image, 5), view(image, 5)
        assert one.keys() == two.keys() == {"image", "colour", "mask"}
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(KIND.evaluation_view(config)(image, 1)["image"], KIND.evaluation_view(config)(image, 2)["image"])


def test_check__grid_and_tokens_must_agree(codebook_run: Path) -> None:
    KIND.check(settings(codebook_run))
    with pytest.raises(ConfigError, match="one code for 4 x 4"):
        KIND.check(settings(codebook_run, image_size=32, model=recipe("pretrain", "tiny").model))
    with pytest.raises(ConfigError, match=r"--mask\.num-masked 16 must be below 16"):
        KIND.check(settings(codebook_run, mask=MaskConfig(num_masked=16)))
    with pytest.raises(ConfigError, match="--tokenizer is missing"):
        KIND.check(dataclasses.replace(settings(codebook_run), tokenizer=""))


def test_train__on_the_tokens_of_dalle(images: Path, tmp_path: Path) -> None:
    """BEiT's own arrangement; its probe reads the decoder's embeddings of tokens."""
    from pecobook.models.dalle import DalleTokenizer
    from pecobook.probing import probe

    torch.manual_seed(0)
    theirs = DalleTokenizer(width=8, num_codewords=24, embedding=6)
    (tmp_path / "dalle").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(theirs, part).state_dict(), tmp_path / "dalle" / f"{part}.pt")
    spec = f"dalle:{tmp_path / 'dalle'}"
    more = {"image_size": 32, "model.args": '{"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}'}
    run = train("pretrain", images, tmp_path / "vit", tokenizer=spec, max_steps="2", **more)
    assert len(losses(run)) == 2
    found = probe(data=str(images), backbone=spec, image_size=32)
    assert found["linear"]["features"] in ("mean codeword", "bag of codes")
