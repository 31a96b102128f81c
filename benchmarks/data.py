"""Reading of training samples: pecobook beside torchvision's tensor path, ImageFolder and timm, in one run.

    python -m benchmarks.data --data imagenet.parquet                    # one process, time of the processor
    python -m benchmarks.data --data imagenet.parquet --workers 2        # whole loaders as well, images a second

The images of --data are written as JPEGs of two kinds: short side 256 (about 30 KB each) and 512 (about 120 KB). Every
row reads the same files in the same order, and takes a random crop of 20 to 100% of the area to 224 pixels (bicubic,
antialiased) and a flip. The rows take turns, a few images at a time, so that other work on the machine slows all of
them alike; a ratio is the median over these turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from pecobook.data.images import open_images
from pecobook.data.masking import make_mask
from pecobook.data.sampler import BatchPositions, key, permute
from pecobook.data.source import ImageSource
from pecobook.data.stream import Stream, load
from pecobook.data.views import NamedViews
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.pretrain import PretrainConfig
from pecobook.stages.codebook import CodebookStage

SIZE, MIN_AREA = 224, 0.2
KINDS = {"short side 256": (256, 90), "short side 512": (512, 96)}
"""Kind of file -> short side in pixels, quality of the JPEG."""
BASE = "torchvision: decode_image, v2"
Sample = Callable[[int], Any]


def write_images(source: ImageSource, folder: Path, count: int, side: int, quality: int) -> int:
    """Write images as JPEGs; return their mean size in bytes."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    sizes = []
    for index in range(min(count, len(source))):
        image = Image.fromarray(source.read(index).permute(1, 2, 0).numpy())
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        file = folder / "images" / f"{index:05d}.jpg"
        image.save(file, "JPEG", quality=quality)
        sizes.append(file.stat().st_size)
    return sum(sizes) // len(sizes)


def tensor_transform() -> Any:
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(MIN_AREA, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )


class TensorFolder(torch.utils.data.Dataset[Tensor]):
    """torchvision's fastest path: files to tensors without Pillow."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.transform = [str(file) for file in files], tensor_transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from torchvision.io import ImageReadMode, decode_image, read_file

        view: Tensor = self.transform(decode_image(read_file(self.files[index]), ImageReadMode.RGB))
        return view


def image_folder(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder

    return ImageFolder(folder, v2.Compose([tensor_transform(), v2.PILToTensor()]))


def timm_folder(folder: Path) -> Any:
    from timm.data import create_transform
    from timm.data.dataset_factory import create_dataset

    transform = create_transform(SIZE, is_training=True, scale=(MIN_AREA, 1), color_jitter=0, interpolation="bicubic")
    dataset = create_dataset("", root=str(folder))
    dataset.transform = transform
    return dataset


def streams(folder: Path) -> dict[str, Stream]:
    """Return pecobook's streams: crops alone, and the samples of pre-training with masks and random colours."""
    source = open_images(str(folder)).train
    config = PretrainConfig(image_size=SIZE, min_crop=MIN_AREA)
    crop = CodebookStage.view(CodebookConfig(image_size=SIZE, min_crop=MIN_AREA))

    def mask(image: int, epoch: int) -> dict[str, Tensor]:
        return {"mask": make_mask(key(0, image, epoch), (SIZE // 16, SIZE // 16), config.mask)}

    return {
        "pecobook: crop": Stream(source, crop, 0),
        "pecobook: crop, mask, colours": Stream(source, NamedViews.of(config).train, 0, companion=mask),
    }


def datasets(folder: Path) -> dict[str, Any]:
    """Return every row's samples by position; all of them read the same image at the same position."""
    ours = streams(folder)
    source = next(iter(ours.values())).source
    files = [Path(str(source.file(index))) for index in range(len(source))]
    number = {str(file): place for place, file in enumerate(sorted((folder / "images").iterdir()))}
    whole = [number[str(file)] for file in files]  # in the data sets that hold the held-out images too
    order = [permute(place, len(source), key(0, 0)) for place in range(len(source))]
    theirs = {
        BASE: torch.utils.data.Subset(TensorFolder(files), order),
        "torchvision: ImageFolder, v2": torch.utils.data.Subset(image_folder(folder), [whole[i] for i in order]),
        "timm: ImageDataset": torch.utils.data.Subset(timm_folder(folder), [whole[i] for i in order]),
    }
    return {BASE: theirs.pop(BASE), **ours, **theirs}


def take_turns(rows: dict[str, Any], *, turns: int, images: int) -> dict[str, list[float]]:
    """Return for each row the seconds of the processor an image, of every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    count = len(rows[BASE])
    for turn in range(-1, turns):
        names = list(rows)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for name in names if turn % 2 else reversed(names):
            dataset, first = rows[name], turn * images
            began = time.thread_time()
            for place in range(first, first + images):
                dataset[place % count]
            if turn >= 0:  # the first turn loads libraries
                seconds[name].append((time.thread_time() - began) / images)
    return seconds


def loaders(folder: Path, workers: int, batch_size: int) -> Iterator[tuple[str, Any]]:
    """Yield each row's loader; all read the images once or more."""
    for name, dataset in datasets(folder).items():
        if isinstance(dataset, Stream):
            steps = len(dataset) // batch_size
            sizes = {"batch_size": batch_size, "micro_batch_size": batch_size}
            positions = BatchPositions(start_step=0, stop_step=steps, rank=0, world_size=1, **sizes)
            yield name, load(dataset, positions, workers=workers)
        else:
            yield name, iter(torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, drop_last=True))


def images_per_second(loader: Iterator[Any], batch_size: int) -> float:
    """Return the speed of a loader after its first batch, which includes the start of its processes."""
    next(loader)
    began, batches = time.perf_counter(), 0
    for _ in loader:
        batches += 1
    return batches * batch_size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos", help="any source of images")
    parser.add_argument("--count", type=int, default=512, help="number of files of each kind")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--images", type=int, default=10, help="images a turn")
    parser.add_argument("--workers", type=int, default=0, help="measure whole loaders too, with so many processes")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_images(arguments.data).train
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, (side, quality)) in enumerate(KINDS.items()):
            root = Path(folder) / str(number)
            size = write_images(source, root, arguments.count, side, quality)
            rows = datasets(root)
            seconds = take_turns(rows, turns=arguments.turns, images=arguments.images)
            speed: dict[str, float] = {}
            if arguments.workers:
                batch = arguments.batch_size
                speed = {name: images_per_second(it, batch) for name, it in loaders(root, arguments.workers, batch)}
            print(f"\n{kind}, {size / 1000:.0f} KB a file, {arguments.turns} turns of {arguments.images} images\n")
            print(f"| row | ms an image | ratio | quartiles |{' images/s |' if speed else ''}")
            print(f"|---|---|---|---|{'---|' if speed else ''}")
            for name, values in seconds.items():
                ratios = [own / base for own, base in zip(values, seconds[BASE], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                figures = f"{1000 * statistics.median(values):.2f} | {middle:.2f} | {low:.2f} to {high:.2f}"
                print(f"| {name} | {figures} |{f' {speed[name]:.0f} |' if speed else ''}")


if __name__ == "__main__":
    main()
