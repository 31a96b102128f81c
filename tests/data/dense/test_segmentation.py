from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pecobook.data.decode import BadImage
from pecobook.data.dense.mask_files import InvalidMask
from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.data.dense.segmentation_classes import IGNORE, MaskClasses
from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError, listed
from tests.data.dense.masks import decode_mask
from tests.shapes import COLOURS, shape, write_pairs, write_shapes


def train_of(splits: Splits) -> SegmentationSource:
    return cast("SegmentationSource", splits.train)


def index_of(source: SegmentationSource, name: str) -> int:
    """Return the index of an image."""
    return next(n for n in range(len(source)) if source.identify(n) == name)


def encoded(array: Any, mode: str | None = None, extension: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(array))
    (picture.convert(mode) if mode else picture).save(buffer, extension)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- layouts


def test_open__train_and_val_with_class_names(tmp_path: Path) -> None:
    splits = open_segmentation(str(write_shapes(tmp_path)))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (12, 4, "validation")
    assert train_of(splits).mask_classes.names == ("ground", "red", "green")
    image, mask = splits.train.sample(0)
    picture, truth = shape(0)
    assert splits.train.identify(0) == "train/images/0.jpg"
    assert image.shape == (3, 40, 56)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - picture).mean() < 14
    expected = truth.astype(int)
    expected[truth == 255] = IGNORE
    assert mask.dtype == torch.int16
    assert np.array_equal(mask.numpy(), expected)


def test_open__the_layout_of_ade20k(tmp_path: Path) -> None:
    for part, numbers in (("training", range(6)), ("validation", range(100, 102))):
        for number in numbers:
            picture, mask = shape(number)
            for kind, array, extension in (("images", picture, "jpg"), ("annotations", mask, "png")):
                folder = tmp_path / kind / part
                folder.mkdir(parents=True, exist_ok=True)
                values = np.where(array == 255, 0, array + 1).astype(np.uint8) if kind == "annotations" else array
                Image.fromarray(values).save(folder / f"ADE_{number}.{extension}")
    splits = open_segmentation(str(tmp_path), mask_values=("1-3",), ignore=("0",))
    assert (len(splits.train), len(splits.evaluation)) == (6, 2)
    assert train_of(splits).mask_classes == MaskClasses(("class 1", "class 2", "class 3"), (1, 2, 3), (0,))
    _, mask = splits.train.sample(0)
    truth = shape(0)[1].astype(int)
    assert np.array_equal(mask.numpy(), np.where(truth == 255, IGNORE, truth))


def test_open__without_splits_a_tenth_is_held_out(tmp_path: Path) -> None:
    write_pairs(tmp_path, range(20), masks="labels")
    splits = open_segmentation(str(tmp_path), mask_values=("0", "1", "2"))
    assert (len(splits.train), len(splits.evaluation)) == (18, 2)
    held = {splits.evaluation.identify(n) for n in range(2)}
    assert held.isdisjoint(splits.train.identify(n) for n in range(18))


def test_open__names_that_begin_with_test_declare_no_split(tmp_path: Path) -> None:
    write_pairs(tmp_path, range(3))
    for kind, extension in (("images", "jpg"), ("masks", "png")):
        (tmp_path / kind / f"0.{extension}").rename(tmp_path / kind / f"test_0.{extension}")
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    assert (len(splits.train), len(splits.evaluation)) == (2, 1)


def test_open__a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"annotation": ImageFeature(), "image": ImageFeature(), "scene": Value("string")})
    rows = [shape(number) for number in range(5)]
    table = Dataset.from_dict(
        {
            "annotation": [{"bytes": encoded(mask), "path": None} for _, mask in rows],
            "image": [{"bytes": encoded(picture), "path": None} for picture, _ in rows],
            "scene": ["x"] * 5,
        },
        features=features,
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=table, validation=table.select([0])))
    splits = open_segmentation("hf:owner/shapes", mask_values=("0-2",))
    assert (len(splits.train), len(splits.evaluation)) == (5, 1)
    image, mask = splits.train.sample(3)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), rows[3][0])
    assert np.array_equal(mask.numpy()[:-1], rows[3][1][:-1])
    assert splits.train.identify(3) == "owner/shapes train row 3"
    monkeypatch.setattr("datasets.load_dataset", lambda *_: DatasetDict(train=table.remove_columns("annotation")))
    with pytest.raises(DataError, match="image columns image: one column must be 'image'"):
        open_segmentation("hf:owner/shapes")


def test_open__lists_images_without_a_mask_and_masks_without_an_image(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "train/masks/3.png").unlink()
    (root / "val/images/101.jpg").unlink()
    with pytest.raises(DataError) as error:
        open_segmentation(str(root))
    assert "train/images/3.jpg has no mask" in str(error.value)
    assert "val/masks/101.png has no image" in str(error.value)


def test_open__leaves_out_unpaired_files_with_skip_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path)
    (root / "train/masks/3.png").unlink()
    assert len(open_segmentation(str(root), skip_bad=True).train) == 11
    assert "1 images or masks are left out" in capsys.readouterr().err


def test_open__two_pictures_with_the_same_name(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    Image.fromarray(shape(1)[0]).save(root / "train/images/3.png")
    with pytest.raises(DataError, match=r"train/images/3\.jpg and train/images/3\.png have the same name"):
        open_segmentation(str(root))


def test_open__linked_and_capital_folders_and_masks_with_an_ending(tmp_path: Path) -> None:
    real = tmp_path / "real"
    write_pairs(real / "one", range(4))
    write_pairs(real / "two", range(9, 11))
    for file in list(real.rglob("masks/*.png")):
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    root = tmp_path / "root"
    for split, name in (("train", "one"), ("val", "two")):
        (root / split).mkdir(parents=True)
        (root / split / "Images").symlink_to(real / name / "images")
        (root / split / "Masks").symlink_to(real / name / "masks")
    (root / "train" / "again").symlink_to(root)
    splits = open_segmentation(str(root), mask_values=("0-2",))
    assert (len(splits.train), len(splits.evaluation)) == (4, 2)
    assert splits.train.sample(0)[1].shape == (40, 56)


@pytest.mark.parametrize("missing", ["images", "masks", "everything"])
def test_open__reports_missing_folders(tmp_path: Path, missing: str) -> None:
    if missing == "everything":
        with pytest.raises(DataError, match="not a folder"):
            open_segmentation(str(tmp_path / "nowhere"))
        return
    write_pairs(tmp_path, range(2))
    shutil.rmtree(tmp_path / missing)
    with pytest.raises(DataError, match=f"holds no {missing}"):
        open_segmentation(str(tmp_path))


def test_source__can_be_pickled_and_changes_its_fingerprint_with_its_files(tmp_path: Path) -> None:
    import pickle

    source = train_of(open_segmentation(str(write_shapes(tmp_path))))
    copy = pickle.loads(pickle.dumps(source.subset([4, 2])))
    assert [copy.identify(n) for n in range(2)] == [source.identify(4), source.identify(2)]
    assert torch.equal(copy.sample(1)[1], source.sample(2)[1])
    assert copy.fingerprint != source.fingerprint


# ---------------------------------------------------------------------------------------------------------------- masks


def test_decode_mask__numbers_in_every_mode() -> None:
    values = np.array([[0, 1, 2], [7, 200, 255]])
    palette = Image.fromarray(values.astype(np.uint8), "L").convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([9] * 768)  # the colours have no effect
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    for data in (encoded(values.astype(np.uint8)), encoded(values.astype(np.uint16)), buffer.getvalue()):
        assert np.array_equal(decode_mask(data, None, name="x"), values)
    assert np.array_equal(decode_mask(encoded(values > 1), None, name="x"), values > 1)
    assert decode_mask(encoded(np.array([[300, 40_000]], np.uint16)), None, name="x").tolist() == [[300, 40_000]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_decode_mask__turns_a_mask_by_its_own_tag(mode: str, orientation: int) -> None:
    values = np.arange(12).reshape(3, 4) % 2
    mask = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values.astype(np.uint8))
    if mode == "1":
        mask = mask.point(lambda value: 255 * value).convert("1")
    elif mode == "P":
        mask.putpalette([9] * 768)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    mask.save(buffer, "PNG", exif=exif)
    upright = np.rot90(values, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert np.array_equal(decode_mask(buffer.getvalue(), None, name="x"), upright)


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_decode_mask__colours_to_their_indices(count: int, random: Any) -> None:
    colours = np.array(random.sample([(r, g, b) for r in range(4) for g in range(4) for b in range(4)], count)) * 85
    numbers = np.array([[random.randrange(count) for _ in range(5)] for _ in range(3)])
    colours = colours.astype(np.uint8)
    assert np.array_equal(decode_mask(encoded(colours[numbers]), colours, name="x"), numbers)
    unlisted = colours[numbers].copy()
    unlisted[0, 0] = (1, 2, 3)
    assert decode_mask(encoded(unlisted), colours, name="x")[0, 0] == 65_536


def test_decode_mask__refuses() -> None:
    with pytest.raises(BadImage, match="not an image"):
        decode_mask(b"nothing", None, name="x")
    with pytest.raises(InvalidMask, match="colour picture"):
        decode_mask(encoded(COLOURS[None]), None, name="x")
    grey = np.array([[3, 7], [0, 255]], np.uint8)
    assert np.array_equal(decode_mask(encoded(np.stack([grey] * 3, -1)), None, name="x"), grey)
    with pytest.raises(BadImage):
        decode_mask(encoded(np.random.default_rng(0).integers(0, 9, (40, 40), np.uint8))[:300], None, name="x")


def test_colour_masks__from_a_class_file(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    for file in root.rglob("masks/*.png"):
        values = np.asarray(Image.open(file)).copy()
        values[-1] = 0
        Image.fromarray(COLOURS[values]).save(file)
    (root / "classes.txt").write_text("\n".join(f"c{n} {r} {g} {b}" for n, (r, g, b) in enumerate(COLOURS)))
    result = verify(open_segmentation(str(root)))
    assert result.problems == ()
    train = train_of(result.splits)
    assert np.array_equal(train.sample(index_of(train, "train/images/2.jpg"))[1].numpy()[:-1], shape(2)[1][:-1])
    (root / "classes.txt").write_text("c0 60 60 60\nc1 220 40 40\n")
    assert "colours that --classes does not list, such as 40 200 60" in verify(open_segmentation(str(root))).problems[0]


# ------------------------------------------------------------------------------------------------------------ verifying


def test_verify__reports_each_problem_once_and_leaves_the_pair_out(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(root / "train/masks/1.png")
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(root / "train/masks/4.png")
    (root / "train/images/6.jpg").write_bytes(b"broken")
    (root / "val/masks/101.png").write_bytes(b"broken")
    done: list[int] = []
    result = verify(open_segmentation(str(root)), done.append)
    assert done == list(range(1, 17))
    assert result.problems == (
        "train/masks/1.png is 9 x 5, but its image is 56 x 40",
        "train/masks/4.png holds the value 7, but the 3 classes have the values 0 to 2",
    )
    assert (result.num_problems, result.num_unreadable) == (2, 2)
    assert result.unreadable == ("train/images/6.jpg: not an image (1 more alike)",)
    parts = [train_of(result.splits), cast("SegmentationSource", result.splits.evaluation)]
    assert [str(bad) for part in parts for bad in part.unreadable] == [
        "train/images/6.jpg: not an image",
        "val/masks/101.png: not an image",
    ]
    names = {result.splits.train.identify(n) for n in range(len(result.splits.train))}
    assert names == {f"train/images/{n}.jpg" for n in range(12)} - {f"train/images/{n}.jpg" for n in (1, 4, 6)}
    assert len(result.splits.evaluation) == 3


def test_verify__a_colour_picture_instead_of_numbers_is_a_problem(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    Image.fromarray(COLOURS[np.ones((40, 56), int)]).save(root / "val/masks/100.png")
    result = verify(open_segmentation(str(root)))
    assert result.unreadable == ()
    assert "val/masks/100.png is a colour picture" in result.problems[0]


def test_verify__an_image_and_a_mask_are_turned_by_their_own_tags(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, truth = shape(0)
    numbers = truth.astype(np.uint8)
    Image.fromarray(picture).save(root / "train/images/0.jpg", exif=exif)
    Image.fromarray(numbers).save(root / "train/masks/0.png", exif=exif)  # both unturned
    Image.fromarray(picture).save(root / "train/images/1.jpg", exif=exif)
    Image.fromarray(np.rot90(numbers, -1)).save(root / "train/masks/1.png")  # drawn on the upright image
    Image.fromarray(picture).save(root / "train/images/2.jpg", exif=exif)
    Image.fromarray(numbers).save(root / "train/masks/2.png")  # drawn on the unturned image, without a tag
    result = verify(open_segmentation(str(root)))
    assert result.problems == (
        "train/masks/2.png is 56 x 40, but its image is 40 x 56 after its EXIF orientation, which the mask may lack",
    )
    train = train_of(result.splits)
    for name in ("train/images/0.jpg", "train/images/1.jpg"):
        image, mask = train.sample(index_of(train, name))
        assert np.array_equal(mask.numpy() % 256, np.rot90(truth, -1))  # 255 is ignored, which is -1
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.rot90(picture, -1)).mean() < 14


def test_verify__a_rotated_image_fits_its_mask(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    picture, _ = shape(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(np.rot90(picture).copy()).save(root / "train/images/0.jpg", exif=exif)
    assert verify(open_segmentation(str(root))).problems == ()


def test_verify__infers_classes_from_masks(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").unlink()
    splits = open_segmentation(str(root))
    assert train_of(splits).mask_classes.names == ()
    assert train_of(verify(splits).splits).mask_classes == MaskClasses(
        ("class 0", "class 1", "class 2"), (0, 1, 2), (255,)
    )


def test_verify__masks_of_0_and_255_are_ambiguous(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").unlink()
    for file in root.rglob("masks/*.png"):
        Image.fromarray((np.asarray(Image.open(file)) == 1).astype(np.uint8) * 255).save(file)
    with pytest.raises(ConfigError, match="--mask-values 0 255"):
        verify(open_segmentation(str(root)))
    result = verify(open_segmentation(str(root), mask_values=("0", "255")))
    assert set(result.splits.train.sample(0)[1].unique().tolist()) == {0, 1}


@pytest.mark.parametrize(("value", "other"), [(0, 0), (5000, 0), (128, 40), (20, 20)])
def test_verify__refuses_to_guess_classes(tmp_path: Path, value: int, other: int) -> None:
    write_pairs(tmp_path, range(4))
    for file in tmp_path.rglob("masks/*.png"):
        array = np.full((40, 56), value, np.uint16)
        array[:5] = other
        Image.fromarray(array).save(file)
    with pytest.raises(DataError, match=f"up to {value}, which define no classes"):
        verify(open_segmentation(str(tmp_path)))


def test_sample__of_a_pair_that_was_not_verified(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(root / "train/masks/0.png")
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(root / "train/masks/1.png")
    source = open_segmentation(str(root)).train
    with pytest.raises(BadImage, match="does not have the size of its image"):
        source.sample(0)
    with pytest.raises(BadImage, match="no class"):
        source.sample(1)


def test_listed() -> None:
    assert listed(["a", "b"]) == "a\nb"
    assert listed([str(n) for n in range(12)]).splitlines()[-1] == "... and 2 more"
