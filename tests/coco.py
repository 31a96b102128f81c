"""A small data set of images with objects in COCO's format: ellipses and rectangles, coloured by class.

Category ids have gaps and are not sorted; masks are polygons, run lengths or compressed run lengths; one image has no
object, another image has a crowd.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw

from pecobook.data.dense.detection import DetectionSource, open_detection

Content = dict[str, Any]

CATEGORIES = [{"id": 17, "name": "square $x_"}, {"id": 3, "name": "disc"}, {"id": 90, "name": "never"}]


def compressed(mask: Any) -> dict[str, Any]:
    """Return the run lengths of a mask (H, W) as COCO's text."""
    from pycocotools import mask as coco

    runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def uncompressed(mask: Any) -> dict[str, Any]:
    """Return the run lengths of a mask (H, W) as a list, zeros first, column by column."""
    flat = mask.astype(np.uint8).T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.r_[0, changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def write_coco(folder: Path, content: dict[str, Any]) -> Path:
    """Write instances.json into a folder; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


def read_coco(folder: Path) -> dict[str, Any]:
    """Read instances.json of a folder."""
    content: dict[str, Any] = json.loads((folder / "instances.json").read_text())
    return content


def make_split(folder: Path, count: int, *, seed: int, first_id: int = 100, masks: bool = True) -> dict[str, Any]:
    """Write `count` images of about 48 pixels with up to three objects each; the first has none, the second a crowd."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(count):
        width, height = (48, 40) if number % 2 else (40, 52)
        picture = Image.fromarray(rng.integers(0, 40, (height, width, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        image = {"id": first_id + 7 * number, "file_name": f"{seed}-{number}.png", "width": width, "height": height}
        for position in range(0 if number == 0 else 1 + number % 3):
            disc = bool((number + position) % 2)
            w, h = (int(side) for side in rng.integers(8, 15, 2))
            x, y = 2 + 12 * position, int(rng.integers(2, height - h - 2))
            w = min(w, 11)
            mask = Image.new("1", (width, height))
            corners = (x, y, x + w - 1, y + h - 1)
            for canvas, ink in ((draw, (230, 60, 50) if disc else (60, 90, 240)), (ImageDraw.Draw(mask), 1)):
                (canvas.ellipse if disc else canvas.rectangle)(corners, fill=ink)
            inside = np.array(mask)
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
            segmentation: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if disc:
                segmentation = compressed(inside) if number % 3 else uncompressed(inside)
            annotation: dict[str, Any] = {
                "id": len(objects) + 1,
                "image_id": image["id"],
                "category_id": 3 if disc else 17,
                "bbox": box,
                "area": int(inside.sum()),
                "iscrowd": int(number == 1 and position == 1),
            }
            objects.append({**annotation, "segmentation": segmentation} if masks else annotation)
        picture.save(folder / "images" / str(image["file_name"]))
        images.append(image)
    content = {"images": images, "annotations": objects, "categories": CATEGORIES}
    write_coco(folder, content)
    return content


def make_coco(root: Path, *, train: int = 10, val: int = 4, masks: bool = True) -> Path:
    """Write both splits; return `root`."""
    make_split(root / "train", train, seed=1, masks=masks)
    make_split(root / "val", val, seed=2, first_id=5, masks=masks)
    return root


def train_of(data: Path, **options: Any) -> DetectionSource:
    return cast("DetectionSource", open_detection(str(data), **options).train)


def notes_of(data: Path, **options: Any) -> tuple[str, ...]:
    return open_detection(str(data), **options).notes


def change(root: Path, edit: Callable[[Content], None], splits: tuple[str, ...] = ("train", "val")) -> None:
    for split in splits:
        content = read_coco(root / split)
        edit(content)
        write_coco(root / split, content)


def each(**functions: Callable[[Content], Any]) -> Callable[[Content], None]:
    """Return an edit that sets fields of every object."""

    def edit(content: Content) -> None:
        for entry in content["annotations"]:
            entry |= {name: function(entry) for name, function in functions.items()}

    return edit


def states(change_image: Callable[[Content], Any]) -> Callable[[Content], None]:
    """Return an edit of every image's entry."""

    def edit(content: Content) -> None:
        for image in content["images"]:
            change_image(image)

    return edit


def tensors(source: DetectionSource, index: int) -> list[torch.Tensor]:
    objects = source.objects(index)
    masks = objects.masks()
    assert masks is not None
    return [objects.boxes, objects.labels, masks]


def same_objects(found: DetectionSource, expected: DetectionSource) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(found.objects(n).boxes, expected.objects(n).boxes)
        and torch.equal(found.objects(n).labels, expected.objects(n).labels)
        and torch.equal(
            cast("torch.Tensor", found.objects(n).masks()), cast("torch.Tensor", expected.objects(n).masks())
        )
        for n in range(len(expected))
    )
