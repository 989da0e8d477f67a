"""Flipped bits and truncated files in stores and checkpoints: no changed value goes unnoticed."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gridcap.common.errors import GridcapError
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.repair import repair_store
from gridcap.extract.verify import verify_store
from gridcap.train.engine.checkpoint import find_checkpoint, load_checkpoint, load_training_state
from tests.torture import runs
from tests.torture.case import Part, contents, corrupt, require
from tests.torture.stores import extract_all, write_photos

TRUNCATED_FRACTION = 1 / 6
REPAIRED_FRACTION = 1 / 10


def _prepare(folder: Path) -> None:
    extract_all(write_photos(folder / "photos"), folder / "store" / "s.h5")
    shutil.copytree(folder / "store", folder / "intact")
    runs.prepare_trained(folder / "run")


def _run(folder: Path, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return _checkpoint(folder, rng)
    return _store(folder, rng)


def _store(folder: Path, rng: np.random.Generator) -> str:
    """Corrupt one file of the store; then verify it, read it, and sometimes repair it."""
    store = folder / "store"
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != "config.yaml"]
    file = files[int(rng.integers(len(files)))]
    expected = _intact_values(folder / "intact" / "s.h5")
    file.write_bytes(corrupt(file.read_bytes(), rng, bool(rng.random() < TRUNCATED_FRACTION)))
    try:
        try:
            report = verify_store(store / "s.h5")
            detected = "found by gridcap verify" if report.problems else ""
        except GridcapError:
            report, detected = None, "rejected on loading"
        try:
            same = _values(store / "s.h5") == expected
        except GridcapError:
            same, detected = True, detected or "rejected on loading"
        require(bool(detected) or same, f"{file.name}: a value changed without being detected")
        if report is not None and report.problems and rng.random() < REPAIRED_FRACTION and file.suffix == ".h5":
            repair_store(store / "s.h5", report)
            extract_all(folder / "photos", store / "s.h5")
            require(contents(store) == contents(folder / "intact"), f"{file.name}: repaired to different bytes")
            return "found, repaired to the same bytes"
        return detected or "no value changed"
    finally:
        shutil.rmtree(store)
        shutil.copytree(folder / "intact", store)


def _values(index: Path) -> list[Any]:
    with FeatureStore(index) as store:
        rows = store.rows(range(len(store)), verify=True, allow_invalid=True)
        return [rows.tobytes(), store.image_id.tolist(), list(store.file_name), store.valid.tolist()]


_intact_values = functools.cache(_values)  # no case modifies the intact store


def _checkpoint(folder: Path, rng: np.random.Generator) -> str:
    run = folder / "run" / "baseline"
    checkpoint = find_checkpoint(run, "last")
    files = [run / "checkpoints.json", *sorted(checkpoint.iterdir())]
    file = files[int(rng.integers(len(files)))]
    original, state = file.read_bytes(), _intact_state(run)
    file.write_bytes(corrupt(original, rng, bool(rng.random() < TRUNCATED_FRACTION)))
    try:
        require(_same(_state(run), state), f"{file.name}: a change was not detected on loading")
        return "no value changed"
    except GridcapError:
        return "rejected on loading"
    finally:
        file.write_bytes(original)


def _state(run: Path) -> dict[str, Any]:
    loaded = load_checkpoint(run, "last")
    return {
        "weights": dict(loaded.decoder.state_dict()),
        "tokens": loaded.vocabulary.tokens,
        "config": loaded.config.model_dump(mode="json"),
        "provenance": loaded.provenance,
        "training": load_training_state(loaded.path),
    }


_intact_state = functools.cache(_state)  # first called before any file is corrupted


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


PART = Part("flipped bit or truncated file: shard, index, plan, image manifest, checkpoint", 1200, 60, _prepare, _run)
