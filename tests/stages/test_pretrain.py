from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.data.masking import make_mask
from pecobook.data.views import colour_draws
from pecobook.errors import ConfigError, WeightsError
from pecobook.models.masked_vit import MaskedImageModel, patch_pixels
from pecobook.models.weights import create_network, load_backbone
from pecobook.recipes import recipe
from pecobook.settings.pretrain import MaskConfig, PretrainConfig
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import replace
from pecobook.stages.pretrain import PretrainStage, exported_pooling
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
    stage, inputs = make(codebook_run).eval(), batch()
    with torch.no_grad():
        output = stage(inputs)
        images = inputs["image"].float() / 255
        codes = stage.tokenizer.encode(images)
        assert isinstance(stage.model, MaskedImageModel)
        hidden = stage.model.hidden((images - stage.mean) / stage.std, inputs["mask"])  # (B, 16, D)
        scores = stage.model.head(hidden).log_softmax(-1)  # at every position
    terms, num_correct = [], 0
    for b in range(3):
        for row in range(4):
            for column in range(4):
                if inputs["mask"][b, row, column]:
                    position = scores[b, 4 * row + column]
                    terms.append(-position[codes[b, row, column]])
                    num_correct += int(position.argmax() == codes[b, row, column])
    assert len(terms) == 18
    assert float(output.loss) == pytest.approx(float(sum(terms)) / 18, rel=1e-5)
    assert float(output.metrics["accuracy"]) == pytest.approx(100 * num_correct / 18)


def test_forward__masked_pixels_do_not_change_the_logits(codebook_run: Path) -> None:
    stage, inputs = make(codebook_run).eval(), batch()
    hidden = inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = torch.where(hidden, 255 - inputs["image"], inputs["image"])
    normalised = [(images.float() / 255 - stage.mean) / stage.std for images in (inputs["image"], changed)]
    with torch.no_grad():
        masked = [stage.model(images, inputs["mask"]) for images in normalised]
        visible = [stage.model(images, ~inputs["mask"]) for images in normalised]
    assert torch.equal(masked[0], masked[1])
    assert not torch.equal(visible[0], visible[1])


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


def test_forward__tokenizer_and_vit_see_the_same_colours(codebook_run: Path) -> None:
    stage = make(codebook_run).train()
    seen: dict[str, Tensor] = {}
    stage.tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: seen.update(codes=(inputs[0] + 1) / 2))
    stage.model.register_forward_pre_hook(lambda _, inputs: seen.update(vit=inputs[0]))
    stage(batch())
    torch.testing.assert_close((seen["codes"] - stage.mean) / stage.std, seen["vit"])
    assert not torch.equal(seen["codes"], batch()["image"].float() / 255)


def test_forward__pictures_show_the_mask(codebook_run: Path) -> None:
    stage, inputs = make(codebook_run).eval(), batch()
    with torch.no_grad():
        pictures = stage(inputs).pictures
    assert {name: tuple(value.shape) for name, value in pictures.items()} == dict.fromkeys(
        ("images", "masked", "predicted"), (3, 3, 16, 16)
    )
    grey = (pictures["masked"] == 0.5).all(1)
    assert torch.equal(grey, inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("kind", ["block", "random"])
def test_make_mask__depends_on_the_view_alone(kind: str) -> None:
    config = MaskConfig(kind=kind, num_masked=6, min_block=2)  # type: ignore[arg-type]
    masks = [make_mask(index, (4, 4), config) for index in range(20)]
    assert all(int(mask.sum()) == 6 for mask in masks)
    assert len({mask.numpy().tobytes() for mask in masks}) > 10
    torch.manual_seed(1)
    assert torch.equal(make_mask(7, (4, 4), config), masks[7])


def test_view__is_repeatable_and_evaluation_does_not_depend_on_the_key(codebook_run: Path) -> None:
    config = settings(codebook_run)
    image = torch.arange(3 * 20 * 24, dtype=torch.int64).remainder(256).to(torch.uint8).view(3, 20, 24)
    for view in (PretrainStage.view(config), PretrainStage.evaluation_view(config)):
        first, second = view(image, 5), view(image, 5)
        assert first.keys() == second.keys() == {"image", "colour"}
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(
        PretrainStage.evaluation_view(config)(image, 1)["image"],
        PretrainStage.evaluation_view(config)(image, 2)["image"],
    )


def test_check__grid_and_tokens_must_agree(codebook_run: Path) -> None:
    PretrainStage.check(settings(codebook_run))
    with pytest.raises(ConfigError, match="one code for 4 x 4"):
        PretrainStage.check(settings(codebook_run, image_size=32, model=recipe("pretrain", "tiny").model))
    with pytest.raises(ConfigError, match=r"--mask\.num-masked 16 must be below 16"):
        PretrainStage.check(settings(codebook_run, mask=MaskConfig(num_masked=16)))
    with pytest.raises(ConfigError, match="--tokenizer is missing"):
        PretrainStage.check(dataclasses.replace(settings(codebook_run), tokenizer=""))


def test_train__on_the_tokens_of_dalle(images: Path, tmp_path: Path) -> None:
    """BEiT was trained so; a probe of the tokenizer reads the decoder's embeddings of the tokens."""
    from pecobook.commands.probe import probe
    from pecobook.models.dalle import DalleTokenizer

    torch.manual_seed(0)
    dalle = DalleTokenizer(width=8, num_codewords=24, embedding_dim=6)
    (tmp_path / "dalle").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(dalle, part).state_dict(), tmp_path / "dalle" / f"{part}.pt")
    spec = f"dalle:{tmp_path / 'dalle'}"
    more = {"image_size": 32, "model.args": '{"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}'}
    run = train("pretrain", images, tmp_path / "vit", tokenizer=spec, max_steps="2", **more)
    assert len(losses(run)) == 2
    results = probe(data=str(images), backbone=spec, image_size=32)
    assert results["linear"]["features"] in ("mean codeword", "bag of codes")


# ---------------------------------------------------------------------------------------------------- other targets


def test_pixels__are_normalised_patch_by_patch() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    patches = patch_pixels(images, 4)
    assert patches.shape == (2, 6, 48)
    for number in range(6):
        row, column = divmod(number, 3)
        patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        expected = (patch - patch.mean(1, keepdim=True)) / (patch.var(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(patches[:, number], expected, rtol=1e-4, atol=1e-5)


def test_pixels__loss_is_the_squared_error_at_masked_patches(codebook_run: Path) -> None:
    stage, inputs = make(codebook_run, target="pixels", tokenizer="").eval(), batch()
    assert stage.tokenizer is None
    images = inputs["image"].float() / 255
    with torch.no_grad():
        output = stage(inputs)
        predicted = stage.model((images - stage.mean) / stage.std, inputs["mask"])  # (18, 48)
    targets = patch_pixels(images, 4)[inputs["mask"].flatten(1)]
    torch.testing.assert_close(output.loss, (predicted - targets).square().mean())
    PretrainStage.check(settings(codebook_run, target="pixels", tokenizer=""))


@pytest.mark.parametrize(
    "more",
    [
        {"target": "pixels"},
        {"visible_only": True, "decoder.depth": 1, "decoder.width": 16, "decoder.num_heads": 2},
        {"mask.kind": "random"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_train__every_variant_exports_a_plain_backbone(
    more: dict[str, Any], images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    tokenizer = {} if "target" in more else {"tokenizer": str(codebook_run)}
    run = train("pretrain", images, tmp_path / "run", **tokenizer, **more)
    assert len(losses(run)) == 8
    backbone = load_backbone(str(run))
    assert backbone.network(torch.rand(1, 3, 16, 16)).shape == (1, 32)


# --------------------------------------------------------------------------------------------------- BEiT's positions

_BEIT = {
    "model.name": "beit_base_patch16_224",
    "model.args": '{"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "init_values": 0.1, '
    '"use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
}


def test_export__copies_beits_shared_table_into_every_block(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    run = train("pretrain", images, tmp_path / "run", tokenizer=str(codebook_run), **_BEIT)
    state = torch.load(run / "checkpoints" / "step-00000008" / "state.pt", weights_only=True)["model"]
    table = state["model.backbone.rel_pos_bias.relative_position_bias_table"]
    assert table.abs().max() > 0  # the table starts at zero and is trained
    backbone = load_backbone(str(run))
    for block in backbone.network.blocks:  # type: ignore[union-attr]
        assert torch.equal(block.attn.relative_position_bias_table, table)
    assert not {"use_rel_pos_bias", "use_shared_rel_pos_bias"} & backbone.args.keys()
    stage = PretrainStage(
        settings(codebook_run, model=BackboneConfig(name=_BEIT["model.name"], args=_BEIT["model.args"]))
    )
    stage.load_state_dict(state, strict=False)
    shared = stage.eval().model.backbone
    picture = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(backbone.network.eval()(picture), shared(picture))


@pytest.mark.parametrize("use_rel_pos_bias", ["false", "true"])
def test_export__adds_beits_shared_table_to_the_blocks_tables(
    codebook_run: Path, tmp_path: Path, use_rel_pos_bias: str
) -> None:
    args = _BEIT["model.args"].replace('"use_rel_pos_bias": false', f'"use_rel_pos_bias": {use_rel_pos_bias}')
    stage = make(codebook_run, model=BackboneConfig(name=_BEIT["model.name"], args=args)).eval()
    backbone = stage.model.backbone
    for name, parameter in backbone.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    stage.export(tmp_path, stage.state_dict())
    picture = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load_backbone(str(tmp_path)).network.eval()(picture), backbone(picture))


@pytest.mark.parametrize(
    ("image_size", "patch", "tokenizer_size"),
    [(32, 8, 0), (48, 6, 0), (32, 8, 24), (32, 8, 18)],
)
def test_check__every_suggested_change_makes_the_grids_equal(
    codebook_run: Path, image_size: int, patch: int, tokenizer_size: int
) -> None:
    def config(image_size: int, patch: int, tokenizer_size: int) -> PretrainConfig:
        args = f'{{"patch_size": {patch}, "depth": 1, "embed_dim": 16, "num_heads": 2}}'
        model = BackboneConfig(name="vit_tiny_patch16_224", args=args)
        return settings(codebook_run, image_size=image_size, model=model, tokenizer_size=tokenizer_size)

    with pytest.raises(ConfigError) as caught:
        PretrainStage.check(config(image_size, patch, tokenizer_size))
    suggestions = dict(
        re.findall(r"(--tokenizer-size|--image-size|patches of) (\d+)", str(caught.value).splitlines()[1])
    )
    assert "--tokenizer-size" in suggestions
    for name, value in suggestions.items():
        PretrainStage.check(
            config(
                int(value) if name == "--image-size" else image_size,
                int(value) if name == "patches of" else patch,
                int(value) if name == "--tokenizer-size" else tokenizer_size,
            )
        )


@pytest.mark.parametrize("tokenizer_size", [0, 12])
def test_check__refuses_an_edge_that_the_vit_leaves_out(codebook_run: Path, tokenizer_size: int) -> None:
    """Three patches of 8 pixels and three codes of 4 would not mean the same parts of 30 pixels."""
    args = '{"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}'
    model = BackboneConfig(name="vit_tiny_patch16_224", args=args)
    config = settings(codebook_run, image_size=30, model=model, tokenizer_size=tokenizer_size)
    with pytest.raises(ConfigError, match=r"30 is no multiple of 8, the side of a patch.* give 24 or 32"):
        PretrainStage.check(config)


def test_check__reports_both_grids_and_settings_that_fit(codebook_run: Path) -> None:
    """The tokenizer has 4 pixels a code, the ViT 8 a patch; the ratio is that of DALL-E's 8 and a ViT-B/16."""
    model = BackboneConfig(
        name="vit_tiny_patch16_224", args='{"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}'
    )
    config = settings(codebook_run, image_size=32, model=model)
    with pytest.raises(ConfigError, match=r"4 x 4 patches of 8 pixels out of 32.*8 x 8 out of 32") as caught:
        PretrainStage.check(config)
    assert "Give --tokenizer-size 16 or a ViT with patches of 4." in str(caught.value)
    PretrainStage.check(dataclasses.replace(config, tokenizer_size=16))
    stage = PretrainStage(dataclasses.replace(config, tokenizer_size=16)).eval()
    inputs = {**batch(2), "image": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)}
    with torch.no_grad():
        assert stage(inputs).pictures["predicted"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "pooling", "renames_norm"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, True),
        ("vit_base_patch16_clip_224", {"global_pool": "avg"}, True),  # has a norm_pre too, which keeps its name
        ("beit_base_patch16_224", {"global_pool": "avg"}, False),  # pools the mean by default
    ],
)
def test_export__pools_the_mean_of_the_patches(name: str, pooling: dict[str, str], renames_norm: bool) -> None:
    with torch.device("meta"):
        network = create_network(name, num_classes=0)
    config = PretrainConfig(model=BackboneConfig(name=name), target="pixels")
    assert exported_pooling(network, config) == (pooling, renames_norm)


def test_export__refuses_a_network_that_pools_class_tokens_only() -> None:
    name = "deit_tiny_distilled_patch16_224"
    with torch.device("meta"):
        network = create_network(name, num_classes=0)
    with pytest.raises(WeightsError, match="cannot build 'deit_tiny_distilled_patch16_224'"):
        exported_pooling(network, PretrainConfig(model=BackboneConfig(name=name), target="pixels"))


def test_forward__of_many_codewords_in_tiles_is_that_of_few(
    codebook_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, inputs = make(codebook_run).eval(), batch()
    whole = stage(inputs)
    monkeypatch.setattr("pecobook.stages.pretrain._MANY_CODEWORDS", 1)
    monkeypatch.setattr("pecobook.stages.pretrain._MANY_LOGITS", 100)  # four positions of 24 codewords
    tiled = stage(inputs)
    torch.testing.assert_close(tiled.loss, whole.loss)
    assert torch.equal(tiled.metrics["accuracy"], whole.metrics["accuracy"])
    assert torch.equal(tiled.pictures["predicted"], whole.pictures["predicted"])
