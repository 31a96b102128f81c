"""Masks and files of classes as tools write them: the right values, or a refusal by name."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from pecobook.data.dense.class_files import ClassFile, find_class_file, read_classes
from pecobook.data.dense.mask_files import InvalidMask, decode_mask
from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from pecobook.data.dense.segmentation_check import VerificationResult, verify
from pecobook.errors import ConfigError, DataError
from tests.shapes import shape, write_pairs, write_shapes


def png(samples: Any, depth: int, colour_type: int = 0) -> bytes:
    """Write a PNG sample by sample: (H, W) for grey (0), (H, W, channels) for colour (2), alpha (4, 6)."""
    samples = np.asarray(samples)
    rows = b""
    for row in samples.reshape(len(samples), -1):
        bits = "".join(format(int(sample), f"0{depth}b") for sample in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def train_of(result: VerificationResult) -> SegmentationSource:
    return cast("SegmentationSource", result.splits.train)


def rewrite(root: Path, change: Any, pattern: str = "masks/*.png") -> None:
    """Replace each mask by the bytes that `change` returns for its values."""
    for file in root.rglob(pattern):
        with Image.open(file) as picture:
            values = np.asarray(picture)
        file.write_bytes(change(values))


# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_decode_mask__grey_of_every_depth_holds_its_samples(depth: int) -> None:
    samples = np.array([[0, 1, min(2, 2**depth - 1)], [2**depth - 1, 0, 1]])
    assert decode_mask(png(samples, depth), None, name="x").tolist() == samples.tolist()


def test_decode_mask__grey_with_a_largest_value_of_its_own() -> None:
    for data in (
        b"P5\n3 1\n2\n\0\1\2",
        b"P2\n3 1\n2\n0 1 2\n",
        b"P5\n3 1\n65535\n\0\0\0\1\0\2",
        b"P5\n3 1\n255\n\0\1\2",
    ):
        assert decode_mask(data, None, name="x").tolist() == [[0, 1, 2]]
    assert decode_mask(b"P5\n3 1\n300\n\0\1\0\2\1\x2c", None, name="x").tolist() == [[1, 2, 300]]


def test_decode_mask__whole_numbers_in_wide_formats() -> None:
    values = np.array([[0, 3, 255]])
    for kind in (np.int32, np.uint16, np.int16, np.float32):
        assert decode_mask(tiff(values.astype(kind)), None, name="x").tolist() == [[0, 3, 255]]
    grey = np.repeat(values[..., None], 3, -1).astype(np.uint8)
    assert decode_mask(png(grey, 8, 2), None, name="x").tolist() == [[0, 3, 255]]
    opaque = np.concatenate([grey, np.full((1, 3, 1), 255)], -1)
    assert decode_mask(png(opaque, 8, 6), None, name="x").tolist() == [[0, 3, 255]]
    hidden = opaque.copy()
    hidden[0, 0, 3] = 0  # transparent and black
    assert decode_mask(png(hidden, 8, 6), None, name="x").tolist() == [[0, 3, 255]]


def numpy_file(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32])
def test_decode_mask__numpy_arrays(kind: Any) -> None:
    values = np.array([[0, 3, 255], [1, 1, 2]])
    for array in (values, values[None], values[..., None]):
        assert decode_mask(numpy_file(array.astype(kind)), None, name="x").tolist() == values.tolist()


def test_decode_mask__is_turned_by_its_own_orientation() -> None:
    values = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode_mask(buffer.getvalue(), None, name="x"), np.rot90(values, -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (numpy_file(np.zeros((2, 2, 3))), "is an array of shape"),
        (numpy_file(np.array([[0.5, 1]])), "holds fractions"),
        (numpy_file(np.array([[-1, 1]])), "holds a negative value"),
        (tiff(np.array([[-1, 0, 2]], np.int32)), "holds the value -1"),
        (tiff(np.array([[0, 0.5]], np.float32)), "holds fractions"),
        (tiff(np.array([[0, np.nan]], np.float32)), "holds fractions"),
        (tiff(np.zeros((2, 2), np.uint8), tiffinfo={262: 0}), "whose 0 is white"),
        (png(np.ones((2, 2, 3), int), 16, 2), "a colour picture of 16 bits"),
        (png(np.ones((2, 2, 2), int), 16, 4), "a colour picture of 16 bits"),
        (png([[[7, 7, 7, 0], [1, 1, 1, 255]]], 8, 6), "transparent pixels that are not black"),
    ],
)
def test_decode_mask__refuses_what_has_no_class_numbers(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidMask, match=reason):
        decode_mask(data, None, name="x")


def test_decode_mask__refuses_several_pages() -> None:
    buffer = io.BytesIO()
    pages = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 1)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(InvalidMask, match="has 2 pages"):
        decode_mask(buffer.getvalue(), None, name="x")


# ----------------------------------------------------------------------------------- what the values of a data set mean


def test_verify__two_named_classes_and_masks_of_0_and_255(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("bg\nfg\n")
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8))
    result = verify(open_segmentation(str(root)))
    assert result.notes == ("The masks hold only 0 and 255: 255 is read as 'fg', and no pixel is ignored.",)
    source = train_of(result)
    truth = np.asarray(Image.open(root / str(source.identify_mask(0)))) == 255
    assert np.array_equal(source.sample(0)[1].numpy(), truth)
    assert result.counts[0].classes["fg"] == sum((shape(number)[1] == 1).sum() for number in range(12))
    assert result.fault == ""
    sampled = verify(open_segmentation(str(root)), limit=3)  # as with --no-verify
    assert (train_of(sampled).mask_classes, len(sampled.splits.train)) == (source.mask_classes, 12)


def test_verify__one_class_alone_has_pixels(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8))
    result = verify(open_segmentation(str(root)))
    assert "'ground' alone has pixels in the training masks" in result.fault
    assert "--mask-values (such as 0 255)" in result.fault
    assert "255 (" in result.fault
    assert result.notes[0] == "2 of 3 classes have no pixel in the training masks, and are not learned: red, green."


def test_verify__names_classes_without_a_pixel(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("ground\nred\ngreen\nblue\n")
    rewrite(root, lambda values: png(np.where(values == 2, 0, values), 8), "val/masks/*.png")
    result = verify(open_segmentation(str(root)))
    assert result.fault == ""
    assert result.notes == (
        "1 of 4 classes have no pixel in the training masks, and are not learned: blue.",
        "2 of 4 classes have no pixel in the held-out masks, so that the mean IoU is over the other 2: green, blue.",
    )


def test_verify__an_unlabelled_0_gives_a_hint(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.where(values == 255, 0, values + 1), 8))
    result = verify(open_segmentation(str(root)))
    assert len(result.problems) == 16
    assert (
        "if 0 means no class, give --mask-values 1-3 --ignore 0; if 3 means none, give --ignore 255 3." in result.hint
    )
    assert not verify(open_segmentation(str(root), mask_values=("1-3",), ignore=("0",))).problems


def binary(root: Path, name: str, depth: int, inside: int) -> None:
    """Replace a mask by one of a few bits, with `inside` where the class is 1."""
    rewrite(root, lambda _: png(np.where(shape(int(name))[1] == 1, inside, 0), depth), f"masks/{name}.png")


def test_verify__one_bit_among_masks_of_0_1_and_2_means_1(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.where(values == 255, 0, values), 8))
    binary(root, "3", 1, 1)
    result = verify(open_segmentation(str(root)))
    assert "1 of 16 masks are grey files of fewer than 8 bits: they hold the numbers as stored" in result.notes[0]
    source = train_of(result)
    index = next(n for n in range(len(source)) if source.identify_mask(n) == "train/masks/3.png")
    assert np.array_equal(source.sample(index)[1].numpy(), shape(3)[1] == 1)


def test_verify__one_bit_among_masks_with_255_and_without_1_means_255(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.where(values == 1, 0, values), 8))  # 0, 2 and the ignored 255
    binary(root, "3", 1, 1)
    source = train_of(verify(open_segmentation(str(root))))
    index = next(n for n in range(len(source)) if source.identify_mask(n) == "train/masks/3.png")
    assert np.array_equal(source.sample(index)[1].numpy(), np.where(shape(3)[1] == 1, -1, 0))


@pytest.mark.parametrize(("depth", "inside"), [(1, 1), (2, 3), (4, 15)])
def test_verify__few_bits_among_masks_with_both_values_are_refused(tmp_path: Path, depth: int, inside: int) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.where(values == 2, inside, values), 8))
    binary(root, "3", depth, inside)
    (root / "classes.txt").write_text("\n".join(f"c{number}" for number in range(16)))
    with pytest.raises(DataError, match=rf"whose white may mean {inside} or 255"):
        verify(open_segmentation(str(root)))


def test_verify__masks_of_one_bit_alone(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("bg\nfg\n")
    rewrite(root, lambda values: png(values == 1, 1))
    no_flag: tuple[str, ...] = ()
    for mask_values in (no_flag, ("0", "255")):  # both ways to state the object's value
        source = train_of(verify(open_segmentation(str(root), mask_values=mask_values)))
        truth = np.asarray(Image.open(root / source.identify_mask(0)))
        assert np.array_equal(source.sample(0)[1].numpy(), truth)


def palette_png(values: Any, colours: list[tuple[int, int, int]]) -> bytes:
    """Write class numbers as a palette picture in which number n has the colour n of `colours`."""
    picture = Image.fromarray(np.asarray(values, np.uint8)).convert("P")
    picture.putdata(np.asarray(values).ravel().tolist())
    picture.putpalette([channel for colour in colours for channel in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_verify__palettes_in_another_order_are_refused(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    black, red, green = (0, 0, 0), (128, 0, 0), (0, 128, 0)
    rewrite(root, lambda values: palette_png(values % 255, [black, red, green]))
    truth = shape(0)[1] % 255
    assert np.array_equal(train_of(verify(open_segmentation(str(root)))).sample(0)[1].numpy(), truth)
    swapped = np.array([1, 0, 2])[shape(3)[1] % 255]  # the same picture, as a program that saves small files writes it
    (root / "train/masks/3.png").write_bytes(palette_png(swapped, [red, black, green]))
    with pytest.raises(DataError, match="the palettes of the masks differ"):
        verify(open_segmentation(str(root)))
    (root / "classes.txt").write_text("ground 0 0 0\nred 128 0 0\ngreen 0 128 0\n")
    source = train_of(verify(open_segmentation(str(root))))
    index = next(n for n in range(12) if source.identify_mask(n) == "train/masks/3.png")
    assert np.array_equal(source.sample(index)[1].numpy(), shape(3)[1] % 255)


def test_verify__a_palette_of_grey_among_grey_masks_is_refused(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: palette_png(values // 2 % 127, [(0, 0, 0), (2, 2, 2)]), "masks/3.png")
    with pytest.raises(DataError, match="the palettes of the masks differ"):
        verify(open_segmentation(str(root)))


def test_verify__masks_saved_as_jpeg(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    for file in root.rglob("masks/*.png"):
        with Image.open(file) as picture:
            Image.fromarray(np.where(np.asarray(picture) == 1, 255, 0).astype(np.uint8)).save(file.with_suffix(".jpg"))
        file.unlink()
    assert "JPEG changes the values of a mask" in verify(open_segmentation(str(root))).hint


def test_verify__numbers_although_the_class_file_has_colours(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("ground 60 60 60\nred 220 40 40\ngreen 40 200 60\n")
    result = verify(open_segmentation(str(root)))
    assert result.problems == ()
    assert result.notes[0].startswith("The masks hold the numbers of the classes")
    truth = shape(0)[1].astype(int)
    assert np.array_equal(train_of(result).sample(0)[1].numpy(), np.where(truth == 255, -1, truth))


def test_verify__grey_masks_whose_colours_are_listed(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("bg 0 0 0\nfg 255 255 255\n")
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8))
    source = train_of(verify(open_segmentation(str(root))))
    assert np.array_equal(source.sample(0)[1].numpy(), np.asarray(Image.open(root / source.identify_mask(0))) == 255)


# ----------------------------------------------------------------------------------------------------- files of classes

ADE20K = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
)
CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n"


@pytest.mark.parametrize(
    ("text", "names", "colours", "values"),
    [
        (ADE20K, ("wall", "building, edifice"), None, (1, 2)),
        ("Idx,Ratio,Train,Val,Stuff,Name\n1,0.2,3,4,1,wall;x\n2,0.1,3,4,1,sky\n", ("wall;x", "sky"), None, (1, 2)),
        (CVAT, ("background", "road"), [[0, 0, 0], [128, 64, 128]], None),
        ("Pixel Value, Class\n0, background\n1, road\n", ("background", "road"), None, (0, 1)),
        ("name,r,g,b\nroad,128,64,128\nsky,1,2,3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("id,name,r,g,b\n0,road,128,64,128\n1,sky,1,2,3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("0 background\n255 road sign\n", ("background", "road sign"), None, (0, 255)),
        ("0: sky\n1: road\n", ("sky", "road"), None, (0, 1)),
        ("0 road 128 64 128\n1 sky 1 2 3\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("0 128 64 128 road\n1 1 2 3 sky\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("64 128 64\tAnimal\n192 0 128\tArchway\n", ("Animal", "Archway"), [[64, 128, 64], [192, 0, 128]], None),
        ("road #804080\nsky #010203\n", ("road", "sky"), [[128, 64, 128], [1, 2, 3]], None),
        ("# classes\nsky\nroad\n", ("sky", "road"), None, None),
        ("lane 1\nlane 2\n", ("lane 1", "lane 2"), None, None),
        ("0\n1\n", ("0", "1"), None, None),
        ("__ignore__\n_background_\ncat\n", ("_background_", "cat"), None, None),
        ("1 sky\nroad\n", ("1 sky", "road"), None, None),
    ],
)
def test_read_classes__forms(tmp_path: Path, text: str, names: Any, colours: Any, values: Any) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    found = read_classes(file)
    assert (found.names, found.values) == (names, values)
    assert (None if found.colours is None else found.colours.tolist()) == colours


def test_read_classes__json(tmp_path: Path) -> None:
    file = tmp_path / "id2label.json"
    for content, expected in (
        (["sky", "road"], ClassFile(("sky", "road"))),
        ({"1": "road", "0": "sky"}, ClassFile(("sky", "road"), None, (0, 1))),
        ({"road": 1, "sky": 0}, ClassFile(("sky", "road"), None, (0, 1))),
    ):
        file.write_text(json.dumps(content))
        assert read_classes(file) == expected
    for text in ("{", "[1]", '{"a": "b"}', "{}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="JSON"):
            read_classes(file)


def test_read_classes__refuses_other_files(tmp_path: Path) -> None:
    for name, text, reason in (
        ("data.yaml", "names: [a]", r"\.yaml is not read"),
        ("a.txt", "road 128 64 128 255\nsky 1 2 3 255", "has four numbers"),
        ("b.csv", "id,name\n0,sky\nx,road", "does not have the columns"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_classes(tmp_path / name)


def test_open__ade20k_with_its_own_file_of_classes(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").unlink()
    (root / "objectInfo150.txt").write_text(ADE20K + "3\t0.1\t1\t1\t1\tsky\n")
    assert find_class_file(root) == root / "objectInfo150.txt"
    rewrite(root, lambda values: png(np.where(values == 255, 0, values + 1), 8))
    result = verify(open_segmentation(str(root)))
    assert (result.problems, result.notes) == ((), ())
    assert result.splits.notes == (f"The classes are those of {root / 'objectInfo150.txt'}.",)
    truth = shape(0)[1].astype(int)
    assert np.array_equal(train_of(result).sample(0)[1].numpy(), np.where(truth == 255, -1, truth))


# ------------------------------------------------------------------------------------------------------- pairs of files

ENDINGS = [
    "_segmentation",
    "_gtFine_labelIds",
    "_L",
    "-mask",
    "_Mask",
    "_mask",
    "_seg",
    "_label",
    "_labels",
    "_gt",
    ".jpg",
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_open__masks_with_an_ending(tmp_path: Path, ending: str) -> None:
    root = write_shapes(tmp_path)
    for file in list(root.rglob("masks/*.png")):
        file.rename(file.with_name(f"{file.stem}{ending}.png"))
    splits = open_segmentation(str(root))
    assert (len(splits.train), len(splits.evaluation)) == (12, 4)
    source = cast("SegmentationSource", splits.train)
    assert all(
        source.identify_mask(n).removesuffix(".png").removesuffix(ending)[12:] == source.identify(n)[13:-4]
        for n in range(12)
    )


def test_open__cityscapes(tmp_path: Path) -> None:
    for split, numbers in (("train", range(4)), ("val", range(9, 11))):
        for number in numbers:
            picture, mask = shape(number)
            for kind, ending, array in (
                ("leftImg8bit", "leftImg8bit", picture),
                ("gtFine", "gtFine_labelIds", mask),
                ("gtFine", "gtFine_color", picture),
                ("gtFine", "gtFine_instanceIds", mask.astype(np.uint16)),
            ):
                folder = tmp_path / kind / split / "aachen"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"aachen_{number:06}_000019_{ending}.png")
            (folder / f"aachen_{number:06}_000019_gtFine_polygons.json").write_text("{}")
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert (len(train), len(splits.evaluation), splits.evaluation_name) == (4, 2, "validation")
    assert train.identify(2) == "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png"
    assert train.identify_mask(2) == "gtFine/train/aachen/aachen_000002_000019_gtFine_labelIds.png"
    assert train.left_out == {"masks of another kind": 12, "extension .json": 6}


def test_open__images_and_masks_in_one_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", range(6))
    for file in list((tmp_path / "train").rglob("*.*")):
        ending = "_mask" if file.parent.name == "masks" else ""
        file.rename(tmp_path / "train" / f"{file.stem}{ending}{file.suffix}")
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, red\n2, green\n")
    splits = open_segmentation(str(tmp_path))
    train = cast("SegmentationSource", splits.train)
    assert train.mask_classes.names == ("ground", "red", "green")
    assert (train.identify(0), train.identify_mask(0)) == ("train/0.jpg", "train/0_mask.png")
    assert len(train) + len(splits.evaluation) == 6


def test_open__train_and_train_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path, range(5))
    (tmp_path / "images").rename(tmp_path / "train")
    (tmp_path / "masks").rename(tmp_path / "train_masks")
    train = cast("SegmentationSource", open_segmentation(str(tmp_path), mask_values=("0-2",)).train)
    assert (train.identify(0), train.identify_mask(0)) == ("train/0.jpg", "train_masks/0.png")


def test_open__two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    file = root / "train/masks/3.png"
    (root / "train/masks/3_seg.png").write_bytes(file.read_bytes())
    file.rename(root / "train/masks/3_mask.png")
    with pytest.raises(DataError, match=r"train/images/3\.jpg has two masks"):
        open_segmentation(str(root))


def test_open__says_which_files_are_no_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path, range(3))
    for file in list((tmp_path / "masks").iterdir()):
        file.rename(file.with_suffix(".mat"))
    with pytest.raises(DataError, match=r"holds no masks.*\n?.*3 files \.mat"):
        open_segmentation(str(tmp_path))


def test_open__counts_what_is_left_out(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "train/masks/3.png").unlink()
    (root / "val/images/101.jpg").unlink()
    (root / "train/masks/notes.txt").write_text("x")
    Image.new("RGB", (4, 4)).save(root / "cover.png")
    splits = open_segmentation(str(root), skip_bad=True)
    assert cast("SegmentationSource", splits.train).left_out == {
        "images without a mask": 1,
        "masks without an image": 1,
        "pictures in no folder of images or masks": 1,
        "extension .txt": 1,
    }


def test_open__the_lists_of_pascal_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_pairs(root, range(8))
    (root / "images").rename(root / "JPEGImages")
    (root / "masks").rename(root / "SegmentationClass")
    for number in (6, 7):  # most images of VOC have no mask
        (root / "SegmentationClass" / f"{number}.png").unlink()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n4\n")
    (lists / "val.txt").write_text("1\n3\n")
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert [Path(train.identify(n)).stem for n in range(len(train))] == ["0", "2", "4"]
    assert (len(splits.evaluation), splits.evaluation_name) == (2, "validation")
    assert train.left_out == {"images that ImageSets does not list": 3}
    (root / "SegmentationClass" / "2.png").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/2\.jpg has no mask\nAdd"):
        open_segmentation(str(tmp_path))


def test_verify__masks_of_two_programs(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("bg\nfg\n")
    rewrite(root, lambda values: png(values == 1, 8))
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8), "masks/3.png")
    result = verify(open_segmentation(str(root)))
    assert any("15 masks hold 1 and never 255, and 1 hold 255" in note for note in result.notes)
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8), "val/masks/*.png")
    with pytest.raises(DataError, match="11 masks hold 1 and never 255, and 5 hold 255"):
        verify(open_segmentation(str(root)))


def test_verify__values_with_gaps_are_listed(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(values % 255 * 20, 8))
    result = verify(open_segmentation(str(root)))
    assert (
        result.hint == "The training masks hold the values 0, 20, 40; --mask-values states the value of each class.\n"
    )
    assert result.notes == ()
    assert not verify(open_segmentation(str(root), mask_values=("0", "20", "40"))).problems


def test_verify__a_class_that_is_called_void(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("ground\nred\nVoid\n")
    text = "The class 'Void' is learned and counts in the mean IoU: --ignore 255 'Void' leaves it out."
    assert verify(open_segmentation(str(root))).notes == (text,)
    assert verify(open_segmentation(str(root), ignore=("255", "Void"))).notes == ()
