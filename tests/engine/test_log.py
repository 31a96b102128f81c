from __future__ import annotations

import io
import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pecobook.engine.log import (
    JsonLines,
    MLflow,
    TensorBoard,
    WeightsAndBiases,
    open_sinks,
    open_text_log,
    resolve_loggers,
)
from pecobook.errors import ConfigError
from pecobook.settings.tracking import TrackingConfig


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- JSON lines


def test_json_lines__logs_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, start_step=0)
    for step in range(1, 8):
        first.log({"loss": float(step)}, step)
    first.close()
    resumed = JsonLines(path, start_step=5)
    for step in (6, 7, 8):
        resumed.log({"loss": 10.0 * step}, step)
    resumed.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in read(path)] == [1, 2, 3, 4, 5, 60, 70, 80]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_json_lines__adds_later_metrics_of_a_step_to_its_line_also_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, start_step=0)
    first.log({"loss": 1.0}, 1)
    first.log({"loss": 2.0}, 2)
    first.log({"accuracy": 3.0}, 2)
    first.close()
    resumed = JsonLines(path, start_step=2)
    resumed.log({"accuracy": 9.0, "iou": 4.0}, 2)
    resumed.log({"accuracy": 9.0}, 2)
    resumed.log({"loss": 5.0}, 3)
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "accuracy": 3.0, "iou": 4.0},
        {"step": 3, "loss": 5.0},
    ]


@pytest.mark.parametrize("after", [b"", b'{"step": 3, "loss": 5.0}\n'], ids=["nothing", "a line"])
@pytest.mark.parametrize("cut", [1, 2, 9, 21, 26, 27, 28, 29])
def test_json_lines__a_line_cut_off_within_its_evaluation_keeps_the_rest(
    tmp_path: Path, cut: int, after: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, start_step=0)
    first.log({"loss": 2.0}, 2)
    first.log({"evaluation/accuracy": 3.0}, 2)
    first.close()
    path.write_bytes(path.read_bytes()[:-cut] + after)
    whole = {"step": 2, "loss": 2.0} | ({"evaluation/accuracy": 3.0} if cut == 1 else {})
    assert JsonLines(path, start_step=2).last == whole
    assert read(path) == [whole]


def test_json_lines__drops_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n[3]\n{"loss": 1}\n\xff\xfe\n\x00\x00\n{"step": 2, "lo')
    JsonLines(path, start_step=9).close()
    assert read(path) == [{"step": 1, "loss": 2.0}]


def test_json_lines__writes_each_line_at_once_and_as_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    sink = JsonLines(tmp_path / "metrics.jsonl", start_step=0)
    sink.log({"grad_norm": math.inf, "loss": 1.5}, 3)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 3, "grad_norm": None, "loss": 1.5}
    sink.close()


# ------------------------------------------------------------------------------------------------------ other loggers


def test_tensor_board__writes_readable_events_and_a_resume_purges_later_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, start_step=0, last={})
    for step in (1, 2, 3):
        first.log({"loss": float(step), "psnr": 20.0}, step)
    first.picture("samples", png(), 3)
    first.close()
    resumed = TensorBoard(tmp_path, start_step=1, last={"step": 1, "loss": 1.0, "psnr": 20.0, "bad": None})
    resumed.log({"loss": 20.0}, 2)
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "psnr"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]
    assert [event.step for event in events.Scalars("psnr")] == [1]
    assert events.Images("samples") == []


def test_tensor_board__a_killed_run_has_the_events_of_its_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of metrics.jsonl decide: an evaluation that is not there is repeated, and one that is there is kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Readers sort files by name, which ends with a number of this process: one of two digits would come too early.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000002.png").write_bytes(png())
    killed = TensorBoard(tmp_path, start_step=0, last={})
    for step in (1, 2):
        killed.log({"loss": float(step)}, step)
    killed.flush()
    killed.log({"evaluation/psnr": 20.0}, 2)  # lost with the process
    whole = {"step": 2, "loss": 2.0, "evaluation/psnr": 20.0}
    for last in ({"step": 2, "loss": 2.0}, whole, whole):
        resumed = TensorBoard(tmp_path, start_step=2, last=last)
        if last != whole:
            resumed.log({"evaluation/psnr": 20.0}, 2)
        resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("evaluation/psnr")] == [2]
    assert [event.step for event in events.Images("samples")] == [2]


def test_tensor_board__starts_again_for_a_run_killed_before_its_first_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        sink = TensorBoard(tmp_path, start_step=0, last={})
        sink.log({"loss": value}, 1)
        sink.close()
        time.sleep(1)  # TensorBoard orders files by the second of their names
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]


class Recorder(types.ModuleType):
    """A module or run that accepts any call and records it."""

    def __init__(
        self, name: str, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], results: Any = None
    ) -> None:
        super().__init__(name)
        self._calls, self._results = calls, results or {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, args, kwargs))
            return self._results.get(name)

        return call


def test_weights_and_biases__uses_one_run_for_a_folder_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    run = Recorder("run", calls)
    monkeypatch.setitem(sys.modules, "wandb", Recorder("wandb", calls, {"init": run, "Image": "an image"}))
    ids = []
    for _ in range(2):
        sink = WeightsAndBiases(tmp_path, {"seed": 3})
        sink.log({"loss": 1.0}, 7)
        sink.picture("samples", png(), 7)
        sink.close()
        assert [name for name, _, _ in calls] == ["init", "log", "Image", "log", "finish"]
        assert calls[0][2]["resume"] == "allow"
        assert calls[0][2]["config"] == {"seed": 3}
        assert calls[1][1:] == (({"loss": 1.0},), {"step": 7})
        assert calls[3][1:] == (({"samples": "an image"},), {"step": 7})
        ids.append(calls[0][2]["id"])
        calls.clear()
    assert ids[0] == ids[1]
    WeightsAndBiases(tmp_path / "other", {})
    assert calls[0][2]["id"] != ids[0]


@pytest.mark.parametrize("exists", [True, False])
def test_mlflow__continues_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    earlier = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    fake = Recorder("mlflow", calls, {"search_runs": [earlier] if exists else []})
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    sink = MLflow(tmp_path, {"seed": 3})
    sink.log({"loss": 1.0}, 7)
    sink.picture("samples", png(), 7)
    sink.close()
    by_name = {name: (args, kwargs) for name, args, kwargs in calls}
    assert by_name["start_run"][1]["run_id"] == ("abc" if exists else None)
    assert ("set_tag" in by_name) is not exists
    assert by_name["log_metrics"] == (({"loss": 1.0},), {"step": 7})
    assert by_name["log_image"][0][1] == "samples/00000007.png"
    assert calls[-1][0] == "end_run"


TRACKING = TrackingConfig(project="eyes", entity="lab", group="rates", tags=("a", "b"), offline=True)


@pytest.mark.parametrize("tracking", [TrackingConfig(), TRACKING])
def test_tracking__goes_to_weights_and_biases_and_to_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: TrackingConfig
) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setitem(sys.modules, "wandb", Recorder("wandb", calls, {"init": Recorder("run", calls)}))
    monkeypatch.setitem(sys.modules, "mlflow", Recorder("mlflow", calls, {"search_runs": []}))
    for sink in open_sinks(("wandb", "mlflow"), tmp_path, {}, start_step=0, tracking=tracking):
        sink.close()
    init = next(keywords for name, _, keywords in calls if name == "init")
    given = {name: init[name] for name in ("project", "entity", "group", "tags", "mode")}
    others = [(name, *args) for name, args, _ in calls if name.startswith("set_") and "pecobook_run" not in args]
    if tracking is TRACKING:
        assert given == {
            "project": "eyes", "entity": "lab", "group": "rates", "tags": ("a", "b"), "mode": "offline",
        }  # fmt: skip
        assert others == [
            ("set_tracking_uri", (tmp_path / "mlruns").as_uri()),
            ("set_experiment", "eyes"),
            ("set_tag", "a", ""),
            ("set_tag", "b", ""),
            ("set_tag", "group", "rates"),
        ]
    else:
        assert given == {"project": "pecobook", "entity": None, "group": None, "tags": None, "mode": None}
        assert others == [("set_experiment", "pecobook")]


def test_open_sinks__opens_the_requested_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setitem(sys.modules, "wandb", Recorder("wandb", calls, {"init": Recorder("run", calls)}))
    monkeypatch.setitem(sys.modules, "mlflow", Recorder("mlflow", calls, {"search_runs": []}))
    sinks = open_sinks(("mlflow", "tensorboard", "wandb"), tmp_path, {}, start_step=0)
    assert [type(sink) for sink in sinks] == [TensorBoard, WeightsAndBiases, MLflow, JsonLines]
    for sink in sinks:
        sink.close()
    sinks = open_sinks((), tmp_path, {}, start_step=0)
    assert [type(sink) for sink in sinks] == [JsonLines]
    sinks[0].close()


def test_resolve_loggers__names_a_logger_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_loggers(("auto",)) == resolve_loggers(("tensorboard", "auto")) == ("tensorboard",)
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were missing, wherever the tests run
        with pytest.raises(ConfigError, match=rf"--loggers {name}: .*pip install 'pecobook\[{name}\]'"):
            resolve_loggers(("auto", name))
    assert resolve_loggers(("auto",)) == ()


# --------------------------------------------------------------------------------------------------- text and progress


def test_open_text_log__appends_and_writes_each_line_once(tmp_path: Path) -> None:
    open_text_log(tmp_path).info("first %d", 1)
    open_text_log(tmp_path).info("second")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["first 1", "second"]
