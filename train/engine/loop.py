"""fit: train a decoder on a stream of batches, step by step, and keep the best and the last checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gridcap.common.config import PipelineConfig, TrainConfig
from gridcap.common.device import choose_device, choose_precision
from gridcap.common.errors import CheckpointError, MismatchError, TrainingError, UserError
from gridcap.common.files import remove_leftovers, write_text
from gridcap.common.progress import progress_bar
from gridcap.common.store.provenance import check_same_features
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.build import build_decoder
from gridcap.train.engine.checkpoint import (
    POINTERS,
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from gridcap.train.engine.curves import plot_curves
from gridcap.train.engine.determinism import deterministic, step_seed
from gridcap.train.engine.distributed import Ranks, find_ranks, joined
from gridcap.train.engine.ema import WeightAverage
from gridcap.train.engine.health import warnings
from gridcap.train.engine.history import best_row, epochs_done, last_line
from gridcap.train.engine.interrupt import defer_stop_signals
from gridcap.train.engine.log import EVERY, Row, RunLog, read_rows
from gridcap.train.engine.optimizer import learning_rate, make_optimizer, take_step
from gridcap.train.engine.validation import validate
from gridcap.train.objectives.base import CrossEntropy, Objective
from gridcap.train.objectives.reward import CaptionReward
from gridcap.train.objectives.scst import SelfCritical

# What a resume may change; anything else would make another run.
_FREE_TO_CHANGE = {
    "features",
    "annotations",
    "val_features",
    "val_annotations",
    "output",
    "init_from",
    "epochs",
    "patience",
    "checkpoint_steps",
    "checkpoint_minutes",
    "device",
    "accumulate",
}


@dataclass
class Run:
    """All that changes in the course of a run, and so all that a checkpoint holds.

    Random numbers are no part of it: those of a step come from a seed made of the run's seed, the step and the
    process.

    Attributes:
        decoder: with the trained weights.
        average: of them, if the run averages.
        optimizer: with its moments.
        vocabulary: the words.
        history: rows of the epochs done.
        step: steps done.
        sums: of the terms of the epoch that is under way, and its seconds.
    """

    decoder: Decoder
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    vocabulary: Vocabulary
    history: list[Row] = field(default_factory=list)
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> Decoder:
        """The decoder to be validated and used."""
        return self.decoder if self.average is None else self.average.decoder

    def state(self, made_of: dict[str, Any]) -> dict[str, Any]:
        """What a resume needs besides the kept weights; `made_of` says what must be the same then."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "step": self.step,
            "sums": self.sums,
            "made_of": made_of,
            "weights": None if self.average is None else self.decoder.state_dict(),
        }


def fit(
    config: PipelineConfig, train: CaptionedImages, val: CaptionedImages | None, resume: bool, progress: bool = True
) -> list[Row]:
    """Train until `train.epochs` epochs are done, or validation CIDEr has not risen for `train.patience` of them.

    The vocabulary is counted over `train` only, or comes with `train.init_from`. The best checkpoint is the one
    whose greedy captions have the highest CIDEr on `val`; without validation it is the last. A run that goes on
    from another's decoder is validated before its first step too, as epoch 0.

    Under torchrun or srun every process calls this with the same arguments.

    Args:
        config: the resolved configuration; the run goes to `train.output`.
        train, val: images with grids and captions.
        resume: go on from the last checkpoint in `train.output`.
        progress: show a progress bar and a line an epoch.

    Returns:
        A row an epoch: epoch, step, train_loss (nats a word) or reward, baseline and advantage (of self-critical
        training), val_loss, val_perplexity, val_cider, val_commonest, val_attention_spread, seconds, waited (share
        of the time spent waiting for data).

    Raises:
        CheckpointError: nothing to resume, or a run is there and `resume` is false.
        MismatchError: another configuration, other features or captions than those of the run that is resumed.
        TrainingError: the loss is not a number.
        UserError: self-critical training without `init_from`; fewer images in a step than processes and parts.
    """
    ranks = find_ranks()
    settings = config.train
    name = settings.device
    if name in ("auto", "cuda") and (gpus := torch.cuda.device_count()):
        if 1 < gpus <= ranks.local:
            raise UserError(
                f"process {ranks.local + 1} of this machine finds {gpus} GPUs", "start as many processes as GPUs"
            )
        name = f"cuda:{ranks.local % gpus}"  # a Slurm task may be shown just its own GPU, number 0
    device = choose_device(name)
    if settings.batch_size < ranks.world * settings.grad_accum_steps:
        raise UserError(
            f"--batch-size {settings.batch_size}: the images of a step cannot be split over {ranks.world} processes "
            f"and {settings.grad_accum_steps} parts each",
            "choose a larger --batch-size, which counts the images of a step over all processes",
        )
    with joined(ranks, device), deterministic(device):
        return _Trainer(config, train, val, ranks, device, progress and ranks.first).run(resume)


def check_beginning(settings: TrainConfig) -> None:
    """Raise a UserError when self-critical training has nothing to begin with."""
    if settings.objective == "scst" and settings.init_from is None:
        raise UserError(
            "self-critical training begins with a decoder that can write captions already",
            "train one with cross-entropy first, then give it: --scst --init-from runs/it",
        )


class _Trainer:
    """One call of `fit`: what does not change in the course of a run, and the loop."""

    def __init__(
        self,
        config: PipelineConfig,
        train: CaptionedImages,
        val: CaptionedImages | None,
        ranks: Ranks,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.settings = config, config.train
        self.train, self.val, self.ranks, self.device, self.progress = train, val, ranks, device, progress
        self.precision = choose_precision(self.settings.precision, device)
        self.output = self.settings.output
        # What a run's configuration does not say and must be the same when it goes on.
        self.made_of: dict[str, Any] = {
            "data": train.digest(),
            "validation": None if val is None else val.digest(),
            "precision": str(self.precision),
        }
        if val is not None:
            check_same_features(
                train.store.provenance, val.store.provenance, f"{train.store.path} holds", str(val.store.path)
            )

    def run(self, resume: bool) -> list[Row]:
        settings, output = self.settings, self.output
        if resume and (output / "config.yaml").exists() and not (output / POINTERS).exists():
            resume = False  # stopped before its first checkpoint: there is nothing to lose in beginning again
            self._say(f"{output} has no checkpoint yet: beginning again")
        run = self._resume() if resume else self._begin()
        # Nobody writes before all have looked at what is there.
        if len(set(self.ranks.gather((run.step, tuple(run.vocabulary.tokens), self.made_of["data"])))) > 1:
            raise UserError(
                "the processes begin with different checkpoints, vocabularies or captions",
                "let all of them see the same folders and files",
            )
        if self.ranks.first:
            for folder in (output, output / "checkpoints"):
                remove_leftovers(folder)
            write_text(output / "config.yaml", self.config.to_yaml())
        stream = CaptionStream(
            self.train,
            run.vocabulary,
            StreamOptions(
                settings.batch_size,
                settings.captions_per_image,
                settings.max_length,
                self.config.seed,
                settings.shuffle,
                self.ranks,
                settings.grad_accum_steps,
                self.device.type == "cuda",
            ),
        )
        objective = self._objective(run.vocabulary)
        self._announce(run, len(stream), resume)
        log = RunLog(output, run.history, run.step) if self.ranks.first else None
        try:
            if settings.init_from is not None and self.val is not None and run.step == 0 and not run.history:
                self._end_epoch(run, log, {"epoch": 0, "step": 0})
            while (epoch := epochs_done(run.history)) < settings.epochs and not self._patience_is_over(run.history):
                row = self._epoch(run, stream, epoch, objective, log)
                self._end_epoch(run, log, row)
        finally:
            if log is not None:
                log.close()
        return run.history

    def _say(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)

    def _announce(self, run: Run, steps: int, resumed: bool) -> None:
        """What will be trained on what, and where it goes on."""
        settings, size = self.settings, sum(p.numel() for p in run.decoder.parameters())
        self._say(
            f"{settings.decoder.family}, {size / 1e6:.1f} million weights, {len(run.vocabulary)} words, on "
            f"{self.device} in {str(self.precision).removeprefix('torch.')}, {steps} steps an epoch -> {self.output}"
        )
        total = settings.epochs * steps
        if resumed and epochs_done(run.history) >= settings.epochs:
            self._say(f"nothing to do: all {settings.epochs} epochs are done (--epochs gives it more)")
        elif resumed:
            self._say(f"resuming after step {run.step} of {total}")
        if settings.schedule.warmup_steps >= total:
            self._say(
                f"WARNING: the warm-up takes {settings.schedule.warmup_steps} steps and this run has {total}: the "
                "learning rate never reaches its top (--set train.schedule.warmup_steps=...)"
            )

    def _objective(self, vocabulary: Vocabulary) -> Objective:
        settings = self.settings
        if settings.objective == "cross-entropy":
            return CrossEntropy(settings)
        reward = CaptionReward.build(self.train, vocabulary, settings.scst.bleu_weight)
        return SelfCritical(reward, settings.scst.samples, settings.max_length, settings.scst.temperature)

    # --- beginning and going on

    def _begin(self) -> Run:
        settings, store = self.settings, self.train.store
        check_beginning(settings)
        if (self.output / POINTERS).exists():
            raise CheckpointError(
                f"{self.output}: holds a run already", "go on with it by --resume, or choose another --output"
            )
        if settings.init_from is not None:
            loaded = load_checkpoint(settings.init_from)
            check_same_features(loaded.provenance, store.provenance, f"{loaded.path} was trained on", str(store.path))
            if loaded.config.train.decoder != settings.decoder:  # the checkpoints would name what they do not hold
                raise MismatchError(
                    f"{loaded.path}: holds another decoder than the one in train.decoder",
                    "give the decoder of the run in init_from",
                )
            return self._run_of(loaded)
        captions = [caption for image in self.train.captions for caption in image]
        vocabulary = Vocabulary.build(captions, settings.vocabulary.max_size, settings.vocabulary.min_count)
        torch.manual_seed(self.config.seed)
        decoder = build_decoder(settings.decoder, len(vocabulary), store.grid_shape)
        return self._run_of(Checkpoint(self.output, decoder, vocabulary, self.config, store.provenance))

    def _run_of(self, loaded: Checkpoint, weights: dict[str, Tensor] | None = None) -> Run:
        """A run at its beginning, with a checkpoint's decoder; `weights` are the trained ones beside an average."""
        decoder = loaded.decoder.to(self.device)
        average = None
        if self.settings.ema_decay:
            average = WeightAverage(decoder, self.settings.ema_decay)
            if weights is not None:
                decoder.load_state_dict(weights)
        optimizer = make_optimizer(self.settings, decoder.parameters())
        return Run(decoder, average, optimizer, loaded.vocabulary)

    def _resume(self) -> Run:
        loaded = load_checkpoint(find_checkpoint(self.output, "last"))
        provenance = self.train.store.provenance  # an epoch draws among the views, so they must be the same
        check_same_features(loaded.provenance, provenance, f"{self.output} was trained on", "these", views=True)
        then, now = loaded.config.train, self.settings
        free = set(_FREE_TO_CHANGE) - ({"epochs"} if now.schedule.kind == "cosine" else set())
        was, is_now = then.model_dump(), now.model_dump()
        changed = [
            f"train.{k}: {was[k]!r} then, {is_now[k]!r} now" for k in is_now.keys() - free if was[k] != is_now[k]
        ]
        if loaded.config.seed != self.config.seed:
            changed.append(f"seed: {loaded.config.seed} then, {self.config.seed} now")
        if changed:
            raise MismatchError(
                f"{self.output}: was begun with another configuration: {'; '.join(sorted(changed))}",
                "resume with the same settings, or choose another --output",
            )
        file = loaded.path / "training_state.pt"
        state = load_training_state(loaded.path)
        self._check_made_of(state.get("made_of") if isinstance(state, dict) else None)
        try:
            run = self._run_of(loaded, state["weights"])
            run.history, run.step, run.sums = list(state["history"]), state["step"], dict(state["sums"])
            run.optimizer.load_state_dict(state["optimizer"])
            return run
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: not the state of this run: {type(error).__name__}: {error}",
                "train again into another --output; the weights themselves can still be evaluated",
            ) from error

    def _check_made_of(self, then: Any) -> None:
        now = self.made_of
        if not isinstance(then, dict):
            return  # the state lacks other things too, and is refused for it
        if then.get("data", now["data"]) != now["data"]:
            raise MismatchError(
                f"{self.output}: was begun with other images or captions than {self.train.store.path} and its captions "
                "file hold now",
                "resume with the same files, or choose another --output",
            )
        if None not in (then.get("validation"), now["validation"]) and then["validation"] != now["validation"]:
            raise MismatchError(
                f"{self.output}: its epochs were validated on other images or captions than these",
                "resume with the same validation files, or choose another --output",
            )
        if then.get("precision", now["precision"]) != now["precision"]:
            raise MismatchError(
                f"{self.output}: was begun in {then['precision'].removeprefix('torch.')}, and this machine takes "
                f"{now['precision'].removeprefix('torch.')}",
                f"say --precision {then['precision'].removeprefix('torch.')}, or choose another --output",
            )

    # --- one epoch

    def _epoch(self, run: Run, stream: CaptionStream, epoch: int, objective: Objective, log: RunLog | None) -> Row:
        first = run.step - epoch * len(stream)  # steps of this epoch that are done already
        watch = _Watch(run.sums)
        totals = {name: torch.tensor(value, dtype=torch.float64) for name, value in run.sums.items()}
        saved = time.monotonic()
        label = f"epoch {epoch + 1}/{self.settings.epochs}"
        # Several processes are stopped at once, without waiting for each other: each is sent its own signal.
        holding = defer_stop_signals() if self.ranks.world == 1 else contextlib.nullcontext(lambda: None)
        with (
            holding as stopping,
            progress_bar(
                total=len(stream.data),
                initial=first * stream.options.batch_size,
                unit="image",
                desc=label,
                disable=not self.progress,
                leave=False,
            ) as bar,
        ):
            batches = stream.epoch(epoch, first)
            for number in range(first, len(stream)):
                with watch.waiting():
                    parts = list(islice(batches, stream.options.grad_accum_steps))
                row = self._step(run, parts, objective, epoch, len(stream), totals)
                bar.update(min(stream.options.batch_size, len(stream.data) - number * stream.options.batch_size))
                if run.step % EVERY == 0 or number == 0:
                    if log is not None:
                        log.step({"step": run.step, "epoch": epoch + 1, **row()})
                    self._check_finite(run, totals, epoch)
                stop = stopping()
                if stop or (number + 1 < len(stream) and self._checkpoint_is_due(run.step, saved)):
                    run.sums = watch.sums() | {name: value.item() for name, value in totals.items()}
                    self._check_finite(run, totals, epoch)
                    self._save(run)
                    saved = time.monotonic()
                if stop:
                    stop()
        self._check_finite(run, totals, epoch)
        run.sums = {}
        return {"epoch": epoch + 1, "step": run.step, **_means(totals), **watch.result()}

    def _step(
        self, run: Run, parts: list[Any], objective: Objective, epoch: int, steps: int, totals: dict[str, Tensor]
    ) -> Any:
        """One step of the optimizer; gives a function that makes the row for the log, which waits for the device."""
        settings, device = self.settings, self.device
        run.decoder.train()
        torch.manual_seed(step_seed(self.config.seed, run.step, self.ranks.rank))
        run.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part in parts:
            if len(part.images) == 0:
                continue
            batch = part.to(device)
            with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
                loss, terms = objective(run.decoder, batch, epoch)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + value
        parameters = list(run.decoder.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # not used by this loss, or a process without images in a short last step
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.world > 1:
            names = self.ranks.from_first(sorted(sums)) if not totals else sorted(totals)
            values = torch.stack([sums.get(n, torch.zeros((), dtype=torch.float64, device=device)) for n in names])
            self.ranks.add_up([*(p.grad for p in parameters if p.grad is not None), values])
            sums = dict(zip(names, values, strict=True))
        rate = learning_rate(settings, run.step, steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        norm = take_step(run.optimizer, parameters, sums["words"], settings)
        run.step += 1
        if run.average is not None:
            run.average.update(run.decoder, run.step)
        for name, value in sums.items():
            totals[name] = totals[name].to(device) + value if name in totals else value
        return lambda: {
            **{name.removeprefix("train_"): value for name, value in _means(sums).items()},
            "learning_rate": rate,
            "gradient_norm": norm.item(),
        }

    def _check_finite(self, run: Run, totals: dict[str, Tensor], epoch: int) -> None:
        good = [value.isfinite().to(self.device) for value in totals.values()]
        good += [parameter.isfinite().all() for parameter in run.decoder.parameters()]
        if not torch.stack(good).all():
            raise TrainingError(
                f"{self.output}: the loss is not a number any more (epoch {epoch + 1}, step {run.step})",
                "train again with a smaller --learning-rate into another --output",
            )

    # --- the end of an epoch

    def _end_epoch(self, run: Run, log: RunLog | None, row: Row) -> None:
        if self.val is not None:
            row |= validate(
                run.kept,
                self.val,
                run.vocabulary,
                self.settings,
                self.device,
                self.precision,
                self.ranks,
                self.progress,
            )
        run.history.append(row)
        if found := warnings(run.history):
            row["warnings"] = found
        self._save(run)
        if log is not None:
            log.epoch(run.history)
            plot_curves(run.history, read_rows(self.output / "steps.jsonl"), self.output / "curves.png")
        if self.progress:
            tqdm.write(last_line(run.history, self.settings.epochs))
            for text in row.get("warnings", ()):
                tqdm.write(f"  WARNING: {text}")

    def _save(self, run: Run) -> None:
        if self.ranks.first:
            best = best_row(run.history)["step"] if run.history else run.step
            if run.history and "val_cider" not in best_row(run.history):
                best = run.step
            save_checkpoint(
                self.output,
                run.step,
                run.kept,
                run.vocabulary,
                self.config,
                self.train.store.provenance,
                run.state(self.made_of),
                best,
            )

    def _checkpoint_is_due(self, step: int, saved: float) -> bool:
        settings = self.settings
        if settings.checkpoint_steps is not None and step % settings.checkpoint_steps == 0:
            return True
        return settings.checkpoint_minutes is not None and time.monotonic() - saved > 60 * settings.checkpoint_minutes

    def _patience_is_over(self, history: list[Row]) -> bool:
        patience = self.settings.patience
        if patience is None or not history or "val_cider" not in history[-1]:
            return False
        return bool(history[-1]["epoch"] - best_row(history)["epoch"] >= patience)


class _Watch:
    """Seconds of an epoch and of waiting in it, over interruptions."""

    def __init__(self, sums: dict[str, float]) -> None:
        self._begin = time.perf_counter() - sums.pop("seconds", 0.0)
        self._waited = sums.pop("waited", 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def sums(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._begin, "waited": self._waited}

    def result(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._begin
        return {"seconds": seconds, "waited": self._waited / seconds}


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums over words and captions -> means: train_loss, or reward, baseline and advantage."""
    found = {}
    if "loss" in sums:
        found["train_loss"] = (sums["loss"] / sums["words"]).item()
    for name in ("reward", "baseline", "advantage"):
        if name in sums:
            found[name] = (sums[name] / sums["captions"]).item()
    return found
