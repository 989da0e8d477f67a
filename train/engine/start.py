"""Start and resume runs, with all checks that must pass before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gridcap.common.config import PipelineConfig, TrainConfig
from gridcap.common.errors import CheckpointError, MismatchError, UserError, explain_out_of_memory
from gridcap.common.store.provenance import check_same_features
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.data.vocabulary_check import check_vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.engine.checkpoint import POINTERS, find_checkpoint, load_checkpoint, load_training_state
from gridcap.train.engine.ema import WeightEMA
from gridcap.train.engine.job import TrainingJob
from gridcap.train.engine.optimizer import make_optimizer
from gridcap.train.engine.state import RunState

# Settings that may change on resuming. Any other change would make it a different run.
RESUMABLE_CHANGES = frozenset(
    {
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
        "cuda_graph",
        "grad_accum_steps",
    }
)


def check_objective(settings: TrainConfig) -> None:
    """Raise a UserError if SCST has no decoder to start from."""
    if settings.objective == "scst" and settings.init_from is None:
        raise UserError(
            "SCST (--scst) starts from a trained decoder, but --init-from (init_from) is not given",
            "train a decoder with cross-entropy first, then pass it: --scst --init-from runs/mine",
        )


def start_run(job: TrainingJob) -> RunState:
    """Return the initial state of a new run, with the decoder of `init_from` or with random weights.

    Raises:
        CheckpointError: the output folder already contains a run, or `init_from` cannot be loaded.
        MismatchError: `init_from` has another decoder, or was trained on other features.
        UserError: SCST without `init_from`, or a vocabulary that cannot be learned.
    """
    settings, store = job.settings, job.train.store
    check_objective(settings)
    if (job.output / POINTERS).exists():
        raise CheckpointError(
            f"{job.output}: already contains a run", "continue it with --resume, or choose another --output"
        )
    if settings.init_from is not None:
        loaded = load_checkpoint(settings.init_from)
        check_same_features(loaded.provenance, store.provenance, f"{loaded.path} was trained on", str(store.path))
        if loaded.config.train.decoder != settings.decoder:
            raise MismatchError(
                f"{loaded.path}: its decoder differs from train.decoder",
                "set train.decoder to the decoder of the run in init_from",
            )
        _print_vocabulary(job, loaded.vocabulary)
        return _new_state(job, loaded.decoder, loaded.vocabulary)
    vocabulary = _print_vocabulary(job)
    torch.manual_seed(job.config.seed)
    return _new_state(job, build_decoder(settings.decoder, len(vocabulary), store.grid_shape), vocabulary)


def _print_vocabulary(job: TrainingJob, given: Vocabulary | None = None) -> Vocabulary:
    """Return the vocabulary of a new run, after `check_vocabulary`, and print its size and the share of UNK."""
    checked = check_vocabulary(job.train, job.val, job.settings, given)
    for line in checked.lines(job.settings.max_unk):
        job.runtime.print(line)
    return checked.vocabulary


def resume_run(job: TrainingJob) -> RunState:
    """Return the state of the last checkpoint in the output folder.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupted.
        MismatchError: the configuration, the features, or the captions differ from those of the run.
    """
    loaded = load_checkpoint(find_checkpoint(job.output, "last"))
    # Views are compared too, because each epoch samples one of them per image.
    provenance = job.train.store.provenance
    check_same_features(
        loaded.provenance, provenance, f"{job.output} was trained on", str(job.train.store.path), views=True
    )
    _check_same_config(job, loaded.config)
    state = load_training_state(loaded.path)
    try:
        _check_same_fingerprint(job, dict(state["fingerprint"]))
        run = _new_state(job, loaded.decoder, loaded.vocabulary, state["weights"])
        run.load_training_state(state)
        return run
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if explain_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{loaded.path / 'training_state.pt'}: not the state of this run: {type(error).__name__}: {error}",
            "train again with another --output; the weights can still be evaluated",
        ) from error


def _new_state(
    job: TrainingJob, decoder: Decoder, vocabulary: Vocabulary, weights: dict[str, Tensor] | None = None
) -> RunState:
    """Return a state at step 0.

    Args:
        job: the run.
        decoder: decoder of a checkpoint; averaged, if the run uses EMA.
        vocabulary: vocabulary of the decoder.
        weights: trained weights, if they differ from the averaged ones.
    """
    decoder = decoder.to(job.runtime.device)
    ema = None
    if job.settings.ema_decay:
        ema = WeightEMA(decoder, job.settings.ema_decay)
        if weights is not None:
            decoder.load_state_dict(weights)
    return RunState(decoder, ema, make_optimizer(job.settings, decoder.parameters()), vocabulary)


def _check_same_config(job: TrainingJob, saved: PipelineConfig) -> None:
    allowed = RESUMABLE_CHANGES
    if job.settings.schedule.kind == "cosine":
        allowed = allowed - {"epochs"}  # the schedule ends with the last epoch
    family = saved.train.decoder.family, job.settings.decoder.family
    if family[0] != family[1]:
        allowed = allowed | {"decoder"}  # families have different keys
    old, new = _flatten(saved.train.model_dump()), _flatten(job.settings.model_dump())
    changes = [
        f"train.{key}: {old.get(key, 'not set')!r} then, {new.get(key, 'not set')!r} now"
        for key in sorted(old.keys() | new.keys())
        if key.partition(".")[0] not in allowed and old.get(key, ...) != new.get(key, ...)
    ]
    if family[0] != family[1]:
        changes.append(f"train.decoder.family: {family[0]!r} then, {family[1]!r} now")
    if saved.seed != job.config.seed:
        changes.append(f"seed: {saved.seed} then, {job.config.seed} now")
    if changes:
        raise MismatchError(
            f"{job.output}: was started with another configuration: {'; '.join(changes)}",
            "resume with the same settings, or choose another --output",
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by key, such as "decoder.hidden_size"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _check_same_fingerprint(job: TrainingJob, saved: dict[str, Any]) -> None:
    current = job.fingerprint
    if saved["data"] != current["data"]:
        raise MismatchError(
            f"{job.output}: was started with other images or captions than {job.train.store.path} and its captions "
            "file contain now",
            "resume with the same files, or choose another --output",
        )
    if None not in (saved["validation"], current["validation"]) and saved["validation"] != current["validation"]:
        raise MismatchError(
            f"{job.output}: earlier epochs were validated on other images or captions",
            "resume with the same validation files, or choose another --output",
        )
    if saved["precision"] != current["precision"]:
        then, now = (str(value["precision"]).removeprefix("torch.") for value in (saved, current))
        raise MismatchError(
            f"{job.output}: was started in {then}, but this machine selects {now}",
            f"pass --precision {then}, or choose another --output",
        )
