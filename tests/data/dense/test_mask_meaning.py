"""What the values of all masks of a data set mean: the right classes, a note, or a refusal by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.errors import DataError
from tests.data.dense.masks import png, rewrite, train_of
from tests.shapes import shape, write_shapes


def test_verify__two_named_classes_and_masks_of_0_and_255(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("bg\nfg\n")
    rewrite(root, lambda values: png(np.where(values == 1, 255, 0), 8))
    result = verify(open_segmentation(str(root)))
    assert result.notes == ("The masks hold only 0 and 255: 255 is read as 'fg', and no pixel is ignored.",)
    source = train_of(result)
    truth = np.asarray(Image.open(root / str(source.identify_mask(0)))) == 255
    assert np.array_equal(source.sample(0)[1].numpy(), truth)
    assert source.counts is not None
    assert source.counts.classes["fg"] == sum((shape(number)[1] == 1).sum() for number in range(12))
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
    (root / "classes.txt").write_text("tree\n")
    fault = verify(open_segmentation(str(root))).fault
    assert fault.endswith(
        "Give the file of classes a line for each class, in the order of their values: 'background' is one, too."
    )


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
    assert result.num_problems == 16
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


@pytest.mark.parametrize("last", [40, 255])
def test_verify__values_with_gaps_are_listed(last: int, tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    rewrite(root, lambda values: png(np.choose(values % 255, [0, 20, last]), 8))
    result = verify(open_segmentation(str(root)))
    assert result.hint == f"If the values are the 3 classes in order, give --mask-values 0 20 {last}.\n"
    assert result.notes == () or last == 255
    assert not verify(open_segmentation(str(root), mask_values=("0", "20", str(last)))).problems
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    assert verify(open_segmentation(str(root))).hint.startswith("The training masks hold the values 0, 20")


def test_verify__a_class_that_is_called_void(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "classes.txt").write_text("ground\nred\nVoid\n")
    text = "The class 'Void' is learned and counts in the mean IoU: --ignore 255 'Void' leaves it out."
    assert verify(open_segmentation(str(root))).notes == (text,)
    assert verify(open_segmentation(str(root), ignore=("255", "Void"))).notes == ()


def test_verify__masks_of_another_size_get_no_hint_on_values_and_jpeg_is_named(tmp_path: Path) -> None:
    halves = Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 16, axis=1).repeat(16, axis=0))
    for name, mask in ((f"{number}", halves.resize((16, 32)) if number < 4 else halves) for number in range(6)):
        for folder, picture in (("images", Image.new("RGB", (32, 16))), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{name}.jpg", quality=100)
    result = verify(open_segmentation(str(tmp_path)))
    assert result.num_problems == 4
    assert result.hint == ""
    assert "masks/4.jpg' is a JPEG, which changes the values of pixels at edges: save masks as PNG." in result.notes[-1]
