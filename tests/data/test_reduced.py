"""Large JPEG images are decoded at the size that a view needs."""

from __future__ import annotations

import io
import json
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.dense import views as dense_views
from pecobook.data.dense.views import segmentation_view
from pecobook.data.images import open_images
from pecobook.data.sampler import key
from pecobook.data.stream import Stream, read_all
from pecobook.data.views import NamedViews, center_crop, central_view, random_crop, shortest_side
from pecobook.settings.images import PhotometricConfig
from pecobook.utils.images import resize
from tests.coco import train_of
from tests.data.pictures import encode

PHOTO = Image.fromarray(data.astronaut()).crop((0, 0, 504, 400))


@pytest.fixture
def every_jpeg_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pecobook.data.decode.REDUCED_PIXELS", 1000)


def difference(one: Tensor, other: Tensor, size: int = 32) -> float:
    return float((resize(one, size, size).float() - resize(other, size, size).float()).abs().mean())


@pytest.mark.usefixtures("every_jpeg_is_large")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(
    ("shortest", "height"), [(0, 400), (201, 400), (200, 200), (101, 200), (100, 100), (50, 50), (1, 50)]
)
def test_decode__keeps_the_shorter_side(shortest: int, height: int, options: dict[str, Any]) -> None:
    file = encode(PHOTO, "JPEG", quality=95, **options)
    pixels = decode(file, shortest=shortest)
    assert pixels.shape == (3, height, height * 504 // 400)
    assert difference(pixels, decode(file)) < 3


@pytest.mark.usefixtures("every_jpeg_is_large")
def test_decode__turns_what_it_reduces() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L"):
        file = encode(PHOTO.convert(mode), "JPEG", exif=exif)
        assert decode(file, shortest=150).shape == (3, 252, 200)
        assert difference(decode(file, shortest=150), decode(file)) < 2


@pytest.mark.usefixtures("every_jpeg_is_large")
def test_decode__reads_other_formats_whole() -> None:
    for file in (encode(PHOTO, "PNG"), encode(PHOTO, "WEBP"), encode(PHOTO.convert("CMYK"), "JPEG")):
        assert torch.equal(decode(file, shortest=10), decode(file))


def test_decode__reads_images_of_usual_size_whole() -> None:
    file = encode(PHOTO, "JPEG")
    assert torch.equal(decode(file, shortest=10), decode(file))


def test_shortest_side__of_every_view() -> None:
    named = NamedViews(seed=0, image_size=64, tokenizer_size=32, min_crop=0.12, colour=PhotometricConfig())
    expected = math.ceil(2 * 64 / math.sqrt(0.75 * 0.12))
    assert shortest_side(named.train) == shortest_side(named.evaluation) == expected
    assert shortest_side(partial(random_crop, size=64, min_area=0.12)) == expected
    assert shortest_side(partial(central_view, size=224, share=0.875)) == 1024
    detection = partial(dense_views.detection_view, scales=(400, 800), max_size=1333, jitter=(), canvas=0)
    assert shortest_side(detection) == 1600
    assert shortest_side(partial(detection, jitter=(0.1, 2.0), canvas=1024)) == 4096
    assert shortest_side(partial(dense_views.detection_test_view, short=800, long=1333)) == 3200
    assert (
        shortest_side(partial(segmentation_view, size=64)) == shortest_side(lambda image, _key: {"image": image}) == 0
    )


@pytest.mark.usefixtures("every_jpeg_is_large")
def test_stream__reads_what_its_view_needs(tmp_path: Path) -> None:
    for number in range(4):
        PHOTO.crop((number, 0, 480 + number, 400)).save(tmp_path / f"{number}.jpg", quality=95)
    source = open_images(str(tmp_path)).train
    stream = pickle.loads(pickle.dumps(Stream(source, partial(_view, size=16, min_area=0.2), seed=0)))
    sizes = set()
    for index in range(len(source)):
        (sample,) = stream.views(index, [3])
        whole = _view(source.read(index), key(0, index, 3), size=16, min_area=0.2)
        assert float((sample["image"].float() - whole["image"].float()).abs().mean()) < 3
        sizes.add(tuple(sample["size"].tolist()))
    assert sizes == {(100, 120)}  # at least 2 * 16 / sqrt(0.75 * 0.2) = 82.6
    images, _, _ = read_all(source, 16)
    whole_images = torch.stack([center_crop(source.read(index), 16) for index in range(len(source))])
    assert float((images.float() - whole_images.float()).abs().mean()) < 2


@pytest.mark.usefixtures("every_jpeg_is_large")
def test_stream__of_detection_reduces_the_image_alone(tmp_path: Path) -> None:
    square = {"segmentation": [[100, 100, 200, 100, 200, 150, 100, 150]], "bbox": [100, 100, 100, 50]}
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(2):
        PHOTO.save(tmp_path / f"{number}.jpg", quality=95)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 400, "width": 504})
        content["annotations"].append({"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, **square})
    (tmp_path / "instances.json").write_text(json.dumps(content))
    source = train_of(tmp_path)
    for function in (
        partial(dense_views.detection_view, scales=(64,), max_size=100, jitter=(), canvas=0),
        partial(dense_views.detection_test_view, short=40, long=100),
    ):
        stream = Stream(source, function, 0)
        (view,) = stream.views(0, [3])
        whole = function(*source.sample(0), key(0, 0, 3))
        assert source.sample(0, stream.shortest)[0].shape == (3, 200, 252)
        assert difference(view.pop("images")[0], whole.pop("images")[0]) < 2
        assert view.keys() == whole.keys()
        assert all(torch.equal(view[name][0], whole[name][0]) for name in view)
    source.annotations.sizes[:] = 200, 252  # the size of the reduced image is not that of its file
    with pytest.raises(BadImage, match="400"):
        source.sample(0, stream.shortest)


def _view(image: Tensor, view_key: int, *, size: int, min_area: float) -> dict[str, Tensor]:
    return {"image": random_crop(image, size, view_key, min_area=min_area), "size": torch.tensor(image.shape[1:])}


def test_decode__takes_little_memory_for_a_large_photograph() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((3000, 4000, 3), np.uint8)).save(buffer, "JPEG")
    assert decode(buffer.getvalue(), shortest=300).shape == (3, 375, 500)
