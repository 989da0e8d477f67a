"""Flipped bits and cut files, in everything that is kept: nothing changes a number unseen."""

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
from tests.torture.case import Part, contents, damaged, require
from tests.torture.stores import extract_all, write_photos

_CUT = 1 / 6  # of the cases are cut files
_REPAIRED = 1 / 10  # of the damaged stores are repaired and made whole


def _prepare(folder: Path) -> None:
    extract_all(write_photos(folder / "photos"), folder / "store" / "s.h5")
    shutil.copytree(folder / "store", folder / "whole")
    runs.prepare_trained(folder / "run")


def _run(folder: Path, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return _checkpoint(folder, rng)
    return _store(folder, rng)


def _store(folder: Path, rng: np.random.Generator) -> str:
    """Damage one file of the store; then verify it, read it, and now and then repair it."""
    store = folder / "store"
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.name != "config.yaml"]
    file = files[int(rng.integers(len(files)))]
    numbers = _whole_numbers(folder / "whole" / "s.h5")
    file.write_bytes(damaged(file.read_bytes(), rng, bool(rng.random() < _CUT)))
    try:
        try:
            report = verify_store(store / "s.h5")
            found = "found by gridcap verify" if report.problems else ""
        except GridcapError:
            report, found = None, "refused on loading"
        try:
            same = _numbers(store / "s.h5") == numbers
        except GridcapError:
            same, found = True, found or "refused on loading"
        require(bool(found) or same, f"{file.name}: a number changed, and nobody saw it")
        if report is not None and report.problems and rng.random() < _REPAIRED and file.suffix == ".h5":
            repair_store(store / "s.h5", report)
            extract_all(folder / "photos", store / "s.h5")
            require(contents(store) == contents(folder / "whole"), f"{file.name}: repaired, and not as it was")
            return "found, repaired to the same bytes"
        return found or "changes no number"
    finally:
        shutil.rmtree(store)
        shutil.copytree(folder / "whole", store)


def _numbers(index: Path) -> list[Any]:
    with FeatureStore(index) as store:
        rows = store.rows(range(len(store)), verify=True, allow_invalid=True)
        return [rows.tobytes(), store.image_id.tolist(), list(store.file_name), store.valid.tolist()]


_whole_numbers = functools.cache(_numbers)  # of what no case touches


def _checkpoint(folder: Path, rng: np.random.Generator) -> str:
    run = folder / "run" / "calm"
    whole = find_checkpoint(run, "last")
    files = [run / "checkpoints.json", *sorted(whole.iterdir())]
    file = files[int(rng.integers(len(files)))]
    before, state = file.read_bytes(), _whole_state(run)
    file.write_bytes(damaged(before, rng, bool(rng.random() < _CUT)))
    try:
        require(_same(_state(run), state), f"{file.name}: something changed, and it was loaded all the same")
        return "changes no number"
    except GridcapError:
        return "refused on loading"
    finally:
        file.write_bytes(before)


def _state(run: Path) -> dict[str, Any]:
    loaded = load_checkpoint(run, "last")
    return {
        "weights": dict(loaded.decoder.state_dict()),
        "words": loaded.vocabulary.tokens,
        "config": loaded.config.model_dump(mode="json"),
        "provenance": loaded.provenance,
        "training": load_training_state(loaded.path),
    }


_whole_state = functools.cache(_state)  # first asked for before anything is damaged


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


PART = Part("a flipped bit, a cut file: shards, index, plan, image list, checkpoint", 1200, 60, _prepare, _run)
