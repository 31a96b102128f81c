"""`pecobook tokenize --shard I/N`: independent processes write one bank, as the tasks of a job array do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pecobook import api
from pecobook.cli import main
from pecobook.data import tokens
from pecobook.data.tokens import TokenBank
from pecobook.errors import ConfigError, DataError, RunFolderError
from pecobook.settings.tokenize import TokenizeConfig
from pecobook.utils.folder_lock import FolderLock
from tests import forked
from tests.commands.test_tokenize import _COMMON, _VIEWS, broken_copy, files, make_bank, write_short_shards
from tests.runs import codebook_run

__all__ = ["codebook_run"]  # the fixture


@pytest.fixture(autouse=True)
def _short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 2)


def settings(data: Path, tokenizer: Path, out: Path, **more: Any) -> dict[str, Any]:
    values = {**_VIEWS, **_COMMON, "views": 3, "data": str(data), "tokenizer": str(tokenizer), "out": str(out)}
    return {**values, **more}


def test_parts_in_any_order_make_the_bank_of_one_process(
    images: Path, codebook_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = broken_copy(images, tmp_path / "images", "red/0.png", "blue/2.png")
    whole, out = make_bank(data, codebook_run, tmp_path / "whole"), tmp_path / "bank"
    number = len(list(whole.glob("*/codes-*.npy")))
    written = 0
    for part in ("2/3", "3/3"):
        api.tokenize("tiny", **settings(data, codebook_run, out, shard=part))
        written = len(list(out.glob("*/codes-*.npy")))
        said = capsys.readouterr().err
        assert f"Part {part} of '{out}' is written. {number - written} files of other parts are missing so far." in said
        assert "Done" not in said
        with pytest.raises(DataError, match="is unfinished"):
            TokenBank(out)
    assert 0 < number - written < number / 2
    api.tokenize("tiny", **settings(data, codebook_run, out, shard="1/3"))
    assert f"Done: {out}" in capsys.readouterr().err
    assert files(out) == files(whole)
    again = {path: path.stat().st_mtime_ns for path in out.glob("*/codes-*.npy")}
    api.tokenize("tiny", **settings(data, codebook_run, out, shard="2/3"))  # a task that is started again
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/codes-*.npy")} == again


def test_more_parts_than_files_leave_parts_without_one(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    whole, out = make_bank(images, codebook_run, tmp_path / "whole"), tmp_path / "bank"
    parts = len(list(whole.glob("*/codes-*.npy"))) + 2
    api.tokenize("tiny", **settings(images, codebook_run, out, shard=f"{parts}/{parts}"))
    assert not list(out.glob("*/codes-*.npy"))
    api.tokenize("tiny", **settings(images, codebook_run, out, shard="1/1"))  # another number of parts
    assert files(out) == files(whole)


def test_tasks_at_once_make_one_bank_and_the_last_reports_it(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    whole, out = make_bank(images, codebook_run, tmp_path / "whole"), tmp_path / "bank"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings(images, codebook_run, out).items()]
    logs = {part: tmp_path / f"{part}.txt" for part in (1, 2, 3)}
    tasks = [
        forked.start(["tokenize", "tiny", *words, "--shard", f"{part}/3"], log, prepare=write_short_shards)
        for part, log in logs.items()
    ]
    for task in tasks:
        task.join(300)
    said = [log.read_text() for log in logs.values()]
    assert [task.exitcode for task in tasks] == [0, 0, 0], said
    assert sum("Done: " in text for text in said) >= 1
    assert files(out) == files(whole)


def test_a_part_is_refused_beside_itself_and_beside_other_settings(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bank"
    api.tokenize("tiny", **settings(images, codebook_run, out, shard="1/2"))
    with FolderLock(out, part="2-of-2"):
        with pytest.raises(RunFolderError, match="Another process is writing part 2/2"):
            api.tokenize("tiny", **settings(images, codebook_run, out, shard="2/2"))
        for more in ({"shard": "2/3"}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match="Another process is writing part 2/2"):
                api.tokenize("tiny", **settings(images, codebook_run, out, **more))
    before = files(out)
    with pytest.raises(RunFolderError, match=r"--shard: the token bank .* other settings: views: 3 of the bank, 2 now"):
        api.tokenize("tiny", **settings(images, codebook_run, out, shard="2/2", views=2))
    assert files(out) == before


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "2/0", "a/b", "1/4/2", "-1/4", "1.0/2", "١/٢", "/"])
def test_shard__is_a_part_of_parts(shard: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard is I/N with I from 1 to N, as 3/8, not '{shard}'"):
        TokenizeConfig(shard=shard)


@pytest.mark.parametrize("more", [{"overwrite": True}, {"devices": "2"}, {"num_nodes": 2}])
def test_shard__is_for_single_processes(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--shard"):
        TokenizeConfig(shard="1/2", **more)


@pytest.mark.parametrize("shard", ["", "1/1"])
def test_a_signal_stops_after_the_batch_and_the_same_command_continues(
    images: Path, codebook_run: Path, tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bank"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings(images, codebook_run, out).items()]
    words = ["tokenize", "tiny", *words, "--resume", "auto", *(["--shard", shard] if shard else [])]
    write, handler = tokens.write_shard, signal.getsignal(signal.SIGUSR1)

    def write_and_signal(file: Path, *args: Any) -> None:
        write(file, *args)
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecobook.commands.tokenize.write_shard", write_and_signal)
        with pytest.raises(SystemExit) as caught:
            main(words)
    assert caught.value.code == 130
    assert "Stopped; the files that are written are whole. Continue with --resume." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert 0 < len(list(out.glob("*/codes-*.npy"))) < 12
    main(words)
    assert files(out) == files(make_bank(images, codebook_run, tmp_path / "whole"))
