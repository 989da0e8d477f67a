"""Loading of checkpoints, alone or as an ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gridcap.common.errors import MismatchError
from gridcap.common.store.provenance import check_same_features
from gridcap.train.decoders.ensemble import Ensemble
from gridcap.train.engine.checkpoint import Checkpoint, load_checkpoint


def load_ensemble(paths: Sequence[Path]) -> Checkpoint:
    """Load checkpoints and combine their decoders; a single checkpoint is returned unchanged.

    Args:
        paths: folders of runs or checkpoints, at least one.

    Returns:
        The first checkpoint, with the ensemble as its decoder.

    Raises:
        CheckpointError: a checkpoint is missing or corrupted.
        MismatchError: the checkpoints differ in their features or vocabulary.
    """
    first, *others = [load_checkpoint(path) for path in paths]
    for other in others:
        _check_same_vocabulary(first, other)
        check_same_features(
            first.provenance, other.provenance, f"{first.path} was trained on", f"{other.path} was trained on"
        )
    if not others:
        return first
    decoder = Ensemble([first.decoder, *(other.decoder for other in others)])
    return dataclasses.replace(first, decoder=decoder.eval())


def _check_same_vocabulary(first: Checkpoint, other: Checkpoint) -> None:
    """Raise a MismatchError that states the first difference."""
    ours, theirs = first.vocabulary.tokens, other.vocabulary.tokens
    tokenizers = [checkpoint.vocabulary.tokenizer for checkpoint in (first, other)]
    if tokenizers[0].to_json() != tokenizers[1].to_json():
        difference = f"tokenizer {tokenizers[0].name} vs. {tokenizers[1].name}"
    elif ours == theirs:
        return
    elif len(ours) != len(theirs):
        difference = f"{len(ours)} tokens vs. {len(theirs)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        difference = f"token {i} is {ours[i]!r} vs. {theirs[i]!r}"
    raise MismatchError(
        f"{first.path} and {other.path} have different vocabularies: {difference}",
        "an ensemble needs decoders that were trained with the same captions and vocabulary settings",
    )
