"""Set-up shared by all tests: one thread, separate caches, no network, a folder of images, a pool of two processes."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from tests.distributed import TwoProcesses

# The same examples in every run, and no deadline, so that no test fails on a busy machine.
settings.register_profile("pecobook", deadline=None, derandomize=True)
settings.load_profile("pecobook")

_CACHE = pytest.StashKey[Path]()
# One thread, so that sums are taken in one order; `make test-portable` also runs with two.
_THREADS = os.environ.get("PECOBOOK_TEST_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment variables that libraries read when they are imported.

    GPUs are hidden unless the GPU tests are selected (`-m gpu`): all other tests pass on CPUs, where CI runs them.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cache = Path(tempfile.mkdtemp(prefix="pecobook-tests-"))
    config.stash[_CACHE] = cache
    os.environ.update(
        HF_HOME=str(cache / "hf"), HF_HUB_OFFLINE="1", PECOBOOK_CACHE=str(cache / "pecobook"), OMP_NUM_THREADS=_THREADS
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device, or -m gpu was not given"))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    import torch

    torch.set_num_threads(int(_THREADS))


@pytest.fixture(autouse=True, scope="session")
def _hangups() -> None:
    """Let tests receive a hang-up under `nohup make test` too, where runs leave it ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _quick_curves() -> Iterator[None]:
    """Write one dot as curves.png: a drawing takes longer than the small runs here; test_curves.py draws."""
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecobook.stages.training._draw_curves", lambda _: dot.getvalue())
        yield


@pytest.fixture(scope="session")
def two_processes() -> Iterator[TwoProcesses]:
    """`two_processes.run(function, *args)` calls `function(rank, 2, *args)` in two processes joined by gloo."""
    pool = TwoProcesses()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 images, 8 in each of 3 classes that differ in colour, 40 x 48 pixels. Do not write into it."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :48]
    for number, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir()
        for index in range(8):
            pixels = rng.integers(0, 60, (40, 48, 3)) + 10 * index
            pixels[..., 2 - number] += 80 + (40 * np.sin((rows + (index + 1) * columns) / 9)).astype(int)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def unlabelled_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `images` in one folder without class folders. Do not write into it."""
    folder = tmp_path_factory.mktemp("unlabelled_images")
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    return folder
