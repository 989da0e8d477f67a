"""Several checkpoints that decode together, as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gridcap.common.errors import MismatchError
from gridcap.common.store.provenance import check_same_features
from gridcap.train.decoders.ensemble import Ensemble
from gridcap.train.engine.checkpoint import Checkpoint, load_checkpoint


def load_ensemble(paths: Sequence[Path]) -> Checkpoint:
    """Load checkpoints and join their decoders; a single one stays as it is.

    Args:
        paths: of runs or of checkpoints, at least one.

    Returns:
        The first checkpoint, with all decoders in its own's place.

    Raises:
        CheckpointError: one is missing or damaged.
        MismatchError: they were trained on other features, or know other words.
    """
    first, *others = [load_checkpoint(path) for path in paths]
    for other in others:
        _check_same_words(first, other)
        check_same_features(
            first.provenance, other.provenance, f"{first.path} was trained on", f"{other.path} was trained on"
        )
    if not others:
        return first
    decoder = Ensemble([first.decoder, *(other.decoder for other in others)])
    return dataclasses.replace(first, decoder=decoder.eval())


def _check_same_words(first: Checkpoint, other: Checkpoint) -> None:
    """The same words under the same ids, or a MismatchError that says where they part."""
    ours, theirs = first.vocabulary.tokens, other.vocabulary.tokens
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        difference = f"{len(ours)} words there, {len(theirs)} here"
    else:
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        difference = f"word {i} is {ours[i]!r} there, {theirs[i]!r} here"
    raise MismatchError(
        f"{first.path} has another vocabulary than {other.path}: {difference}",
        "decoders decode together only when they were trained with the same captions and vocabulary settings",
    )
