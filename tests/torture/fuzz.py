"""Coverage-guided fuzzing (libFuzzer, through atheris) of what reads other people's files: captions and features.

A case is a process of its own, `python -m torture.fuzz TARGET FOLDER SEED`, that goes on with the inputs that the
cases before it found to reach new code.
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

_RUNS = 5000  # inputs a case
_IN_MESSAGE = 600  # characters of a failure that are shown


def _seeds() -> dict[str, tuple[str, bytes]]:
    """Target -> the name of the file that is read, and something sound to begin with."""
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
        (corpus / "sound").write_bytes(content)


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
        said = f"{done.stdout}{done.stderr}"
        begin = said.find("Uncaught Python exception")
        shown = said[begin:][:_IN_MESSAGE] if begin >= 0 else said[-_IN_MESSAGE:]
        raise FailedError(f"{target}: exit status {done.returncode}: {shown}")
    runs = re.search(r"Done (\d+) runs", done.stderr)
    require(runs is not None and int(runs[1]) >= _RUNS, f"{target}: it did not run: {done.stderr[-_IN_MESSAGE:]}")
    return f"{_RUNS} inputs for {target}"


def _missing() -> str:
    return "" if importlib.util.find_spec("atheris") else "atheris (pip install atheris; it is made for x86-64 Linux)"


def main(target: str, folder: Path, seed: str) -> None:
    """Fuzz one target; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["common", "extract", "json", "csv"]):
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
            require(0 <= record.image_id < 2**63, f"an id of {record.image_id}")
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

    options = [f"-runs={_RUNS}", f"-seed={seed}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=3072"]
    os.chdir(folder)  # where libFuzzer leaves an input that crashes
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


PART = Part(
    f"captions, configurations and features to import, fuzzed: {_RUNS} inputs a case", 40, 7, _prepare, _run, _missing
)

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3])
