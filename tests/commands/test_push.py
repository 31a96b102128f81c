"""`pecobook push` and `from_pretrained` against a small hub on this machine, in a process that asks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pecobook.commands.push import push
from pecobook.errors import ConfigError, WeightsError
from pecobook.models.hub import HubError, publish
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.utils.files import without_folders
from tests.commands.hub_server import Hub, hub_server
from tests.models.test_export import build_kind

# Runs commands, each with a token, and loads exports; prints what they said and what was loaded as JSON.
_PROCESS = """
import contextlib, io, json, os, sys
import huggingface_hub
import pecobook
from pecobook import cli
wanted, said, loaded = json.load(sys.stdin), [], []
for token, argv in wanted["commands"]:
    os.environ["HF_TOKEN"] = token
    text, code = io.StringIO(), 0
    with contextlib.redirect_stderr(text):
        try:
            cli.main(argv)
        except SystemExit as error:
            code = error.code
    said.append([code, text.getvalue()])
for name, local, source, revision in wanted["loads"]:
    if name == "close":
        huggingface_hub.utils.get_session().get(os.environ["HF_ENDPOINT"] + "/close")
        continue
    kind = getattr(pecobook, name)
    try:
        there, here = kind.from_pretrained(source, revision=revision), kind.from_pretrained(local)
    except pecobook.PecobookError as error:
        loaded.append(str(error))
    else:
        own, other = here.state_dict(), there.state_dict()
        loaded.append(list(own) == list(other) and all(other[key].equal(own[key]) for key in own))
json.dump([said, loaded], sys.stdout)
"""


@pytest.fixture(scope="module")
def runs(codebook_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every kind by the name of its class; all but that of a codebook are made by hand."""
    found = {"PerceptualTokenizer": codebook_run}
    for kind in ("backbone", "classifier", "segmenter", "detector"):
        network, run = build_kind(kind), tmp_path_factory.mktemp("runs") / kind
        network.save_pretrained(run / "export", origin="a test")
        (run / "config.json").write_text(json.dumps({"command": kind, "data": str(run), "evaluation_images": 1000}))
        (run / "metrics.jsonl").write_text('{"step": 3, "evaluation/loss": 0.25}\n{"step": 4, "loss": 1.0}\n')
        (run / "environment.json").write_text('{"images": {"training": 5000, "held_out": 1200}}')
        found[type(network).__name__] = run
    (found["Backbone"] / "export" / "mim.safetensors").write_bytes(b"head")
    (found["Backbone"] / "export" / "notes.txt").write_bytes(b"private")
    return found


class Asked(NamedTuple):
    """What a process said that asked a hub."""

    hub: Hub
    said: list[tuple[int, str]]
    loaded: list[bool | str]


@pytest.fixture(scope="module")
def asked(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    run, token = str(runs["PerceptualTokenizer"]), "hf_test"
    commands = [(token, ["push", str(run), f"me/{kind}", "--license", "mit"]) for kind, run in runs.items()]
    commands += [
        (token, ["push", run, "me/PerceptualTokenizer", "--revision", "v2", "--message", "Second"]),
        (token, ["push", run, "me/secret", "--private"]),
        (token, ["push", run, "me/Backbone", "--private"]),
        (token, ["push", run, "others/cb"]),
        ("", ["push", run, "me/none"]),
        ("hf_old", ["push", run, "me/none"]),
    ]
    loads = [(kind, str(run), f"me/{kind}", "") for kind, run in runs.items()]
    tokenizer = ("PerceptualTokenizer", run, "me/PerceptualTokenizer")
    loads += [(*tokenizer, "v2"), (*tokenizer, "v3"), (*tokenizer[:2], run, "v2"), ("close",) * 4, (*tokenizer, "")]
    with hub_server() as hub:
        variables = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS],
            input=json.dumps({"commands": commands, "loads": loads}),
            env={**os.environ, **variables, "HF_HOME": str(tmp_path_factory.mktemp("cache"))},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return Asked(hub, *json.loads(done.stdout))


def header(card: bytes) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return content


def test_push__every_kind_of_run_comes_back_equal(runs: dict[str, Path], asked: Asked) -> None:
    assert [code for code, _ in asked.said[:5]] == [0] * 5
    assert asked.loaded[:5] == [True] * 5
    for kind, run in runs.items():
        files = asked.hub.files[f"me/{kind}", "main"]
        assert files.keys() == {"config.json", "README.md", "model.safetensors"} | (
            {"mim.safetensors"} if kind == "Backbone" else set()
        )
        assert files["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
        card = files["README.md"].decode()
        assert header(files["README.md"])["license"] == "mit"
        assert f"me/{kind}" in card
        assert "path/to/this/folder" not in card
        # No folder of this machine leaves it.
        assert not any(str(run.parent).encode() in data for data in files.values())
    assert "Not sent: notes.txt, which no run writes there." in asked.said[1][1]
    assert "Not sent: training.safetensors, which only another training reads (--init)." in asked.said[0][1]
    card = asked.hub.files["me/Detector", "main"]["README.md"].decode()
    assert "`detector`: 5,000 training images, 1,200 held-out images." in card
    assert "After step 3, on 1,000 held-out images:\n\n| metric | value |\n| --- | ---: |\n| loss | 0.25 |\n" in card


def test_from_pretrained__a_revision_and_the_cache_of_a_hub_that_has_gone(asked: Asked) -> None:
    assert asked.loaded[5] is True
    assert "the Hugging Face hub returned none at 'v3'" in str(asked.loaded[6])
    assert "is a folder, which has no revision 'v2'" in str(asked.loaded[7])
    assert asked.hub.closed
    assert asked.loaded[8] is True


def test_push__branches_privacy_messages_and_refusals(asked: Asked) -> None:
    hub, said = asked.hub, asked.said[5:]
    assert [code for code, _ in said] == [0, 0, 2, 2, 2, 2]
    assert hub.messages[-2:] == ["Second", "Trained by pecobook codebook"]
    assert hub.private == {"me/secret"}
    assert "on the branch `v2`" in hub.files["me/PerceptualTokenizer", "v2"]["README.md"].decode()
    assert said[0][1].endswith(f"Done: {hub.url}/me/PerceptualTokenizer/tree/v2\n")
    assert [text.splitlines()[-1] for _, text in said[2:]] == [
        "pecobook: 'me/Backbone' exists and is public: name another repository, or leave out --private.",
        "pecobook: The hub refused 'others/cb' (403). Its token may not write to 'others/cb': take a token with write "
        "access, and an owner of yours.",
        "pecobook: There is no token of the Hugging Face hub: run 'hf auth login', or set HF_TOKEN.",
        "pecobook: The hub refused 'me/none' (401). Its token is not valid: run 'hf auth login', or set HF_TOKEN.",
    ]


@pytest.mark.parametrize("offline", [True, False])
def test_publish__without_network_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """A port at which nothing listens; and the tests' own environment is offline."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    words = "HF_HUB_OFFLINE is set" if offline else "The hub http://127.0.0.1:9 cannot be reached: "
    with pytest.raises(HubError, match=words) as caught:
        publish("me/cb", {"a": b"b"})
    assert "\n" not in str(caught.value)


def test_push__card_has_data_settings_and_figures(codebook_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(run=str(codebook_run), repo="me/cb", dry_run=True) == "https://huggingface.co/me/cb"
    card, listed = capsys.readouterr()
    data = Path(json.loads((codebook_run / "config.json").read_text())["data"])
    assert f"`{data.name}`: 22 training images, 2 held-out images, 3 classes." in card
    assert str(data.parent) not in card
    assert '"num_codewords": 24' in card
    assert 'PerceptualTokenizer.from_pretrained("me/cb")' in card
    assert "license" not in header(card.encode())
    sizes = {line.split()[0]: line for line in listed.splitlines() if line.startswith("  ")}
    assert sizes.keys() == {"config.json", "model.safetensors", "README.md"}
    weights = (codebook_run / "export" / "model.safetensors").stat().st_size
    assert sizes["model.safetensors"].endswith(f" {weights / 1e3:.3g} kB")
    assert "names no licence" in listed
    assert "Nothing was sent" in listed


@pytest.mark.parametrize("name", ["cb", "me/cb/v2", "me/", "/cb", "me/c b", "https://huggingface.co/me/cb", "me/a..b"])
def test_push__refuses_a_name_that_is_none(codebook_run: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="is no name of the Hugging Face hub: give owner/name"):
        push(run=str(codebook_run), repo=name)


def test_push__refuses_what_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"contains no export/model.safetensors: it is not a finished run"):
        push(run=str(tmp_path), repo="me/cb")
    with pytest.raises(WeightsError, match="There is no run"):
        push(run=str(tmp_path / "nowhere"), repo="me/cb")
    with pytest.raises(ConfigError, match="--repo is missing: pecobook push RUN OWNER/NAME"):
        push(run=str(tmp_path))
    with pytest.raises(ConfigError, match="--license takes an identifier such as mit"):
        push(run=str(tmp_path), repo="me/cb", license="My licence: none")


def test_push_to_hub__sends_the_export_of_a_network(
    codebook_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: dict[str, Any] = {}

    def record(repo_id: str, files: dict[str, bytes | Path], **options: Any) -> str:
        content = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
        sent.update(repo_id=repo_id, files=content, options=options)
        return "url"

    monkeypatch.setattr("pecobook.models.export.publish", record)
    tokenizer = PerceptualTokenizer.from_pretrained(codebook_run)
    assert tokenizer.push_to_hub("me/cb", private=True, revision="v2", message="m", license="mit") == "url"
    assert sent["repo_id"] == "me/cb"
    assert sent["options"] == {"private": True, "revision": "v2", "message": "m"}
    assert sent["files"].keys() == {"config.json", "model.safetensors", "README.md"}
    assert header(sent["files"]["README.md"])["license"] == "mit"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/me/photos", "photos"),
        ("runs/codebook/", "codebook"),
        ("/a/b-{000..010}.tar", "b-{000..010}.tar"),
        ("/a/x.tar,/a/y.tar", "x.tar,y.tar"),
        (r"C:\Users\me\images", "images"),
        ("dalle:/home/me/dalle", "dalle:dalle"),
        ("hf:owner/name", "hf:owner/name"),
        ("timm:hf-hub:owner/name", "timm:hf-hub:owner/name"),
        ('{"depth": "a/b"}', '{"depth": "a/b"}'),
        ("photos", "photos"),
        ("", ""),
    ],
)
def test_without_folders(text: str, name: str) -> None:
    assert without_folders(text) == name
