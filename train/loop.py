"""fit: train a decoder on a stream of batches, epoch by epoch, and keep the best and the last checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common.config import PipelineConfig
from common.device import choose_device, choose_precision
from common.errors import CheckpointError, MismatchError, TrainingError
from common.files import remove_leftovers, write_text
from common.store import check_same_features
from train.checkpoint import POINTERS, find_checkpoint, load_checkpoint, load_training_state, save_checkpoint
from train.decoders.base import Decoder
from train.decoders.build import build_decoder
from train.loss import masked_cross_entropy, perplexity
from train.metrics import cider
from train.search import beam_search
from train.stream import CaptionedImages, CaptionStream
from train.vocabulary import Vocabulary

# What a resume may change; anything else would make another run.
_FREE_TO_CHANGE = {"features", "annotations", "val_features", "val_annotations", "output", "epochs", "device"}


@dataclass
class Run:
    """The state of a run between epochs."""

    decoder: Decoder
    optimizer: torch.optim.Optimizer
    vocabulary: Vocabulary
    history: list[dict[str, Any]]


def fit(
    config: PipelineConfig, train: CaptionedImages, val: CaptionedImages | None, resume: bool, progress: bool = True
) -> list[dict[str, Any]]:
    """Train until `train.epochs` epochs are done.

    The vocabulary is counted over `train` only. The best checkpoint is the one whose greedy captions have the
    highest CIDEr on `val`; without validation it is the last.

    Args:
        config: the resolved configuration; the run goes to `train.output`.
        train, val: images with grids and captions.
        resume: go on from the last checkpoint in `train.output`.
        progress: show a progress bar.

    Returns:
        A row an epoch: epoch, train_loss and val_loss (nats a word), val_perplexity, val_cider, seconds,
        waited (share of the time spent waiting for data).

    Raises:
        CheckpointError: nothing to resume, or a run is there and `resume` is false.
        MismatchError: another configuration or other features than the run that is resumed.
        TrainingError: the loss is not a number.
    """
    settings = config.train
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    provenance = train.store.provenance
    if val is not None:
        check_same_features(provenance, val.store.provenance, f"{train.store.path} holds", str(val.store.path))
    if resume and (settings.output / "config.yaml").exists() and not (settings.output / POINTERS).exists():
        resume = False  # stopped before its first checkpoint: there is nothing to lose in beginning again
    run = _resume(config, provenance, device) if resume else _begin(config, train, device)
    remove_leftovers(settings.output / "checkpoints")
    write_text(settings.output / "config.yaml", config.to_yaml())
    stream = CaptionStream(
        train, run.vocabulary, settings.batch_size, settings.captions_per_image, settings.max_length, config.seed,
        pin=device.type == "cuda",
    )  # fmt: skip
    _write_history(settings.output, run.history)
    for epoch in range(len(run.history), settings.epochs):
        row = _train_epoch(run, stream, epoch, config, device, precision, progress)
        if val is not None:
            row |= validate(run.decoder, val, run.vocabulary, config, device, precision)
        run.history.append(row)
        best = best_epoch(run.history)
        save_checkpoint(
            settings.output, epoch + 1, run.decoder, run.vocabulary, config, provenance, _state_of(run), best
        )
        _write_history(settings.output, run.history)
        if progress:
            tqdm.write(_line(row, settings.epochs, best))
    return run.history


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The epoch with the highest validation CIDEr, of equals the one with the lowest validation loss; without any
    validation the last."""
    validated = [row for row in history if "val_cider" in row]
    return int(
        (max(validated, key=lambda row: (row["val_cider"], -row["val_loss"])) if validated else history[-1])["epoch"]
    )


def _begin(config: PipelineConfig, train: CaptionedImages, device: torch.device) -> Run:
    output, settings = config.train.output, config.train
    if (output / POINTERS).exists():
        raise CheckpointError(f"{output}: holds a run already", "go on with it by --resume, or choose another --output")
    captions = [caption for image in train.captions for caption in image]
    vocabulary = Vocabulary.build(captions, settings.vocabulary.max_size, settings.vocabulary.min_count)
    torch.manual_seed(config.seed)
    decoder = build_decoder(settings.decoder, len(vocabulary), train.store.grid_shape).to(device)
    return Run(decoder, torch.optim.Adam(decoder.parameters(), settings.learning_rate), vocabulary, [])


def _resume(config: PipelineConfig, provenance: dict[str, Any], device: torch.device) -> Run:
    loaded = load_checkpoint(find_checkpoint(config.train.output, "last"))
    check_same_features(loaded.provenance, provenance, f"{config.train.output} was trained on", "these")
    then, now = loaded.config.train.model_dump(), config.train.model_dump()
    changed = [
        f"train.{k}: {then[k]!r} then, {now[k]!r} now" for k in now.keys() - _FREE_TO_CHANGE if then[k] != now[k]
    ]
    if loaded.config.seed != config.seed:
        changed.append(f"seed: {loaded.config.seed} then, {config.seed} now")
    if changed:
        raise MismatchError(
            f"{config.train.output}: was begun with another configuration: {'; '.join(sorted(changed))}",
            "resume with the same settings, or choose another --output",
        )
    state = load_training_state(loaded.path)
    decoder = loaded.decoder.to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), config.train.learning_rate)
    try:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return Run(decoder, optimizer, loaded.vocabulary, list(state["history"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{loaded.path / 'training_state.pt'}: not the state of this run: {type(error).__name__}: {error}",
            "train again into another --output; the weights themselves can still be evaluated",
        ) from error


def _state_of(run: Run) -> dict[str, Any]:
    cuda = next(run.decoder.parameters()).is_cuda
    return {
        "optimizer": run.optimizer.state_dict(), "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
        "history": run.history,
    }  # fmt: skip


def _train_epoch(
    run: Run, stream: CaptionStream, epoch: int, config: PipelineConfig, device: torch.device,
    precision: torch.dtype, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    run.decoder.train()
    total = torch.zeros((), device=device, dtype=torch.float64)
    words = torch.zeros((), device=device, dtype=torch.int64)
    begin, waited = time.perf_counter(), 0.0
    label = f"epoch {epoch + 1}/{config.train.epochs}"
    with tqdm(total=len(stream.data), unit="image", desc=label, disable=not progress, leave=False) as bar:
        for batch, seconds in _timed(stream.epoch(epoch)):
            waited += seconds
            batch = batch.to(device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                logits = run.decoder(run.decoder.encode(batch.grids.float()), batch.tokens[..., :-1])
            loss, count = masked_cross_entropy(logits, batch.tokens[..., 1:])
            run.optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(run.decoder.parameters(), config.train.clip_norm)
            run.optimizer.step()
            total += loss.detach()
            words += count
            bar.update(len(batch.images))
    mean = (total / words).item()
    if not (math.isfinite(mean) and all(bool(p.isfinite().all()) for p in run.decoder.parameters())):
        raise TrainingError(
            f"{config.train.output}: the loss of epoch {epoch + 1} is not a number",
            "train again with a smaller --learning-rate into another --output",
        )
    seconds = time.perf_counter() - begin
    return {"epoch": epoch + 1, "train_loss": mean, "seconds": seconds, "waited": waited / seconds}


def _timed(batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch with the seconds it was waited for."""
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begin


@torch.inference_mode()
def validate(
    decoder: Decoder, data: CaptionedImages, vocabulary: Vocabulary, config: PipelineConfig, device: torch.device,
    precision: torch.dtype,
) -> dict[str, float]:  # fmt: skip
    """Loss and perplexity on the references, and CIDEr of greedy captions.

    Returns:
        val_loss in nats a word (EOS counted, every reference), val_perplexity = exp(val_loss), val_cider.
    """
    decoder.eval()
    settings = config.train
    per_image = max(len(captions) for captions in data.captions)
    stream = CaptionStream(data, vocabulary, settings.batch_size, per_image, settings.max_length)
    total, words = 0.0, 0
    captions: dict[int, str] = {}
    for batch in stream.in_order():
        moved = batch.to(device)
        grids = moved.grids.float()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = decoder(decoder.encode(grids), moved.tokens[..., :-1])
            loss, count = masked_cross_entropy(logits, moved.tokens[..., 1:])
            found = beam_search(decoder, grids, 1, settings.max_length)
        total, words = total + loss.item(), words + int(count)
        captions.update({int(i): vocabulary.decode(h.tokens) for i, h in zip(batch.images, found, strict=True)})
    mean = total / words
    references = {i: data.captions[i] for i in captions}
    return {"val_loss": mean, "val_perplexity": perplexity(mean), "val_cider": cider(captions, references)}


def _write_history(output: Path, history: list[dict[str, Any]]) -> None:
    """The whole log again, so that after a resume it is exactly what the checkpoint remembers."""
    rows = ({k: v if math.isfinite(v) else None for k, v in row.items()} for row in history)
    write_text(output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _line(row: dict[str, Any], epochs: int, best_epoch: int) -> str:
    text = f"epoch {row['epoch']:3d}/{epochs}  loss {row['train_loss']:.3f}"
    if "val_cider" in row:
        text += f"  validation: loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.2f}"
        text += f", CIDEr {row['val_cider']:.3f}"
        text += "  (best so far)" if best_epoch == row["epoch"] else ""
    return f"{text}  {row['seconds']:.1f} s"
