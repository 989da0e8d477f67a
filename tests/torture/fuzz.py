"""Coverage-guided fuzzing (libFuzzer via atheris) of readers: captions, configurations, features.

Every case is a process, `python -m tests.torture.fuzz TARGET FOLDER SEED`, and reuses the corpus of the previous cases.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.torture.case import FailedError, Part, require

RUNS = 5000  # inputs per case
MAX_MESSAGE = 600  # characters


def _seeds() -> dict[str, tuple[str, bytes]]:
    """Return the file name and a valid initial input of each target."""
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"id": i, "image_id": i % 2, "caption": f"a {i}"} for i in range(3)],
    }
    sentences = [{"raw": "a thing", "tokens": ["a", "thing"]}]
    karpathy = {
        "dataset": "coco",
        "images": [
            {"filename": "a.jpg", "filepath": "b", "cocoid": 1, "split": "train", "sentences": sentences},
            {"filename": "c.jpg", "imgid": 2, "split": "val", "sentences": sentences},
        ],
    }
    grids: dict[str, np.ndarray] = {"a.jpg": np.ones((4, 3), np.float16), "12": np.ones((2, 2, 3), np.float32)}
    array, arrays, hdf5 = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, grids["12"])
    np.savez(arrays, features=np.ones((2, 3)), image_id=np.arange(2))
    with h5py.File(hdf5, "w") as file:
        file["12_grids"], file["13_grids"] = grids["12"], grids["12"]
    settings = b"seed: 1\ntrain: {epochs: 2, decoder: {family: lstm}}\ndata: {splits: {train: {images: a}}}\n"
    return {
        "coco": ("a.json", json.dumps(coco).encode()),
        "karpathy": ("a.json", json.dumps(karpathy).encode()),
        "csv": ("a.csv", b'image,caption\na.jpg,"a ""thing"", b"\nb.jpg,c\n'),
        "yaml": ("a.yaml", settings),
        "pickle": ("a.pkl", pickle.dumps(grids, 4)),
        "npz": ("a.npz", arrays.getvalue()),
        "npy": ("a/1.npy", array.getvalue()),
        "hdf5": ("a.h5", hdf5.getvalue()),
    }


def _prepare(folder: Path) -> None:
    for target, (_, content) in _seeds().items():
        corpus = folder / target / "corpus"
        corpus.mkdir(parents=True)
        (corpus / "valid").write_bytes(content)


def _run(folder: Path, rng: np.random.Generator) -> str:
    targets = list(_seeds())
    target = targets[int(rng.integers(len(targets)))]
    command = [
        sys.executable,
        "-m",
        "tests.torture.fuzz",
        target,
        str(folder / target),
        str(int(rng.integers(1, 2**31))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        output = f"{done.stdout}{done.stderr}"
        start = output.find("Uncaught Python exception")
        shown = output[start:][:MAX_MESSAGE] if start >= 0 else output[-MAX_MESSAGE:]
        raise FailedError(f"{target}: exit status {done.returncode}: {shown}")
    runs = re.search(r"Done (\d+) runs", done.stderr)
    require(runs is not None and int(runs[1]) >= RUNS, f"{target}: did not run: {done.stderr[-MAX_MESSAGE:]}")
    return f"{RUNS} inputs for {target}"


def _missing() -> str:
    return "" if importlib.util.find_spec("atheris") else "atheris (pip install atheris; x86-64 Linux only)"


def main(target: str, folder: Path, seed: str) -> None:
    """Fuzz one target and exit the process."""
    import atheris

    with atheris.instrument_imports(include=["gridcap.common", "gridcap.extract", "json", "csv"]):
        from gridcap.common.captions.read import read_captions
        from gridcap.common.config import load_config
        from gridcap.common.errors import GridcapError
        from gridcap.extract.importers.features import ImportRequest, read_grid
        from gridcap.extract.importers.matching import match_keys
        from gridcap.extract.importers.sources import open_source

    def read_features(path: Path) -> None:
        source = open_source(path)
        pairs = match_keys(source, None)
        request = ImportRequest(source, pairs, "", path.with_suffix(".h5"), "", "float32")
        for record, key in pairs:
            require(0 <= record.image_id < 2**63, f"invalid id {record.image_id}")
            read_grid(request, key, None)

    readers: dict[str, Callable[[Path], Any]] = {
        "coco": lambda path: read_captions(path, "train"),
        "karpathy": lambda path: read_captions(path, "train"),
        "csv": lambda path: read_captions(path, "train"),
        "yaml": load_config,
        "npy": lambda path: read_features(path.parent),
    }
    read = readers.get(target, read_features)
    path = folder / _seeds()[target][0]
    path.parent.mkdir(exist_ok=True)

    def one(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(GridcapError):
            read(path)

    options = [f"-runs={RUNS}", f"-seed={seed}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=3072"]
    os.chdir(folder)  # libFuzzer writes crashing inputs here
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


PART = Part(
    f"fuzzed captions, configurations, and imported features: {RUNS} inputs per case", 40, 7, _prepare, _run, _missing
)

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3])
