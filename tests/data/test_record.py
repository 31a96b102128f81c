"""The record of a source's files: what it sees of changed, copied and touched data, for every kind of source."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pecobook.data import record
from pecobook.data.dense.detection import open_detection
from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.images import open_images
from pecobook.data.record import Comparison, compare, take
from pecobook.data.source import Splits
from pecobook.errors import RunFolderError
from tests.coco import make_coco
from tests.shapes import write_shapes


def bitmap(value: int) -> bytes:
    """An image whose encoded size does not depend on its content."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def folder(root: Path) -> Splits:
    return open_images(str(root))


def make_folder(root: Path, count: int = 8) -> Path:
    for number in range(count):
        file = root / f"{'ab'[number % 2]}" / f"{number:05d}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bitmap(number % 256))
    return root


def later(path: Path, seconds: int = 100) -> None:
    """Set the time of a file to one that surely differs."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def saved(splits: Splits, out: Path, *, verify: bool = False) -> record.Record:
    out.mkdir(exist_ok=True)
    take(splits, verify=verify).write(out)
    before = record.read(out)
    assert before is not None
    return before


def test_compare__names_what_was_added_removed_and_changed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = saved(folder(root), tmp_path / "run")
    assert before.names.to_pylist() == sorted(f"{'ab'[n % 2]}/{n:05d}.bmp".encode() for n in range(8))
    assert before.sizes.tolist() == [len(bitmap(0))] * 8
    same = compare(before, take(folder(root)))
    assert (same.differences, same.note, same.is_new) == ((), "", False)
    for number in range(5):
        (root / "a" / f"new{number}.bmp").write_bytes(bitmap(1))
    (root / "a" / "00000.bmp").unlink()
    (root / "b" / "00001.bmp").write_bytes(bitmap(1)[:-7])
    comparison = compare(before, take(folder(root)))
    assert str(comparison) == (
        "5 added (a/new0.bmp, a/new1.bmp, a/new2.bmp, ...), 1 removed (a/00000.bmp), 1 changed (b/00001.bmp)"
    )
    assert not comparison.same_names


def test_compare__sees_a_file_of_the_same_size_that_was_written_in_place(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = saved(folder(root), tmp_path / "run")
    (root / "a" / "00002.bmp").write_bytes(bitmap(77))
    later(root / "a" / "00002.bmp")
    comparison = compare(before, take(folder(root)))
    assert comparison.differences == ("1 changed (a/00002.bmp)",)
    assert comparison.same_names


def test_compare__a_touched_file_is_the_same_where_its_content_is_known(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    before = saved(folder(root), tmp_path / "run")
    later(root / "a" / "00002.bmp")
    comparison = compare(before, take(folder(root)))
    assert (comparison.differences, comparison.note, comparison.is_new) == ((), "", True)
    assert compare(comparison.record, take(folder(root))).is_new is False


def test_compare__a_copy_with_other_times_is_the_same(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 600)  # of which 256 are in the sample
    before = saved(folder(root), tmp_path / "run")
    for file in root.rglob("*.bmp"):
        later(file)
    comparison = compare(before, take(folder(root)))
    assert comparison.differences == ()
    assert comparison.note.startswith("The times of all 600 files of --data differ")
    assert comparison.note.endswith("the content of 256.")
    for file in root.rglob("*.bmp"):
        file.write_bytes(bitmap(200))
        later(file)
    assert compare(before, take(folder(root))).differences


def test_compare__few_touched_files_of_unknown_content_count_as_changed_unless_all_was_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 600)
    before, whole = saved(folder(root), tmp_path / "run"), saved(folder(root), tmp_path / "whole", verify=True)
    assert len(before.contents) == 256
    assert len(whole.contents) == 600
    unread = root / os.fsdecode(before.names[next(n for n in range(600) if n not in before.contents)].as_py())
    later(unread)
    name = str(unread.relative_to(root))
    assert str(compare(before, take(folder(root)))) == f"1 with another time and the same size ({name})"
    assert compare(whole, take(folder(root))).differences == ()
    status = unread.stat()
    unread.write_bytes(bitmap(255))
    os.utime(unread, ns=(status.st_mtime_ns - 100 * 10**9,) * 2)  # as it was: only the content tells
    assert compare(before, take(folder(root))).differences == ()
    assert compare(whole, take(folder(root))).differences == ()
    assert str(compare(whole, take(folder(root), verify=True))) == f"1 changed ({name})"


def test_compare__times_in_whole_seconds_are_the_same_times(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 600)
    before = saved(folder(root), tmp_path / "run")
    for file in list(root.rglob("*.bmp"))[:100]:
        os.utime(file, (int(file.stat().st_mtime),) * 2)
    comparison = compare(before, take(folder(root)))
    assert (comparison.differences, comparison.note) == ((), "")


def test_record__keeps_what_was_known_of_contents(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 600)
    whole = saved(folder(root), tmp_path / "whole", verify=True)
    later(root / "a" / "00000.bmp")
    assert len(compare(whole, take(folder(root))).record.contents) == 600


def test_record__does_not_depend_on_the_place_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images")
    before = saved(folder(root), tmp_path / "run")
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert compare(before, take(folder(tmp_path / "copy"))).differences == ()
    monkeypatch.chdir(root)
    assert compare(before, take(open_images("."))).differences == ()


def test_read__a_damaged_record_is_named(tmp_path: Path) -> None:
    assert record.read(tmp_path) is None
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunFolderError, match=r"data\.parquet', the record of the data, cannot be read"):
        record.read(tmp_path)


# ---------------------------------------------------------------------------------------------- every kind of source


def table_with_bytes(root: Path) -> tuple[Callable[[], Splits], Path]:
    root.mkdir()
    images = [{"bytes": bitmap(n), "path": f"{n}.bmp"} for n in range(8)]
    pq.write_table(pa.table({"image": images, "label": [n % 2 for n in range(8)]}), root / "train.parquet")
    (root / "classes.txt").write_text("a\nb\n")
    return lambda: open_images(str(root)), root / "train.parquet"


def table_of_one_file(root: Path) -> tuple[Callable[[], Splits], Path]:
    _, file = table_with_bytes(root)
    return lambda: open_images(str(file)), root / "classes.txt"


def table_of_paths(root: Path) -> tuple[Callable[[], Splits], Path]:
    make_folder(root)
    names = [str(file.relative_to(root)) for file in sorted(root.rglob("*.bmp"))]
    pq.write_table(pa.table({"image": names}), root / "t.parquet")
    return lambda: open_images(str(root)), root / names[3]


def shards(root: Path) -> tuple[Callable[[], Splits], Path]:
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(4):
                info = tarfile.TarInfo(f"{shard}-{number}.bmp")
                info.size = len(bitmap(0))
                tar.addfile(info, io.BytesIO(bitmap(number)))
    return lambda: open_images(str(root)), root / "1.tar"


def pairs(root: Path) -> tuple[Callable[[], Splits], Path]:
    write_shapes(root, 6)
    return lambda: open_segmentation(str(root)), sorted(root.glob("train/masks/*.png"))[2]


def pairs_classes(root: Path) -> tuple[Callable[[], Splits], Path]:
    open_, _ = pairs(root)
    file = root / "classes.txt"
    if not file.exists():
        file.write_text("".join(f"class{n}\n" for n in range(12)))
    return open_, file


def coco_images(root: Path) -> tuple[Callable[[], Splits], Path]:
    make_coco(root)
    return lambda: open_detection(str(root)), sorted(root.rglob("*.png"))[1]


def coco_annotations(root: Path) -> tuple[Callable[[], Splits], Path]:
    make_coco(root)
    return lambda: open_detection(str(root)), sorted(root.rglob("*.json"))[0]


KINDS = (
    table_with_bytes,
    table_of_one_file,
    table_of_paths,
    shards,
    pairs,
    pairs_classes,
    coco_images,
    coco_annotations,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source__sees_a_byte_that_changed_in_place(
    kind: Callable[[Path], tuple[Callable[[], Splits], Path]], tmp_path: Path
) -> None:
    open_, file = kind(tmp_path / "data")
    before = saved(open_(), tmp_path / "run")
    assert compare(before, take(open_())).is_new is False
    later(file)
    touched = compare(before, take(open_()))
    assert touched.differences == ()
    content = bytearray(file.read_bytes())
    content[-2 if file.suffix in (".txt", ".json") else len(content) // 2] ^= 1
    now = open_()  # before the change, after which the file may be unreadable
    file.write_bytes(bytes(content))
    later(file)
    assert compare(before, take(now)).differences == (f"1 changed ({file.relative_to(tmp_path / 'data')})",)


def test_photos__are_found_where_they_are_installed(tmp_path: Path) -> None:
    before = saved(open_images("photos"), tmp_path)
    assert b"skimage/data/astronaut.png" in before.names.to_pylist()
    assert len(before.contents) == len(before.names) == 17
    assert compare(before, take(open_images("photos"))).is_new is False


@pytest.mark.parametrize("change", ["image", "label"])
def test_hub__sees_other_images_and_labels(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(changed: bool) -> datasets.DatasetDict:
        images: list[dict[str, Any]] = [{"bytes": bitmap(n % 256), "path": None} for n in range(300)]
        labels = [n % 3 for n in range(300)]
        if changed and change == "image":
            images[100]["bytes"] += b"more"  # not among those whose bytes are read
        if changed and change == "label":
            labels[100] = 2 - labels[100] // 2
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        return datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded(False))
    before, whole = (
        saved(open_images("hf:a/b"), tmp_path / "run"),
        saved(open_images("hf:a/b"), tmp_path / "w", verify=True),
    )
    assert before.names.to_pylist() == [b"the split train", b"the split evaluation"]
    for known in (before, whole):
        for verify in (False, True):
            assert compare(known, take(open_images("hf:a/b"), verify=verify)).differences == ()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded(True))
    for known in (before, whole):
        comparison: Comparison = compare(known, take(open_images("hf:a/b")))
        assert "changed (the split " in str(comparison)


def test_record__is_small_and_json_free(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 600)
    take(folder(root)).write(tmp_path)
    assert (tmp_path / "data.parquet").stat().st_size < 60 * 600
    assert json.dumps(pq.read_table(tmp_path / "data.parquet").column_names) == '["name", "size", "time", "content"]'
