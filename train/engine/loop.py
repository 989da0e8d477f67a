"""The training loop: train a decoder epoch by epoch, and keep the best and the last checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from gridcap.common.config import PipelineConfig, adapt, describe_choice
from gridcap.common.errors import GridcapError, MismatchError, TrainingError
from gridcap.common.files import remove_leftovers, write_json, write_text
from gridcap.common.lease import Lease, exclusive_folder
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural
from gridcap.train.data import assignment
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.decoders.registry import resolve_decoder
from gridcap.train.engine.checkpoint import POINTERS, CheckpointContents, find_checkpoint, save_checkpoint
from gridcap.train.engine.curves import plot_curves
from gridcap.train.engine.determinism import deterministic
from gridcap.train.engine.distributed import find_ranks, process_group
from gridcap.train.engine.epoch_stats import EpochStats
from gridcap.train.engine.estimate import RunEstimate
from gridcap.train.engine.gradients import Gradients
from gridcap.train.engine.graphs import CudaGraphs
from gridcap.train.engine.health import health_warnings
from gridcap.train.engine.history import best_row, epochs_done, format_last_epoch, should_stop
from gridcap.train.engine.interrupt import defer_stop_signals
from gridcap.train.engine.job import TrainingJob, choose_runtime
from gridcap.train.engine.log import STEPS_PER_ROW, Row, RunLog, read_rows
from gridcap.train.engine.start import resume_run, start_run
from gridcap.train.engine.state import RunState
from gridcap.train.engine.step import StepResult, train_step
from gridcap.train.engine.step_time import StepTimeMonitor
from gridcap.train.engine.validation import validate
from gridcap.train.objectives.build import build_objective


def fit(
    config: PipelineConfig, train: CaptionedImages, val: CaptionedImages | None, resume: bool, progress: bool = True
) -> list[Row]:
    """Train until `train.epochs` epochs are done, or until validation CIDEr stops improving (`train.patience`).

    The vocabulary is built from `train` only, or taken from `train.init_from`. The best checkpoint is the one whose
    greedy captions have the highest CIDEr on `val`; without validation, it is the last one. A run with `init_from` is
    also validated before the first step, as epoch 0.

    Under torchrun or srun, every rank calls this function with the same arguments.

    Args:
        config: resolved configuration; the run is written to `train.output`.
        train: images to train on.
        val: images to validate on, if any.
        resume: continue from the last checkpoint in `train.output`.
        progress: show a progress bar and one line per epoch.

    Returns:
        One row per epoch: epoch, step, train_loss (nats per token) or (SCST) reward, baseline, and advantage, the
        results of `validate`, seconds, and data_wait (share of the time spent waiting for data).

    Raises:
        FolderInUseError: another process trains into the same folder.
        CheckpointError: there is nothing to resume, or the folder contains a run and `resume` is false.
        MismatchError: the configuration, features, or captions differ from those of the resumed run, or between ranks;
            or images are used for both training and validation.
        TrainingError: the loss became NaN or inf, or the ranks cannot connect.
        UserError: SCST without `init_from`, or fewer images per step than ranks and gradient accumulation steps.
    """
    config = resolve_decoder(config)
    settings = adapt(config.train, len(train), train.caption_count)
    ranks = find_ranks()
    runtime = choose_runtime(settings, ranks, progress)
    if choice := describe_choice(config.train, len(train), train.caption_count):
        runtime.print(choice)
    config = config.model_copy(update={"train": settings})
    with process_group(ranks, runtime.device), deterministic(runtime.device):
        job = TrainingJob(config, train, val, runtime)
        if resume and not job.output.exists():
            find_checkpoint(job.output, "last")  # raises the error, before the folder is created
        with _exclusive_output(job) as lease:
            return _run(job, resume, lease)


@contextlib.contextmanager
def _exclusive_output(job: TrainingJob) -> Iterator[Lease | None]:
    """Hold the lease of the output folder on rank 0, so that two runs never write to the same folder."""
    ranks = job.runtime.ranks
    with contextlib.ExitStack() as stack:
        lease, error = None, None
        if ranks.is_main:
            try:
                lease = stack.enter_context(exclusive_folder(job.output, job.runtime.print))
            except (GridcapError, OSError) as raised:  # raised by all ranks, which would wait otherwise
                error = raised
        if error := ranks.all_gather(error)[0]:
            raise error
        yield lease


def _run(job: TrainingJob, resume: bool, lease: Lease | None) -> list[Row]:
    if resume and (job.output / "config.yaml").exists() and not (job.output / POINTERS).exists():
        resume = False  # stopped before its first checkpoint
        job.runtime.print(f"{job.output} has no checkpoint yet: starting again")
    run = resume_run(job) if resume else start_run(job)
    _check_same_on_all_ranks(job, run)  # before anything is written
    modules = [run.decoder] if run.ema is None else [run.decoder, run.ema.decoder]
    job.runtime.ranks.broadcast([tensor for module in modules for tensor in module.state_dict().values()])
    if job.runtime.ranks.is_main:
        for folder in (job.output, job.output / "checkpoints"):
            remove_leftovers(folder)
        write_text(job.output / "config.yaml", job.config.to_yaml())
        if job.train.assignment:
            write_json(job.output / assignment.FILE, dict(job.train.assignment))
    trainer = Trainer(job, run, lease)
    trainer.print_summary(resume)
    try:
        return trainer.train()
    finally:
        trainer.close()


def _check_same_on_all_ranks(job: TrainingJob, run: RunState) -> None:
    inputs = (run.step, tuple(run.vocabulary.tokens), job.fingerprint["data"])
    if len(set(job.runtime.ranks.all_gather(inputs))) > 1:
        raise MismatchError(
            "the ranks start from different checkpoints, vocabularies, or captions",
            "give all ranks access to the same folders and files",
        )


class Trainer:
    """The training loop of one run.

    Args:
        job: inputs of the run.
        run: state to start from.
        lease: lease of the output folder; None on ranks other than 0.
    """

    def __init__(self, job: TrainingJob, run: RunState, lease: Lease | None) -> None:
        settings = job.settings
        self.job, self.run, self.lease, self.step_times = job, run, lease, StepTimeMonitor()
        options = StreamOptions(
            settings.batch_size,
            settings.captions_per_image,
            settings.max_length,
            job.config.seed,
            settings.shuffle,
            job.runtime.ranks,
            settings.grad_accum_steps,
            job.runtime.device.type == "cuda",
        )
        self.stream = CaptionStream(job.train, run.vocabulary, options)
        objective = build_objective(settings, job.train, run.vocabulary)
        device, wanted = job.runtime.device, settings.cuda_graph
        graphs = CudaGraphs(device) if device.type == "cuda" and wanted != "off" else None
        self.gradients = Gradients(run.decoder, objective, job.runtime, graphs, required=wanted == "on")
        self.log = RunLog(job.output, run.history, run.step) if job.runtime.ranks.is_main else None
        self.estimate = RunEstimate(settings.epochs * len(self.stream) - run.step, device)
        self.pending_signal: Callable[[], Callable[[], None] | None] = lambda: None

    def print_summary(self, resumed: bool) -> None:
        """Print the size of the decoder and of the run, and where it resumes."""
        settings, runtime, steps = self.job.settings, self.job.runtime, len(self.stream)
        size = sum(p.numel() for p in self.run.decoder.parameters()) / 1e6
        runtime.print(
            f"{settings.decoder.family}: {size:.1f} million parameters, {len(self.run.vocabulary):,} tokens, on "
            f"{runtime.device} in {str(runtime.precision).removeprefix('torch.')}, {plural(steps, 'step')} per epoch "
            f"-> {self.job.output}"
        )
        total = settings.epochs * steps
        if resumed and epochs_done(self.run.history) >= settings.epochs:
            runtime.print(
                f"nothing to do: {plural(settings.epochs, 'epoch')} already complete (raise --epochs to train further)"
            )
        elif resumed:
            runtime.print(f"resuming after step {self.run.step} of {total}")
        if settings.schedule.warmup_steps >= total:
            runtime.print(
                f"WARNING: the learning rate never reaches its peak: {settings.schedule.warmup_steps} warmup steps, "
                f"but only {plural(total, 'step')} in this run (--set train.schedule.warmup_steps=...)"
            )

    def train(self) -> list[Row]:
        """Train until the last epoch, or until patience runs out, and return one row per epoch."""
        run, settings = self.run, self.job.settings
        with defer_stop_signals() as self.pending_signal:
            if settings.init_from is not None and self.job.val is not None and run.step == 0 and not run.history:
                self._finish_epoch({"epoch": 0, "step": 0})
            while (epoch := epochs_done(run.history)) < settings.epochs and not should_stop(
                run.history, settings.patience
            ):
                self._finish_epoch(self._train_epoch(epoch))
        return run.history

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _train_epoch(self, epoch: int) -> Row:
        """Train the remaining steps of an epoch (from 0), writing checkpoints on the way."""
        run, stream = self.run, self.stream
        first = run.step - epoch * len(stream)  # steps of this epoch that are already done
        batch_size = self.job.settings.batch_size
        stats = EpochStats(run.sums)
        saved = time.monotonic()
        bar = progress_bar(
            total=len(stream.data),
            initial=first * batch_size,
            unit="image",
            desc=f"epoch {epoch + 1}/{self.job.settings.epochs}",
            disable=not self.job.runtime.progress,
            leave=False,
        )
        with bar:
            batches = stream.epoch(epoch, first)
            for index in range(first, len(stream)):
                started = time.perf_counter()
                with stats.waiting_for_data():
                    step_batches = list(islice(batches, self.job.settings.grad_accum_steps))
                result = train_step(self.job, run, step_batches, self.gradients, len(stream))
                stats.add(result.sums)
                if run.step % STEPS_PER_ROW == 0 or index == 0:
                    self._log_step(epoch, result)
                    check_finite(self.job, run, stats)
                stop = self._agree_on_stop()
                if stop or (index + 1 < len(stream) and self._checkpoint_is_due(saved)):
                    run.sums = stats.state_dict()
                    check_finite(self.job, run, stats)
                    self._save()
                    saved = time.monotonic()
                if stop:
                    stop()
                # Last, because writing to a closed terminal fails.
                seconds = time.perf_counter() - started
                if estimate := self.estimate.add(seconds):
                    self.job.runtime.print(f"  {estimate}")
                if warning := self.step_times.add(seconds):
                    self.job.runtime.print(f"  WARNING: {warning}")
                bar.update(min(batch_size, len(stream.data) - index * batch_size))
        check_finite(self.job, run, stats)
        run.sums = stats.state_dict()
        return {"epoch": epoch + 1, "step": run.step, **stats.row()}

    def _agree_on_stop(self) -> Callable[[], None] | None:
        """Return how to stop now if any rank received a stop signal.

        All ranks stop at the same point, so that rank 0 can save a checkpoint of it.
        """
        stop = self.pending_signal()
        if not self.job.runtime.ranks.any(stop is not None):
            return None
        return stop or _raise_keyboard_interrupt

    def _stop_if_agreed(self) -> None:
        if stop := self._agree_on_stop():
            stop()

    def _log_step(self, epoch: int, result: StepResult) -> None:
        if self.log is not None:
            self.log.log_step({"step": self.run.step, "epoch": epoch + 1, **result.row()})

    def _finish_epoch(self, row: Row) -> None:
        """Validate, write a checkpoint, and log the row of an epoch."""
        job, run = self.job, self.run
        if job.val is not None:
            if job.runtime.ranks.world_size > 1 and run.step > 0:
                self._save()  # the end of another rank ends this one without a chance to save
            try:
                row |= validate(
                    run.eval_decoder, job.val, run.vocabulary, job.settings, job.runtime, self._stop_if_agreed
                )
            except BaseException:  # a signal, another rank that ended, or a store that cannot be read
                self._save()  # resuming continues with this validation
                raise
        run.sums = {}
        run.history.append(row)
        if messages := health_warnings(run.history):
            row["warnings"] = messages
        self._save()
        self._stop_if_agreed()
        if self.log is not None:
            self.log.log_epoch(run.history)
            plot_curves(run.history, read_rows(job.output / "steps.jsonl"), job.output / "curves.png")
        job.runtime.print(format_last_epoch(run.history, job.settings.epochs))
        for message in messages:
            job.runtime.print(f"  WARNING: {message}")

    def _save(self) -> None:
        job, run = self.job, self.run
        if self.lease is None:
            return
        self.lease.check()
        best = best_row(run.history) if run.history else {}
        best_step = best["step"] if "val_cider" in best else run.step
        contents = CheckpointContents(
            step=run.step,
            decoder=run.eval_decoder,
            vocabulary=run.vocabulary,
            config=job.config,
            provenance=job.train.store.provenance,
            training_state=run.training_state(job.fingerprint),
        )
        save_checkpoint(job.output, contents, best_step)

    def _checkpoint_is_due(self, saved: float) -> bool:
        settings = self.job.settings
        if settings.checkpoint_steps is not None and self.run.step % settings.checkpoint_steps == 0:
            return True
        return settings.checkpoint_minutes is not None and time.monotonic() - saved > 60 * settings.checkpoint_minutes


def _raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def check_finite(job: TrainingJob, run: RunState, stats: EpochStats) -> None:
    """Raise a TrainingError if a summed term or a parameter is NaN or inf. This waits for the device."""
    finite = [value.isfinite().to(job.runtime.device) for value in stats.sums.values()]
    finite += [parameter.isfinite().all() for parameter in run.decoder.parameters()]
    if not torch.stack(finite).all():
        raise TrainingError(
            f"{job.output}: the loss or a weight became NaN or inf (epoch {epochs_done(run.history) + 1}, "
            f"step {run.step})",
            "train again with a smaller --learning-rate and another --output",
        )
