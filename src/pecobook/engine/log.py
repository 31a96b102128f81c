"""Logs of a run: metrics.jsonl, train.log, TensorBoard and other loggers, and progress on the screen.

Only rank 0 writes. A resumed run first drops the lines logged after the checkpoint, so no step is logged twice.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pecobook.errors import ConfigError, printable
from pecobook.settings.tracking import TrackingConfig
from pecobook.utils.files import write_atomically
from pecobook.utils.json_files import evaluation_of, metric_lines
from pecobook.utils.printer import doing, print_above, show, write_notes_to


class Sink:
    """A logger that records metrics and pictures; by default it does nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` of `step`."""

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Record a picture, which is also in samples/."""

    def flush(self) -> None:
        """Write what was recorded to disk, before a checkpoint from which the run resumes after it."""

    def close(self) -> None:
        """Flush and close the logger."""


class JsonLines(Sink):
    """Write metrics.jsonl: one JSON object per logged step."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.last = _drop_after(path, start_step)
        path.touch()
        self._file = path.open("r+b")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line, or add new metrics to the step's line; metrics already in the line keep their value."""
        # JSON has no infinity: values that are not finite (a gradient under fp16) become null.
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        logged = self.last if self.last.get("step") == step else {}
        added = {name: value for name, value in {"step": step, **values}.items() if name not in logged}
        if not added:
            return
        # One write over the brace that closes the line: a crash cannot damage the text before the brace.
        self._file.seek(-len("}\n") if logged else 0, os.SEEK_END)
        self._file.write(((", " if logged else "{") + json.dumps(added)[1:] + "\n").encode())
        self._file.flush()
        self.last = {**logged, **added}

    def flush(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_after(path: Path, step: int) -> dict[str, Any]:
    """Remove lines of steps after `step` and lines cut off by a crash; return the last remaining line or {}."""
    if not path.exists():
        return {}
    kept = [(line, metrics) for line, metrics in metric_lines(path) if metrics["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line, _ in kept).encode())
    return kept[-1][1] if kept else {}


class TensorBoard(Sink):
    """Write TensorBoard events into the run folder.

    Args:
        folder: the run folder.
        start_step: step of the checkpoint that the run resumes from. TensorBoard drops the events from this step on.
        last: the last line of metrics.jsonl. If it belongs to `start_step`, it is recorded again: a killed run may have
            lost its events, or may repeat this step's evaluation.
    """

    def __init__(self, folder: Path, *, start_step: int, last: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = _hide_writer_errors
        self._writer = SummaryWriter(str(folder), purge_step=start_step)
        if start_step > 0 and last.get("step") == start_step:
            self.log({name: value for name, value in last.items() if name != "step" and value is not None}, start_step)
            picture = folder / "samples" / f"step-{start_step:08d}.png"
            if evaluation_of(last) and picture.is_file():
                self.picture("samples", picture.read_bytes(), start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Record an image."""
        import numpy as np

        self._writer.add_image(name, np.asarray(_decode(png).convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Flush the events to disk."""
        self._writer.flush()
        with max(self._folder.glob("events.out.tfevents.*")).open("rb") as file:  # the newest, by its name
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _hide_writer_errors(arguments: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, except that of TensorBoard's writer: its next call raises the error again."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


class WeightsAndBiases(Sink):
    """Log to a Weights & Biases run."""

    def __init__(self, folder: Path, config: dict[str, Any], tracking: TrackingConfig = TrackingConfig()) -> None:
        import wandb

        # The id follows from the folder, so that a resumed run continues its chart.
        self._wandb = wandb
        self._run = wandb.init(
            project=tracking.project,
            entity=tracking.entity or None,
            group=tracking.group or None,
            tags=tracking.tags or None,
            mode="offline" if tracking.offline else None,
            dir=folder,
            name=folder.name,
            id=_run_id(folder),
            resume="allow",
            config=config,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars."""
        self._run.log(dict(metrics), step=step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Record an image."""
        self._run.log({name: self._wandb.Image(_decode(png))}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow(Sink):
    """Log to an MLflow run, on the server of MLFLOW_TRACKING_URI, or offline to the folder `mlruns` of the run."""

    def __init__(self, folder: Path, config: dict[str, Any], tracking: TrackingConfig = TrackingConfig()) -> None:
        import mlflow

        self._mlflow = mlflow
        if tracking.offline:
            mlflow.set_tracking_uri((folder.resolve() / "mlruns").as_uri())
        mlflow.set_experiment(tracking.project)
        earlier = mlflow.search_runs(filter_string=f"tags.pecobook_run = '{_run_id(folder)}'", output_format="list")
        mlflow.start_run(run_id=earlier[0].info.run_id if earlier else None, run_name=folder.name)
        if not earlier:
            mlflow.set_tag("pecobook_run", _run_id(folder))
            tags = dict.fromkeys(tracking.tags, "") | ({"group": tracking.group} if tracking.group else {})
            for name, value in tags.items():
                mlflow.set_tag(name, value)
            mlflow.log_dict(config, "config.json")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record scalars."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Record an image."""
        self._mlflow.log_image(_decode(png), f"{name}/{step:08d}.png")

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def _decode(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _run_id(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def resolve_loggers(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return loggers with `auto` resolved. Raises ConfigError for a named logger that is not installed."""
    if "auto" in names:
        found = ("tensorboard",) if find_spec("tensorboard") else ()
        names = tuple(dict.fromkeys([*found, *(name for name in names if name != "auto")]))
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--loggers {name}: the package is not installed: pip install 'pecobook[{name}]'.")
    return names


def open_sinks(
    names: tuple[str, ...],
    folder: Path,
    config: dict[str, Any],
    *,
    start_step: int,
    tracking: TrackingConfig = TrackingConfig(),
) -> list[Sink]:
    """Return the loggers in `names`, followed by the writer of metrics.jsonl."""
    lines, sinks = JsonLines(folder / "metrics.jsonl", start_step=start_step), list[Sink]()
    if "tensorboard" in names:
        sinks.append(TensorBoard(folder, start_step=start_step, last=lines.last))
    if "wandb" in names:
        sinks.append(WeightsAndBiases(folder, config, tracking))
    if "mlflow" in names:
        sinks.append(MLflow(folder, config, tracking))
    return [*sinks, lines]


def flush(sinks: Sequence[Sink]) -> None:
    """Flush all loggers."""
    for sink in sinks:
        sink.flush()


def open_text_log(folder: Path) -> logging.Logger:
    """Return the logger that writes train.log; `Progress` writes to the screen."""
    logger = logging.getLogger(f"pecobook.{folder.resolve()}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    close_text_log(logger)
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(_Printable("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    write_notes_to(logger.info)
    return logger


def close_text_log(logger: logging.Logger) -> None:
    """Close the files of a logger."""
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)


class _Printable(logging.Formatter):
    """Escapes control characters, so that no file name can alter a terminal that shows the log."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


class Progress:
    """Show progress on standard error: a live bar in a terminal, plain lines elsewhere, nothing when `quiet`."""

    def __init__(self, *, total: int, start: int, name: str, quiet: bool, unit: str = "images") -> None:
        self.total, self.name, self.quiet = total, name, quiet
        self._unit = "img" if unit == "images" else unit
        self._start, self._last_line, self._status = start, 0.0, ""
        self._first: tuple[int, float] | None = None  # the first step that was shown, and the time then
        self._bar: Any = None
        doing("")
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
            from rich.table import Column
            from rich.text import Text

            class Status(ProgressColumn):
                """The figures of the last step; a narrow terminal shows the first ones."""

                def render(self, task: Any) -> Text:
                    return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")

            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("elapsed"),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", markup=False),
                Status(table_column=Column()),
                console=Console(stderr=True),
            )
            self._bar.start()
            # A name may contain "[/b]", which is not markup.
            print_above(partial(self._bar.console.print, highlight=False, markup=False))
            self._task = self._bar.add_task(name, total=total, completed=start, left="", status="")

    def show(self, step: int, metrics: Mapping[str, float], *, now: bool = False) -> None:
        """Show that `step` steps are done; without a terminal at most every five seconds, unless `now` is set.

        The remaining time is estimated from the steps after the first one, which is slower than all others.
        """
        if self.quiet:
            return
        tflops = metrics.get("tflops", 0.0)
        parts = [
            f"loss {metrics['loss']:.4f}" if "loss" in metrics else "",
            f"{metrics['images_per_second']:.0f} {self._unit}/s" if "images_per_second" in metrics else "",
            f"data wait {100 * metrics['data_wait']:.0f}%" if "data_wait" in metrics else "",
            f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s" if tflops else "",
            f"MFU {100 * metrics['mfu']:.0f}%" if "mfu" in metrics else "",
            f"{metrics['gpu_memory']:.1f} GB" if "gpu_memory" in metrics else "",
        ]
        shown = (("knn", "k-NN {:.1f}%"), ("linear", "linear {:.1f}%"), ("rank", "rank {:.1f}"))
        parts += [text.format(metrics[f"probe/{name}"]) for name, text in shown if f"probe/{name}" in metrics]
        self._status = "  ".join(part for part in parts if part)
        self._draw(step, wait=0 if now else 5)

    def tick(self, step: int) -> None:
        """Show that a step without new metrics is done; without a terminal at most every half minute."""
        if not self.quiet:
            self._draw(step, wait=30)

    def _draw(self, step: int, *, wait: float) -> None:
        time_now = time.monotonic()
        if self._first is None and step > self._start:
            self._first = step, time_now
        left = ""
        if self._first is not None and step > self._first[0]:
            seconds = (time_now - self._first[1]) / (step - self._first[0]) * (self.total - step)
            left = f"left {compact_duration(seconds)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=left, status=self._status)
        elif time_now - self._last_line > wait or step == self.total:
            self._last_line = time_now
            show("  ".join(part for part in (f"{self.name} {step}/{self.total}", self._status, left) if part))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar and leave it on the screen."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.stop()
            print_above(None)


def compact_duration(seconds: float) -> str:
    """Format seconds in the two largest units: 45s, 3m20s, 5h02m, 3d04h."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    if rounded < 86400:
        return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"
    return f"{rounded // 86400}d{rounded % 86400 // 3600:02d}h"
