"""`--init`: a training that starts from a run begins with that run's weights, and says what it took and left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pecobook.engine.stage import Stage
from pecobook.errors import PecobookError
from pecobook.models.weights import load_backbone
from pecobook.recipes import recipe
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.codebook import CodebookStage
from pecobook.stages.detect import DetectStage
from pecobook.stages.moco import MocoStage
from pecobook.stages.pretrain import PretrainStage
from pecobook.stages.segment import SegmentStage
from pecobook.stages.training import preflight
from tests.runs import SMALL, inputs, logged, shapes, train

STAGES: dict[str, type[Stage[Any]]] = {
    stage.command: stage
    for stage in (MocoStage, CodebookStage, PretrainStage, ClassifyStage, SegmentStage, DetectStage)
}
VIT = '{"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}'


def begin(command: str, data: Path, **more: Any) -> Stage[Any]:
    """Return the stage with which a training starts, from the `tiny` recipe and small settings without a network."""
    small = {name: value for name, value in SMALL[command].items() if not name.startswith(("model.", "quantizer."))}
    settings = {**small, "data": str(data), "out": "unused", "dry_run": True, **more}
    torch.manual_seed(1)
    return preflight(STAGES[command], replace(recipe(command, "tiny"), settings)).stage


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    file = max((run / "checkpoints").glob("step-*")) / "state.pt"
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return state


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("contrast", {}),
        ("contrast", {"model.name": "vit_tiny_patch16_224", "model.args": VIT}),
        ("codebook", {"adversarial": {"weight": 0.1, "num_layers": 1, "width": 8}}),
        ("pretrain", {}),
        (
            "pretrain",
            {
                "model.name": "beit_base_patch16_224",
                "model.args": '{"patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2, "init_values": 0.1, '
                '"use_rel_pos_bias": false, "use_shared_rel_pos_bias": true}',
            },
        ),
        ("pretrain", {"visible_only": True, "decoder": {"depth": 1, "width": 16, "num_heads": 2}, "target": "pixels"}),
    ],
    ids=["contrast", "contrast-vit", "codebook", "pretrain", "pretrain-beit", "pretrain-visible"],
)
def test_init__of_a_run_of_the_command_takes_every_weight(
    command: str, more: dict[str, Any], images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    """All tensors are those of the run's last checkpoint, so the first loss is its loss too."""
    run = train(command, images, tmp_path / "run", **needs, **more)
    other = {
        name: value for name, value in more.items() if name.split(".")[0] not in ("model", "visible_only", "decoder")
    }
    stage = begin(command, images, init=str(run), **needs, **other)
    expected = checkpoint(run)
    fresh = {"tokenizer.quantizer.num_updates", "tokenizer.quantizer.num_revived"}  # of the new run
    state = stage.state_dict()
    assert state.keys() == expected.keys()
    different = [name for name in expected if name not in fresh and not torch.equal(state[name], expected[name])]
    assert different == []
    assert "left" not in stage.notes[-2 if command != "codebook" else -1]


def test_init__is_in_config_card_and_log(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "next", init=str(codebook_run), max_steps="1")
    assert json.loads((run / "config.json").read_text())["init"] == str(codebook_run)
    line = f"taken from '{codebook_run.name}' (--init): encoder, decoder, 24 codewords, their averages"
    assert json.loads((run / "export" / "config.json").read_text())["init"] == line
    assert line in (run / "export" / "README.md").read_text()
    assert line in (run / "train.log").read_text()
    again = train("codebook", images, run, init=str(codebook_run), max_steps="1", resume=True)
    assert again == run
    with pytest.raises(PecobookError, match=r"init: .* -> "):
        train("codebook", images, run, max_steps="1", resume=True)


def test_init__the_first_loss_of_a_codebook_is_that_of_the_run(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    """The control begins far higher: it has a random encoder."""
    run = train("codebook", images, tmp_path / "next", init=str(codebook_run), max_steps="1")
    control = train("codebook", images, tmp_path / "control", max_steps="1", **{"quantizer.start_after": 0})
    last = [line["loss"] for line in logged(codebook_run)][-1]
    first, random = (logged(path)[0]["loss"] for path in (run, control))
    assert first == pytest.approx(last, rel=0.2)
    assert random > 1.5 * first


def test_init__another_number_of_codewords_leaves_the_codebook(images: Path, codebook_run: Path) -> None:
    stage = begin("codebook", images, init=str(codebook_run), **{"quantizer.num_codewords": 12})
    expected, state = checkpoint(codebook_run), stage.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state if ".encoder." in name or ".decoder." in name)
    assert stage.notes[-1].endswith("left: codewords (24 x 8 there, 12 x 8 here: k-means starts them anew)")
    assert not stage.tokenizer.quantizer._initialised  # type: ignore[union-attr]


def test_init__codewords_without_averages_begin_as_if_used_equally(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.safetensors"
    save_file(load_file(codebook_run / "export" / "model.safetensors"), file)
    shape = {"model.channels": (8, 16, 16), "model.latent_dim": 8, "quantizer.num_codewords": 24}
    stage: Any = begin("codebook", images, init=str(file), **shape)
    quantizer = stage.tokenizer.quantizer
    torch.testing.assert_close(quantizer.ema_sum / quantizer.ema_count[:, None], quantizer.codebook)
    assert float(quantizer.ema_count.sum()) == pytest.approx(8 * 16)  # images of a step times tokens
    assert "averages of the codewords (not in it: all begin as if used equally)" in stage.notes[-1]


@pytest.mark.parametrize("command", ["contrast", "pretrain"])
def test_init__of_a_timm_network_gives_its_features_at_another_size(
    command: str, images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the normalisation of the weights, mean 0.5 for these, which the export states."""
    torch.manual_seed(3)
    network = timm.create_model("test_vit", num_classes=0)  # 160 pixels
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        made = original(name, pretrained=False, **kwargs)
        if pretrained:
            from timm.models.vision_transformer import checkpoint_filter_fn

            made.load_state_dict(checkpoint_filter_fn(network.state_dict(), made))
        return made

    monkeypatch.setattr(timm, "create_model", create)
    small: dict[str, Any] = {
        "image_size": 96,
        "batch_size": 4,
        "max_steps": "1",
        "optim.lr": 1e-30,
        "init": "timm:test_vit",
    }
    small |= {"target": "pixels"} if command == "pretrain" else {}
    settings = {name: value for name, value in SMALL[command].items() if not name.startswith("model.")} | small
    monkeypatch.setitem(SMALL, command, settings)
    run = train(command, images, tmp_path / "run")
    exported, expected = load_backbone(str(run)), load_backbone("timm:test_vit", image_size=96)
    assert (exported.mean, exported.std) == (expected.mean, expected.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    x = torch.rand(2, 3, 96, 96)
    ours, theirs = (loaded.network.eval().forward_features(x) for loaded in (exported, expected))  # type: ignore[operator]
    if command == "pretrain":  # exported for pooling by the mean: the norm comes after it
        ours = exported.network.fc_norm(ours) if hasattr(exported.network, "fc_norm") else ours  # type: ignore[operator]
    torch.testing.assert_close(ours, theirs)


def test_init__a_head_for_other_codes_is_left(images: Path, vit_run: Path, tmp_path: Path) -> None:
    other = train("codebook", images, tmp_path / "other", seed=5, max_steps="4")
    stage = begin("pretrain", images, init=str(vit_run), tokenizer=str(other))
    assert stage.notes[0].endswith("backbone, mask_token; left: head (it predicts the codes of another tokenizer)")
    mask_token = checkpoint(vit_run)["model.mask_token"]
    assert torch.equal(stage.state_dict()["model.mask_token"], mask_token)


def test_init__contrast_from_pretrain_and_back(images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path) -> None:
    """Every backbone starts the other kind; at another size its positions are resampled, which the first line says."""
    stage: Any = begin("contrast", images, init=str(vit_run), image_size=32)
    assert stage.notes[0] == (
        f"taken from '{vit_run.name}' (--init): backbone, its positions resampled from 16 to 32 pixels; "
        "left: projector and predictor (not in it)"
    )
    assert stage.backbone.pos_embed.shape[1] > 64
    assert stage.backbone.pos_embed.requires_grad  # learned positions go on learning
    expected = load_backbone(str(vit_run), image_size=32).network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in stage.backbone.state_dict().items())
    contrast = train("contrast", images, tmp_path / "moco", **{"model.name": "vit_tiny_patch16_224", "model.args": VIT})
    back: Any = begin("pretrain", images, init=str(contrast), image_size=32, target="pixels")
    state = load_file(contrast / "export" / "model.safetensors")
    assert torch.equal(back.model.backbone.state_dict()["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])


def test_init__of_a_file(images: Path, codebook_run: Path, vit_run: Path) -> None:
    """A file of weights does not name its network; an unfinished run's checkpoint is such a file."""
    name = {"model.name": "vit_tiny_patch16_224", "model.args": SMALL["pretrain"]["model.args"]}
    file = max((vit_run / "checkpoints").glob("step-*")) / "state.pt"
    stage = begin("pretrain", images, init=str(file), tokenizer=str(codebook_run), image_size=16, **name)
    expected, state = checkpoint(vit_run), stage.state_dict()
    backbone = [key for key in state if key.startswith("model.backbone.")]
    assert all(torch.equal(state[key], expected[key]) for key in backbone)


@pytest.mark.parametrize(
    ("command", "init", "more", "said"),
    [
        ("codebook", "timm:resnet10t", {}, "a codebook starts from another codebook run"),
        ("codebook", "VIT", {}, "is a backbone, not a tokenizer: give a codebook run"),
        ("codebook", "CODEBOOK", {"model.latent_dim": 4}, r"encoder\..* of another shape|leave --model settings out"),
        ("pretrain", "CODEBOOK", {}, "is a tokenizer, not a backbone"),
        ("pretrain", "VIT", {"model.args": '{"depth": 3}'}, r"do not fit this network: [\s\S]*leave --model.name and"),
        ("pretrain", "nowhere", {}, "'nowhere' is neither a run folder nor a network"),
        ("contrast", "runs/nowhere", {}, "There is no run 'runs/nowhere'"),
    ],
)
def test_init__refuses_what_does_not_fit(
    command: str, init: str, more: dict[str, Any], said: str, images: Path, codebook_run: Path, vit_run: Path
) -> None:
    init = {"VIT": str(vit_run), "CODEBOOK": str(codebook_run)}.get(init, init)
    needs = inputs(command, codebook_run, vit_run)
    with pytest.raises(PecobookError, match=said):
        begin(command, images, init=init, **needs, **more)


@pytest.mark.parametrize("command", ["finetune", "segment", "detect"])
def test_init__of_a_run_with_labels_takes_the_head_too(
    command: str, images: Path, needs: dict[str, str], vit_run: Path, tmp_path: Path
) -> None:
    run = train(command, images, tmp_path / "run", **needs, max_steps="2")
    needs.pop("backbone")
    stage = begin(command, needs.pop("data", images), init=str(run), **needs)  # type: ignore[arg-type]
    expected, state = checkpoint(run), stage.state_dict()
    auxiliary = "model.auxiliary." if command == "segment" else "-"  # which no export holds
    different = [n for n in expected if not torch.equal(state[n], expected[n]) and not n.startswith(auxiliary)]
    assert state.keys() == expected.keys()
    assert different == []
    assert ("left" in stage.notes[0]) == (command == "segment")
    with pytest.raises(PecobookError, match="leave --backbone and --weights out"):
        begin(command, images, init=str(run), backbone=str(vit_run))
    with pytest.raises(PecobookError, match=f"is a backbone: '{command}' starts from another {command} run"):
        begin(command, images, init=str(vit_run), **({"data": needs["data"]} if "data" in needs else {}))


def test_init__a_head_for_other_classes_is_left(images: Path, vit_run: Path, tmp_path: Path) -> None:
    run = train("finetune", images, tmp_path / "run", backbone=str(vit_run), max_steps="1")
    stage = begin("finetune", "photos", init=str(run), image_size=16)  # type: ignore[arg-type]
    assert "backbone; left: head (3 classes there" in stage.notes[0]


def test_init__tables_of_relative_positions_of_a_segmenter_are_resampled(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    beit = {
        "model.name": "beit_base_patch16_224",
        "model.args": '{"patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2, "init_values": 0.1}',
    }
    vit = train("pretrain", images, tmp_path / "beit", tokenizer=str(codebook_run), max_steps="1", **beit)
    data = shapes()
    run = train("segment", data, tmp_path / "run", backbone=str(vit), max_steps="1")
    stage: Any = begin("segment", data, init=str(run), image_size=32)
    table = stage.model.pyramid.network.blocks[0].attn
    expected = checkpoint(run)["model.pyramid.network.blocks.0.attn.relative_position_bias_table"]
    assert len(table.relative_position_bias_table) == 15**2 + 3  # 8 x 8 patches
    assert len(expected) == 11**2 + 3
    torch.testing.assert_close(table.relative_position_bias_table[-3:], expected[-3:])  # of the class token
