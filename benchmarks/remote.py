"""Reading of tar shards from another machine: the order of all images, and windows of neighbours, in one run.

    python -m benchmarks.remote --data imagenet.parquet --latency 20

The images are packed into shards, which a web server of this machine serves after a pause of --latency milliseconds for
each request. The cache holds a quarter of them. Each row reads one epoch after the index was made, with an empty cache;
"local" reads the same shards as files.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from pecobook.data import remote, remote_cache
from pecobook.data.images import open_images
from pecobook.data.sampler import BatchPositions
from pecobook.data.source import ImageSource
from pecobook.data.stream import Stream, load
from pecobook.settings.codebook import CodebookConfig
from pecobook.stages.codebook import CodebookStage


class Ranges(BaseHTTPRequestHandler):
    """Serves ranges of the files of a folder."""

    root: Path
    latency: float
    served: list[int]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str((self.root / self.path[1:]).stat().st_size))
        self.end_headers()

    def do_GET(self) -> None:
        time.sleep(self.latency)
        first, last = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
        with (self.root / self.path[1:]).open("rb") as file:
            data = os.pread(file.fileno(), last + 1 - first, first)
        self.served.append(len(data))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def pack(source: ImageSource, folder: Path, count: int, per_shard: int) -> None:
    """Write the bytes of images into shards; repeat them where there are fewer than `count`."""
    for number, start in enumerate(range(0, count, per_shard)):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w") as tar:
            for index in range(start, min(start + per_shard, count)):
                data = source.content(index % len(source))
                info = tarfile.TarInfo(f"{index:08d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_epoch(source: str, window: int, workers: int) -> tuple[float, int]:
    """Return the images a second of an epoch, with the start of the processes, and the number of images."""
    train = open_images(source).train
    for block in remote_cache.cache_folder().glob("*/*"):
        block.unlink()
    stream = Stream(train, CodebookStage.view(CodebookConfig(image_size=224)), 0, window=window)
    steps = len(train) // 64
    positions = BatchPositions(start_step=0, stop_step=steps, batch_size=64, micro_batch_size=64, rank=0, world_size=1)
    began = time.perf_counter()
    count = sum(len(batch["image"]) for batch in load(stream, positions, workers=workers))
    return count / (time.perf_counter() - began), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--per-shard", type=int, default=500)
    parser.add_argument("--window", type=int, default=640)
    parser.add_argument("--latency", type=float, default=20.0, help="milliseconds")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    remote.BLOCK = 2**19  # as many blocks as a larger set has
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "served"
        root.mkdir()
        pack(open_images(arguments.data).train, root, arguments.count, arguments.per_shard)
        size = sum(file.stat().st_size for file in root.iterdir())
        os.environ["PECOBOOK_CACHE"] = str(Path(folder) / "cache")
        os.environ[remote_cache.LIMIT_VARIABLE] = f"{size / 4e9:.6f}"
        served: list[int] = []
        values = {"root": root, "latency": arguments.latency / 1000, "served": served}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Ranges,), values))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        last = -(-arguments.count // arguments.per_shard) - 1
        pattern = f"train-{{00000..{last:05d}}}.tar"
        url = f"http://127.0.0.1:{server.server_port}/{pattern}"
        open_images(url)  # makes the index
        print(f"{arguments.count} images, {size / 1e6:.0f} MB, {arguments.latency:g} ms a request\n")
        print("| order | images/s | requests | read, share of the data |\n|---|---|---|---|")
        for name, source, window in (
            ("local, all images", str(root / pattern), 0),
            ("remote, all images", url, 0),
            (f"remote, windows of {arguments.window}", url, arguments.window),
        ):
            served.clear()
            speed, _ = read_epoch(source, window, arguments.workers)
            print(f"| {name} | {speed:.0f} | {len(served)} | {sum(served) / size:.2f} |")


if __name__ == "__main__":
    main()
