"""Mismatched features, vocabularies, and formats: rejected with an error that states the difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gridcap.common.errors import GridcapError
from gridcap.common.store.header import HEADER_BYTES
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.plan import read_plan
from gridcap.train.data.inputs import join_captions
from gridcap.train.engine.checkpoint import find_checkpoint, load_checkpoint
from gridcap.train.ensemble import load_ensemble
from gridcap.train.evaluate import EvaluationOptions, evaluate
from tests.torture import runs
from tests.torture.case import Part, fresh_copy, require
from tests.torture.forge import sign_checkpoint, sign_index

# Keys of the provenance with values that do not match.
OTHER_VALUES: list[tuple[tuple[str, ...], Any]] = [
    (("encoder",), "resnet50"),
    (("layer",), "Mixed_6e"),
    (("weights", "sha256"), "0123456789" * 6 + "0123"),
    (("preprocessing", "resize_mode"), "crop"),
    (("preprocessing", "side"), 224),
    (("preprocessing", "mean"), [0.25, 0.5, 0.5]),
    (("dtype",), "float32"),
    (("grid_shape",), [2, 2, 4]),
    (("views",), ["original", "hflip"]),
]


def _prepare(folder: Path) -> None:
    base = folder / "base"
    runs.prepare_trained(base)
    captions = json.loads((base / "captions.json").read_text())
    for caption in captions["annotations"]:
        caption["caption"] += " here"
    (base / "captions.json").rename(base / "original.json")
    (base / "captions.json").write_text(json.dumps(captions))
    runs.train(base, base / "other-vocabulary", resume=False)
    (base / "original.json").rename(base / "captions.json")


def _run(folder: Path, rng: np.random.Generator) -> str:
    work = fresh_copy(folder)
    kinds = (_mismatched_features, _mismatched_features, _mismatched_vocabulary, _newer_version)
    return kinds[int(rng.integers(len(kinds)))](work, rng)


def _error_of(attempt: Callable[[], object], description: str) -> str:
    """Return the message and the hint of the error that the attempt must raise."""
    try:
        attempt()
    except GridcapError as error:
        return f"{error.message}\n{error.hint}"
    require(False, f"{description}: accepted")
    return ""


def _mismatched_features(work: Path, rng: np.random.Generator) -> str:
    """Combine a checkpoint with a store of different provenance."""
    keys, value = OTHER_VALUES[int(rng.integers(len(OTHER_VALUES)))]
    with h5py.File(work / "train.h5", "r+") as file:
        provenance = json.loads(file.attrs["provenance"])
        owner = provenance
        for key in keys[:-1]:
            owner = owner[key]
        original, owner[keys[-1]] = owner[keys[-1]], value
        file.attrs["provenance"] = json.dumps(provenance)
    sign_index(work / "train.h5")
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("resumed with", lambda: runs.train(work, work / "baseline", resume=True)),
        ("evaluated on", lambda: _evaluate(work)),
        ("initialized from a checkpoint trained on", lambda: _train_from(work)),
    ]
    how, attempt = attempts[0 if keys == ("views",) else int(rng.integers(len(attempts)))]  # evaluation uses one view
    error = _error_of(attempt, f"{how} features with another {keys[-1]}")
    if keys[-1] == "sha256":
        original, value = original[:8], value[:8]
    for shown in (original, value):
        text = shown if keys[-1] == "sha256" else json.dumps(shown)
        require(text in error and keys[0] in error, f"{keys}: the error does not state {text}: {error}")
    return f"{how} other features: rejected, difference stated"


def _evaluate(work: Path) -> None:
    checkpoint = load_checkpoint(work / "baseline", "last")
    with FeatureStore(work / "train.h5") as store:
        data = join_captions(store, work / "captions.json", [checkpoint.config], "train", "--annotations").data
        evaluate(checkpoint, data, checkpoint.config.caption, EvaluationOptions("cpu", progress=False))


def _train_from(work: Path) -> None:
    runs.train(work, work / "new", resume=False, init_from=work / "baseline")


def _mismatched_vocabulary(work: Path, rng: np.random.Generator) -> str:
    """Combine decoders with different vocabularies, or replace the vocabulary of a checkpoint."""
    baseline, other = (find_checkpoint(work / name, "last") for name in ("baseline", "other-vocabulary"))
    if rng.random() < 0.5:
        pair = [baseline, other] if rng.random() < 0.5 else [other, baseline]
        error = _error_of(lambda: load_ensemble(pair), "two decoders with different vocabularies")
        require("different vocabularies" in error and "tokens vs." in error, error)
        return "decoders with different vocabularies: rejected, difference stated"
    shutil.copy(other / "vocabulary.json", baseline / "vocabulary.json")
    if signed := rng.random() < 0.5:
        sign_checkpoint(baseline)
    error = _error_of(
        lambda: load_checkpoint(work / "baseline", "last"), f"vocabulary of another run, signed: {signed}"
    )
    require("vocabulary" in error and (not signed or "size mismatch" in error), error)
    return "vocabulary of another run in a checkpoint: rejected"


def _newer_version(work: Path, rng: np.random.Generator) -> str:
    kinds = ("index", "shard", "plan", "checkpoint")
    kind = kinds[int(rng.integers(len(kinds)))]
    attempts: dict[str, Callable[[], object]] = {
        "index": lambda: FeatureStore(work / "train.h5"),
        "shard": lambda: FeatureStore(work / "train.h5"),
        "plan": lambda: read_plan(work / "train"),
        "checkpoint": lambda: load_checkpoint(work / "baseline", "last"),
    }
    newer = int(rng.integers(4, 100))
    checkpoint = find_checkpoint(work / "baseline", "last")
    if kind in ("plan", "checkpoint"):
        path = work / "train" / "plan.json" if kind == "plan" else checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": newer}))
        sign_checkpoint(checkpoint)
    else:
        path = work / "train.h5" if kind == "index" else work / "train" / "00001.h5"
        with path.open("r+b") as file:
            header = json.loads(file.read(HEADER_BYTES))
            file.seek(0)
            file.write(json.dumps({**header, "version": newer}).encode().ljust(HEADER_BYTES))
    error = _error_of(attempts[kind], f"a newer {kind}")
    require(f"version {newer}" in error, f"the error does not state version {newer}: {error}")
    return "newer format: rejected, version stated"


PART = Part("mismatched features, vocabulary, or format version", 200, 20, _prepare, _run)
