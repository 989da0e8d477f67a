"""Things that do not belong together: refused, with the difference shown."""

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

# A key of the provenance, and what it is elsewhere.
_ELSEWHERE: list[tuple[tuple[str, ...], Any]] = [
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
    (base / "captions.json").rename(base / "kept.json")
    (base / "captions.json").write_text(json.dumps(captions))
    runs.train(base, base / "wordy", resume=False)
    (base / "kept.json").rename(base / "captions.json")


def _run(folder: Path, rng: np.random.Generator) -> str:
    work = fresh_copy(folder)
    kinds = (_other_features, _other_features, _other_words, _newer_version)
    return kinds[int(rng.integers(len(kinds)))](work, rng)


def _refusal(attempt: Callable[[], object], what: str) -> str:
    try:
        attempt()
    except GridcapError as error:
        return f"{error.message}\n{error.hint}"
    require(False, f"{what}: it was taken")
    return ""


def _other_features(work: Path, rng: np.random.Generator) -> str:
    """A checkpoint, and a store that says something else of how its grids were made."""
    keys, value = _ELSEWHERE[int(rng.integers(len(_ELSEWHERE)))]
    with h5py.File(work / "train.h5", "r+") as file:
        provenance = json.loads(file.attrs["provenance"])
        owner = provenance
        for key in keys[:-1]:
            owner = owner[key]
        before, owner[keys[-1]] = owner[keys[-1]], value
        file.attrs["provenance"] = json.dumps(provenance)
    sign_index(work / "train.h5")
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("resumed with", lambda: runs.train(work, work / "calm", resume=True)),
        ("evaluated on", lambda: _evaluate(work)),
        ("trained on from a checkpoint of", lambda: _go_on(work)),
    ]
    how, attempt = attempts[0 if keys == ("views",) else int(rng.integers(len(attempts)))]  # evaluation takes one view
    said = _refusal(attempt, f"{how} features of another {keys[-1]}")
    if keys[-1] == "sha256":
        before, value = before[:8], value[:8]
    for shown in (before, value):
        text = shown if keys[-1] == "sha256" else json.dumps(shown)
        require(text in said and keys[0] in said, f"{keys}: the refusal does not show {text}: {said}")
    return f"{how} other features: refused, and the difference shown"


def _evaluate(work: Path) -> None:
    checkpoint = load_checkpoint(work / "calm", "last")
    with FeatureStore(work / "train.h5") as store:
        data = join_captions(store, work / "captions.json", [checkpoint.config], "train", "--annotations").data
        evaluate(checkpoint, data, checkpoint.config.caption, EvaluationOptions("cpu", progress=False))


def _go_on(work: Path) -> None:
    runs.train(work, work / "new", resume=False, init_from=work / "calm")


def _other_words(work: Path, rng: np.random.Generator) -> str:
    """Another run's vocabulary: of a decoder beside this one, or in the place of its own."""
    calm, wordy = (find_checkpoint(work / name, "last") for name in ("calm", "wordy"))
    if rng.random() < 0.5:
        pair = [calm, wordy] if rng.random() < 0.5 else [wordy, calm]
        said = _refusal(lambda: load_ensemble(pair), "two decoders of different words")
        require("another vocabulary" in said and "words there" in said, said)
        return "decoders of different words: refused, and the difference shown"
    shutil.copy(wordy / "vocabulary.json", calm / "vocabulary.json")
    if signed := rng.random() < 0.5:
        sign_checkpoint(calm)
    said = _refusal(lambda: load_checkpoint(work / "calm", "last"), f"another run's vocabulary, signed: {signed}")
    require("vocabulary" in said and (not signed or "size mismatch" in said), said)
    return "another run's vocabulary in a checkpoint: refused"


def _newer_version(work: Path, rng: np.random.Generator) -> str:
    kinds = ("index", "shard", "plan", "checkpoint")
    kind = kinds[int(rng.integers(len(kinds)))]
    attempts: dict[str, Callable[[], object]] = {
        "index": lambda: FeatureStore(work / "train.h5"),
        "shard": lambda: FeatureStore(work / "train.h5"),
        "plan": lambda: read_plan(work / "train"),
        "checkpoint": lambda: load_checkpoint(work / "calm", "last"),
    }
    newer = int(rng.integers(4, 100))
    checkpoint = find_checkpoint(work / "calm", "last")
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
    said = _refusal(attempts[kind], f"a newer {kind}")
    require(f"version {newer}" in said, f"the refusal does not say the version {newer}: {said}")
    return "a newer format: refused, and its version shown"


PART = Part("features, words or formats that do not belong to a checkpoint", 200, 20, _prepare, _run)
