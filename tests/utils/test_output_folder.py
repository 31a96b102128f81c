from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pecobook.errors import RunFolderError
from pecobook.utils.files import write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.json_files import TEXT
from pecobook.utils.output_folder import OutputFolder, check_new_file

BANK: dict[str, Any] = {"kind": "a token bank", "marker": "config.json", "resume": False, "overwrite": False}
DEMO: dict[str, Any] = {"kind": "a demo", "marker": "demo.json", "always_resumes": True}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "is not empty: name another folder."),
        ({"overwrite": False}, "is not empty: delete it with --overwrite, or name another folder."),
        (BANK, "is not empty: continue with --resume, delete it with --overwrite, or name another folder."),
        (DEMO, "is not empty and holds no demo: name another folder."),
        ({**BANK, "always_resumes": True}, "holds no token bank: delete it with --overwrite, or name another folder."),
        ({**BANK, "resume": True}, "there is no token bank in"),
        ({**BANK, "overwrite": True}, "does not look like a token bank, so it is not deleted: name another folder."),
    ],
)
def test_check__refuses_a_filled_folder_with_the_remedies(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    (tmp_path / "thesis.tex").touch()
    folder = OutputFolder(str(tmp_path), **more)
    with pytest.raises(RunFolderError) as caught:
        folder.check()
    assert message in str(caught.value)
    with pytest.raises(RunFolderError):
        folder.begin()
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("more", [{}, {"overwrite": False}, {**BANK, "overwrite": True}, DEMO])
@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".soft-lock"]])
def test_check__accepts_a_new_or_empty_folder(tmp_path: Path, more: dict[str, Any], left: list[str]) -> None:
    OutputFolder(str(tmp_path / "a" / "b"), **more).check()
    for name in left:  # of a command that was killed
        (tmp_path / name).touch()
    OutputFolder(str(tmp_path), **more).check()
    assert names(tmp_path) == left


def test_begin__resumes_a_folder_of_its_kind_and_checks_the_marker(tmp_path: Path) -> None:
    read: list[dict[str, Any]] = []
    (tmp_path / "demo.json").write_text('{"seed": 1}')
    (tmp_path / "run").mkdir()
    OutputFolder(str(tmp_path), **DEMO, check_resume=read.append).begin().release()
    assert read == [{"seed": 1}]
    assert names(tmp_path) == ["demo.json", "run"]
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"demo.json' cannot be read"):
        OutputFolder(str(tmp_path), **DEMO, check_resume=read.append).check()


def test_begin__deletes_only_files_of_its_own_in_a_folder_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "codes").touch()
    (tmp_path / "train" / "notes.txt").touch()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "codes").touch()
    foreign = OutputFolder(str(tmp_path), **{**BANK, "overwrite": True}, schema={"kind": TEXT})
    with pytest.raises(RunFolderError, match="not deleted"):
        foreign.begin()
    assert (tmp_path / "train" / "codes").exists()
    own = OutputFolder(str(tmp_path), **{**BANK, "overwrite": True}, files=("config.json", "*/codes"))
    own.begin(lambda out: (out / "new").touch()).release()
    assert names(tmp_path) == ["new", "train"]
    assert names(tmp_path / "train") == ["notes.txt"]
    assert f"did not write in '{tmp_path}': train" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}])
def test_begin__starts_in_a_folder_whose_command_was_killed_as_it_wrote_the_marker(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    (tmp_path / ".config.json.tmp").write_text('{"se')
    (tmp_path / ".lock").touch()
    folder = OutputFolder(str(tmp_path), **{**BANK, **more}, schema={"kind": TEXT})
    folder.begin(lambda out: write_json(out / "config.json", {})).release()
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("data", "out", "relation"),
    [
        ("images", "images", "is"),
        ("images", "images/runs/first", "lies inside"),
        ("images/train", "images", "contains"),
        ("images", "images/../link", "is"),
    ],
)
def test_check__refuses_results_among_the_images(tmp_path: Path, data: str, out: str, relation: str) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "config.json").write_text("{}")
    folder = OutputFolder(str(tmp_path / out), **{**BANK, "overwrite": True}, data=str(tmp_path / data))
    with pytest.raises(RunFolderError, match=f"{relation} the folder of images"):
        folder.begin()
    assert (tmp_path / "images" / "config.json").exists()
    OutputFolder(str(tmp_path / "images-runs"), data=str(tmp_path / data)).check()


@pytest.mark.parametrize("data", ["out/data.parquet", "out/shards-*.tar", "link/data.parquet"])
def test_check__refuses_a_folder_that_holds_the_file_of_images(tmp_path: Path, data: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "config.json", {})
    for name in ("data.parquet", "shards-0.tar"):
        (out / name).write_text("images")
    (tmp_path / "link").symlink_to(out)
    for more in ({"overwrite": True}, {"resume": True}):
        folder = OutputFolder(str(out), **{**BANK, **more}, data=str(tmp_path / data), files=("*",))
        with pytest.raises(RunFolderError, match="holds the images"):
            folder.begin()
    assert names(out) == ["config.json", "data.parquet", "shards-0.tar"]
    OutputFolder(str(tmp_path / "other"), data=str(out / "data.parquet")).check()
    OutputFolder(str(out / "inner"), data=str(out / "data.parquet")).check()  # beside the file, as in any folder


def test_check__overwrite_refuses_to_delete_what_is_read_or_lies_behind_a_link(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    (out / "export").mkdir(parents=True)
    mine.mkdir()
    write_json(out / "config.json", {})
    write_json(out / "export" / "config.json", {})
    write_json(mine / "step-1.png", {})
    settings = {**BANK, "overwrite": True, "files": ("config.json", "export/*", "samples/*")}
    for read in (out, out / "export", out / "export" / "config.json"):
        with pytest.raises(RunFolderError, match=r"which is read, lies in .*: name another --out"):
            OutputFolder(str(out), **settings, reads=("resnet18", str(read))).begin()
    (out / "samples").symlink_to(mine)
    with pytest.raises(RunFolderError, match=r"samples' is a link to .*mine', in which nothing is deleted"):
        OutputFolder(str(out), **settings).begin()
    assert names(out) == ["config.json", "export", "samples"]
    assert names(mine) == ["step-1.png"]
    (out / "samples").unlink()
    (out / "photos").symlink_to(mine)  # no folder of ours
    OutputFolder(str(out), **settings, reads=(str(mine),)).begin().release()
    assert names(out) == ["photos"]
    assert names(mine) == ["step-1.png"]


def test_check__refuses_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"is a link to .*gone', which is not there: make that folder"):
        OutputFolder(str(tmp_path / "link")).check()
    assert names(tmp_path) == ["link"]


def test_begin__holds_the_lock_within_the_context(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(str(out)).begin(), pytest.raises(RunFolderError, match="Another process is writing"):
        FolderLock(out)
    assert names(out) == []
    FolderLock(out).release()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_begin__releases_the_folder_after_an_error(tmp_path: Path, error: BaseException) -> None:
    def write(_: Path) -> None:
        raise error

    with pytest.raises((RunFolderError, KeyboardInterrupt), match=r"cannot be written: .*No space|^$"):
        OutputFolder(str(tmp_path)).begin(write)
    FolderLock(tmp_path).release()


def test_check_new_file__refuses_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)
    with pytest.raises(RunFolderError, match=r"--out '.*a\.json' cannot be written: no permission in '.*'\."):
        check_new_file(str(tmp_path / "a.json"))
    monkeypatch.setattr("os.access", lambda *_: False)
    check_new_file("")  # no file, so the command may be started in any folder


def test_check_new_file__refuses_a_file_that_exists(tmp_path: Path) -> None:
    check_new_file("")
    check_new_file(str(tmp_path / "figures.json"))
    (tmp_path / "figures.json").write_text(json.dumps({}))
    with pytest.raises(RunFolderError, match="exists already: name another file"):
        check_new_file(str(tmp_path / "figures.json"))
