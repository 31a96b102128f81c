"""The only training loop. The loop never names a stage; a stage never names a rank, a device or a logger.

Everything random follows from (seed, step) and every schedule from the step, so a checkpoint holds weights, optimizer
state and one integer, and a killed run resumes bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pecobook.data.batch import Batch
from pecobook.data.loading import WorkerError, reading_advice
from pecobook.data.sampler import BatchPositions, key
from pecobook.data.stream import Stream, load
from pecobook.engine import checkpoint
from pecobook.engine.ahead import loss_weights, micro_batches
from pecobook.engine.attention import idle_kernel, trainable_attention
from pecobook.engine.curves import Curves, Draw
from pecobook.engine.evaluation import Evaluation, average_metrics, evaluate, picture_grid
from pecobook.engine.feed import Feed
from pecobook.engine.finite_check import FiniteCheck
from pecobook.engine.hooks import OnStep, Step
from pecobook.engine.launch import deterministic, device_count, micro_batch_size, num_workers
from pecobook.engine.log import JsonLines, Progress, Sink, close_text_log, flush, open_sinks, open_text_log
from pecobook.engine.memory import gpu_memory, out_of_memory_advice
from pecobook.engine.optim import build_optimizer, cooldown_start, learning_rates, set_learning_rate, warmup_warning
from pecobook.engine.probing import Probe
from pecobook.engine.schedule import is_time
from pecobook.engine.signals import Signals
from pecobook.engine.skipped import Skipped
from pecobook.engine.speed import Speed
from pecobook.engine.wrapping import prepare_module
from pecobook.errors import PecobookError, counted
from pecobook.settings.durations import steps
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import to_dict
from pecobook.utils.devices import cores
from pecobook.utils.distributed import gather_objects, on_first_rank
from pecobook.utils.files import write_atomically
from pecobook.utils.printer import say, show, write_notes_to

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_Batches: TypeAlias = Iterator[Batch]
_MIN_HELD_OUT = 20
"""With fewer held-out images the log says that the figures support no claim."""


class Outcome(NamedTuple):
    """The result of a training."""

    step: int
    """Number of completed steps."""
    finished: bool
    """Whether the training reached its last step."""
    metrics: dict[str, float]
    """Metrics of the last evaluation."""


def fit(
    fabric: Fabric,
    stage: nn.Module,
    train: Stream,
    evaluation: Stream,
    *,
    config: TrainConfig,
    command: str,
    reference: Stream | None = None,
    probe: Callable[[int, int], Probe] | None = None,
    flop: Callable[[], float | None] = lambda: None,
    preamble: Sequence[str] = (),
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train `stage` on `train` until its last step or a signal.

    `reference` holds training images that every evaluation reads in full and compares with; `probe` creates the run's
    probe from its first and last step; `flop` returns the operations per image. The lines of `preamble` are shown, and
    written to train.log, before the first step. `draw` draws curves.png; `on_step` is called after each step, on all
    ranks.

    Raises:
        NonFiniteLossError: before the optimizer step, on all ranks.
    """
    loop = Loop(fabric, stage, train, evaluation, reference, config, command, flop)
    loop.sinks += [Curves(loop.out, draw)] if draw is not None and loop.sinks else []
    loop.on_step = on_step
    if probe is not None:
        loop.probe = probe(loop.start, loop.total)
    for line in preamble:
        say(line)
    return loop.run()


class Loop:
    """The training loop of one run on one rank."""

    def __init__(
        self,
        fabric: Fabric,
        stage: Any,
        train: Stream,
        evaluation: Stream,
        reference: Stream | None,
        config: TrainConfig,
        command: str,
        flop: Callable[[], float | None],
    ) -> None:
        self.fabric, self.stage, self.config, self.optim = fabric, stage, config, config.optim
        self.train, self.evaluation, self.reference, self.out = train, evaluation, reference, Path(config.out)
        sizes: dict[str, Any] = {"num_images": len(train), "batch_size": config.batch_size}
        self.total = steps(config.max_steps, **sizes)
        self.schedule = learning_rates(config.optim, total=self.total, **sizes)
        self.warmup_warning = warmup_warning(config.optim, total=self.total, **sizes)
        self.cooldown = cooldown_start(config.optim, total=self.total, **sizes)
        self.micro = micro_batch_size(config)
        self.workers = num_workers(config)
        self.model = prepare_module(fabric, stage, config)
        fused = config.precision != "fp16"
        self.optimizer = build_optimizer(stage.parameter_groups(config.optim), config.optim, fused=fused)
        self.stepper: Any = fabric.setup_optimizers(self.optimizer)
        self.precision: Any = fabric.strategy.precision
        self.start = 0
        if config.resume:
            folder = self.out / "checkpoints"
            self.start = checkpoint.load(folder, stage=stage, optimizer=self.optimizer, precision=self.precision)
            # The run may have been killed between a checkpoint and this.
            on_first_rank(lambda: checkpoint.delete_old(folder, config.keep_checkpoints, self.cooldown))
        self.probe: Probe | None = None
        self.speed = Speed(
            self.start,
            time.monotonic(),
            batch_size=config.batch_size,
            flop=flop,
            device=fabric.device,
            num_devices=fabric.world_size,
            precision=config.precision,
        )
        self.finite_check = FiniteCheck(fabric.world_size, late=fabric.device.type == "cuda")
        quiet = fabric.global_rank > 0
        self.unit = train.source.unit
        self.progress = Progress(total=self.total, start=self.start, name=command, quiet=quiet, unit=self.unit)
        self.sinks, self.skipped, self.last_metrics = list[Sink](), Skipped(None), dict[str, float]()
        self.on_step: OnStep | None = None
        self._logged: tuple[int, dict[str, float]] = (0, {})  # the last step that was logged, and what it logged
        self._warned = self._advised = self._evaluating = False
        if not quiet:
            settings, sent = to_dict(config), config.tracking
            self.sinks = open_sinks(config.loggers, self.out, settings, start_step=self.start, tracking=sent)
            self.text = open_text_log(self.out)
            self.skipped = Skipped(self.text.info)
            self.text.info("%s from step %d to %d on %s", command, self.start, self.total, fabric.device)

    def run(self) -> Outcome:
        """Train until the last step or a signal, with evaluations and checkpoints along the way."""
        step = self.start
        if self.warmup_warning and step < self.total:
            say(self.warmup_warning)
        try:
            kernels = deterministic(self.fabric.device, self.config.deterministic, one_size=self.stage.has_one_size)
            with Signals() as signals, kernels:
                positions = BatchPositions(
                    start_step=self.start,
                    stop_step=self.total,
                    batch_size=self.config.batch_size,
                    micro_batch_size=self.micro,
                    rank=self.fabric.global_rank,
                    world_size=self.fabric.world_size,
                )
                loaded = load(self.train, positions, workers=self.workers, device=self.fabric.device)
                batches = Feed(loaded, self.fabric.device, self.speed, self.skipped)
                self._saved_at = time.monotonic()
                self.speed.restart(self._saved_at)
                if self.config.compile:
                    show("Compiling: the first step can take minutes.")
                self._complete_evaluation()
                while step < self.total:
                    stop = self.step_once(step, batches, signals)
                    step += 1
                    say(idle_kernel(self.config.attention) if step == self.start + 1 else "")
                    if self.on_step is not None:
                        logged = self._logged[1] if self._logged[0] == step else {}
                        self.on_step(Step(step, self.total, self.stage, logged))
                    self._save_if_due(step, stop)  # before an evaluation, which may fail
                    if is_time(step, self.config.sample_every, self.total):
                        self._evaluate(step)
                    if stop and step < self.total:
                        self._raise_failure(step)
                        show(f"Stopped at step {step}; the checkpoint is written. Continue with --resume.")
                        return Outcome(step, False, self.last_metrics)
            if self._failure():
                say(self._failure())  # in the last step or evaluation: nothing was lost
            return Outcome(step, True, self.last_metrics)
        except torch.OutOfMemoryError:
            least, when = self.stage.min_batch_size, self._evaluating
            advice = out_of_memory_advice(self.config, min_batch_size=least, evaluating=when, unit=self.unit)
            raise PecobookError(advice) from None
        finally:
            self._close()

    def _failure(self) -> str:
        """Return a sentence on a killed data-loading process of this rank; an empty string if there is none."""
        streams = (self.train, self.evaluation, self.reference, *(self.probe.streams if self.probe else ()))
        return next((stream.failure for stream in streams if stream is not None and stream.failure), "")

    def _raise_failure(self, step: int) -> None:
        """Raise WorkerError on all ranks if a data-loading process of one of them was killed."""
        failure = next(filter(None, gather_objects(self._failure())), "")
        if failure:
            error = WorkerError(
                f"{failure}\nStopped at step {step}; the checkpoint is written. Continue with --resume."
            )
            error.on_all_ranks = True
            raise error

    def _complete_evaluation(self) -> None:
        """Evaluate the checkpoint's step if the run was killed between the checkpoint and the end of the evaluation."""
        if self.start == 0 or not is_time(self.start, self.config.sample_every, self.total):
            return

        def logged() -> dict[str, float]:
            line = next((sink.last for sink in self.sinks if isinstance(sink, JsonLines)), {})
            of_step = line if line.get("step") == self.start else {}
            return {name: value for name, value in of_step.items() if name.startswith("evaluation/")}

        self.last_metrics = on_first_rank(logged)
        if not self.last_metrics:
            self._evaluate(self.start)

    def step_once(self, step: int, batches: _Batches, signals: Signals) -> bool:
        """Take one optimizer step; return whether to stop after it."""
        lr = self.schedule(step)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        loss, metrics = self._forward_backward(step, batches)
        norm = self._clip()
        stop = self.finite_check.after_backward(
            step + 1,
            loss,
            norm,
            may_overflow=self.config.precision == "fp16",
            stop=signals.received or bool(self._failure()),
        )
        self.stepper.step()
        self.stepper.zero_grad()
        done = step + 1
        self.stage.after_step(done, self.total)
        intervals = (self.config.log_every, self.config.sample_every, self.config.save_every)
        probes = self.probe is not None and self.probe.is_due(done)
        if (
            stop
            or probes
            or done == self.cooldown
            or any(is_time(done, interval, self.total) for interval in intervals)
        ):
            stop |= self.finite_check.wait()  # before this step is measured or saved
        if probes or is_time(done, self.config.log_every, self.total):
            values = self._measure(done, {"loss": loss, **metrics}) | {"lr": lr, "grad_norm": float(norm)}
            self._report(done, values | (self._probe(done) if probes else {}))
        elif done <= self.start + 2:  # a first sign of life, and the time left, without waiting for a logged step
            self.progress.show(done, average_metrics(self.fabric, {"loss": loss, **metrics}), now=True)
        else:
            self.progress.tick(done)
        return stop

    def _probe(self, step: int) -> dict[str, float]:
        assert self.probe is not None
        began = time.monotonic()
        values = self.probe.measure(self.fabric, self.model, step, batch_size=self.micro, workers=self.workers)
        self.skipped.note(self.probe.skipped)
        self.speed.leave_out(time.monotonic() - began)  # so that the reported speed is that of training alone
        return values

    def _forward_backward(self, step: int, batches: _Batches) -> tuple[Tensor, dict[str, Tensor]]:
        accumulation = self.config.batch_size // (self.micro * self.fabric.world_size)
        total: dict[str, Tensor] = {}
        parts: _Batches = (next(batches) for _ in range(accumulation))
        parts, weights = loss_weights(self.stage, parts, accumulation, self.fabric.world_size)
        for micro, batch in enumerate(micro_batches(self.stage, self.model, parts, partial(self._seed, step))):
            self._seed(step, micro)
            unfinished = micro < accumulation - 1
            with (
                trainable_attention(self.fabric.device, self.config.attention),
                self.fabric.no_backward_sync(self.model, enabled=unfinished),
            ):
                output = self.model(batch)
                assert output.loss is not None
                weight = weights[micro]
                self.fabric.backward((output.loss if weight is None else weight * output.loss) / accumulation)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                total[name] = total.get(name, 0) + (value if weight is None else weight * value) / accumulation
        return total.pop("loss"), total

    def _seed(self, step: int, micro: int) -> None:
        """Seed dropout, drop path and mixing from the position in the training, so that no random state is saved."""
        torch.manual_seed(key(self.config.seed, step, micro, self.fabric.global_rank) >> 1)

    def _clip(self) -> Tensor:
        """Clip the gradient if the settings say so; return the norm () before clipping, equal on all ranks."""
        norm: Any = self.fabric.clip_gradients(
            self.model, self.stepper, max_norm=self.optim.clip_grad or float("inf"), error_if_nonfinite=False
        )
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]

    def _measure(self, step: int, metrics: dict[str, Tensor]) -> dict[str, float]:
        values = average_metrics(self.fabric, metrics)
        values |= self.speed.measure(step, time.monotonic()) | gpu_memory(self.fabric.device)
        self.speed.restart(time.monotonic())
        return values

    def _report(self, step: int, values: dict[str, float]) -> None:
        self._logged = step, values
        self.progress.show(step, {**(self.probe.last if self.probe else {}), **values}, now=step <= self.start + 2)
        for sink in self.sinks:
            sink.log(values, step)
        if self.fabric.device.type == "cuda" and step > self.start + self.config.log_every and not self._advised:
            # Not for the first steps, which start processes.
            text = reading_advice(values["data_wait"], self.workers, len(cores()) // device_count(self.config))
            self._advised = bool(text)
            if text:
                say(text)
        warning = self.stage.warning(values, step)
        if warning and not self._warned:
            self._warned = True
            say(warning)

    def _evaluate(self, step: int) -> None:
        """Compute metrics over held-out images, and write pictures of the first few to samples/."""
        began, self._evaluating = time.monotonic(), True
        result = evaluate(
            self.fabric,
            self.model,
            self.stage,
            self.evaluation,
            self.reference,
            num_images=self.config.evaluation_images,
            batch_size=self.micro,
            seed=self.config.seed,
            workers=self.workers,
        )
        self.last_metrics = result.metrics
        self.skipped.note(result.skipped)
        self.skipped.share()
        on_first_rank(lambda: self._write_evaluation(step, result))
        self._evaluating = False
        self.speed.leave_out(time.monotonic() - began)  # so that the reported speed is that of training alone

    def _write_evaluation(self, step: int, result: Evaluation) -> None:
        metrics = ", ".join(f"{name.partition('/')[2]} {value:.4g}" for name, value in result.metrics.items())
        number = min(len(self.evaluation), self.config.evaluation_images)
        what = f"held-out {self.unit}"
        what = f"{counted(number, what)}, too few for any claim" if number < _MIN_HELD_OUT else what
        say(f"step {step}, {what}: {metrics or 'nothing could be measured'}")
        if result.pictures:
            png = picture_grid(result.pictures)
            write_atomically(self.out / "samples" / f"step-{step:08d}.png", png)
            for sink in self.sinks:
                sink.picture("samples", png, step)
        if step == self.total and result.rows:
            self.stage.report(self.out, result.rows, self.evaluation.source)
        for sink in self.sinks:  # metrics.jsonl after the others: a resume repeats an evaluation not in it
            sink.log(result.metrics, step)

    def _save_if_due(self, step: int, stop: bool) -> None:
        due = stop or step == self.cooldown or is_time(step, self.config.save_every, self.total)
        if not due:
            late = time.monotonic() - self._saved_at > 60 * self.config.save_minutes
            if step % self.config.log_every == 0:  # clocks differ between ranks, so rank 0's decides
                due = bool(self.fabric.broadcast(late)) if self.fabric.world_size > 1 else late
        if due:
            self.skipped.share()
            on_first_rank(partial(flush, self.sinks))
            checkpoint.save(
                self.out / "checkpoints",
                step=step,
                stage=self.stage,
                optimizer=self.optimizer,
                keep=self.config.keep_checkpoints,
                always=self.cooldown,
                precision=self.precision,
            )
            self._saved_at = time.monotonic()

    def _close(self) -> None:
        self.progress.close()
        if (number := len(self.skipped)) and self.sinks:
            say(f"{counted(number, self.unit)} could not be read; {self.out / 'train.log'} lists them.")
        for sink in self.sinks:
            sink.close()
        if self.sinks:
            write_notes_to(None)
            close_text_log(self.text)
