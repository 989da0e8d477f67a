"""Files made to do harm, in every place that takes a file: refused, nothing run, nothing from outside read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from gridcap.cli import main as gridcap
from gridcap.common.errors import EXIT_INVALID, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.train.engine.checkpoint import find_checkpoint
from tests.torture import runs
from tests.torture.case import Part, fresh_copy, require
from tests.torture.forge import WAYS_OUT, sign_checkpoint, sign_index
from tests.torture.stores import GRID, use_mean_encoder, use_real_encoder

_REFUSED = (1, 2)  # a failure, wrong use


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _pickled(protocol: int) -> Callable[[Path, Any], object]:
    return lambda path, value: path.write_bytes(pickle.dumps(value, protocol))


def _as_yaml(path: Path, value: Any) -> None:
    marker = value.marker if isinstance(value, Payload) else next(iter(value.values())).marker
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")


def _as_numpy(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([value], dtype=object), allow_pickle=True)


def _as_archive(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, feat=np.array([value], dtype=object), features=np.array([value], dtype=object))


_LAYOUTS: list[Callable[[Path, Any], object]] = [
    _pickled(0),
    _pickled(2),
    _pickled(pickle.HIGHEST_PROTOCOL),
    _as_yaml,
    _as_numpy,
    _as_archive,
    lambda path, value: torch.save(value, path),
    lambda path, value: torch.save(value, path, _use_new_zipfile_serialization=False),
]


# What may be handed in, and under which names.
_PLACES: dict[str, tuple[str, ...]] = {
    "weights": (".pth", ".pt", ".safetensors"),
    "features to import": (".pkl", ".p", ".npz", ".npy", ".h5", ".pt"),
    "a store": (".h5",),
    "captions": (".json", ".csv"),
    "a configuration": (".yaml",),
    "a checkpoint": (),
}


def _prepare(folder: Path) -> None:
    runs.prepare_trained(folder / "base")


def _run(folder: Path, rng: np.random.Generator) -> str:
    use_mean_encoder()
    work = fresh_copy(folder)
    kinds = (_pickle_for_a_file, _way_out_of_a_file, _way_out_of_a_folder)
    return kinds[int(rng.integers(len(kinds)))](work, rng)


def _command(name: str, *arguments: object) -> tuple[int, str]:
    """Run an entry point, or a subcommand of gridcap; return its exit status and output. A traceback is a failure."""
    entry_points = metadata.entry_points(group="console_scripts", name=name)
    command, prefix = (next(iter(entry_points)).load(), []) if entry_points else (gridcap, [name])
    result = CliRunner().invoke(command, [*prefix, *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _pickle_for_a_file(work: Path, rng: np.random.Generator) -> str:
    """Code that runs on unpickling, in one of the places where a user may hand in a file."""
    marker, checkpoint, run = work / "it ran", find_checkpoint(work / "calm", "last"), work / "calm"
    place = list(_PLACES)[int(rng.integers(len(_PLACES)))]
    if place == "a checkpoint":
        files = sorted(checkpoint.iterdir())
        file = given = files[int(rng.integers(len(files)))]
    else:
        suffix = _PLACES[place][int(rng.integers(len(_PLACES[place])))]
        file = given = work / f"evil{suffix}"
    if file.suffix == ".npy":
        given = work / "evil"
        given.mkdir()
        file = given / "a.npy"
    payload = Payload(marker)
    value = payload if rng.random() < 0.5 else {"conv1.weight": payload}
    _LAYOUTS[int(rng.integers(len(_LAYOUTS)))](file, value)
    if place == "a checkpoint" and file.name != "sha256.json":
        sign_checkpoint(checkpoint)
    extraction = ["--images", work / "photos", "--output", work / "out.h5"]
    training = ["--features", work / "train.h5", "--annotations", work / "captions.json", "--set", "train.device=cpu"]
    asked: dict[str, list[tuple[str, list[Any]]]] = {
        "weights": [("extract-features", [*extraction, "--encoder", "resnet50", "--weights", given])],
        "features to import": [("import", [given, "--output", work / "out.h5"])],
        "a store": [(command, [given]) for command in ("verify", "inspect")],
        "captions": [("verify", [work / "train.h5", "--annotations", given])],
        "a configuration": [("extract-features", [*extraction, "--config", given])],
        "a checkpoint": [
            ("evaluate-decoder", ["--checkpoint", run, *training[:4]]),
            ("train-decoder", [*training, "--output", run, "--resume", "--set", "train.epochs=4"]),
            ("train-decoder", [*training, "--output", work / "new", "--init-from", run]),
        ],
    }
    if place == "weights":
        use_real_encoder()  # the other one needs none
    command, arguments = asked[place][int(rng.integers(len(asked[place])))]
    status, output = _command(command, *arguments)
    require(not marker.exists(), f"{file.name} in place of {place} ran")
    untouched = place == "a checkpoint" and file.name == "training_state.pt" and "--resume" not in arguments
    named = any(name in output for name in (given.name, file.name, checkpoint.name, "calm"))
    require((status in _REFUSED and named) or untouched, f"{file.name} in place of {place}: {status}: {output[-300:]}")
    return f"a pickle that runs code, in place of {place}: refused"


def _way_out_of_a_file(work: Path, rng: np.random.Generator) -> str:
    """HDF5 that has the numbers of another file read, in an index, a shard, or features to import."""
    with h5py.File(work / "secret.h5", "w") as file:
        file["secret"] = np.ones((4, *GRID), "<f2")
    where = ("an index", "a shard", "features to import")[int(rng.integers(3))]
    names = {"an index": ("image_id", "valid"), "a shard": ("features", "crc32", "image_id")}.get(where, ("features",))
    name = names[int(rng.integers(len(names)))]
    path = {"an index": work / "train.h5", "a shard": work / "train" / "00001.h5"}.get(where, work / "mine.h5")
    way = WAYS_OUT[int(rng.integers(len(WAYS_OUT)))]
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        way(file, name, work / "secret.h5")
    if where == "an index":
        sign_index(path)
    if where == "features to import":
        status, output = _command("import", path, "--output", work / "out.h5")
    else:  # a shard by itself: within a store its header's size would refuse it already
        try:
            with FeatureStore(path) as store:
                store.rows(range(len(store)), allow_invalid=True)
            status, output = 0, "read"
        except StoreError as error:
            status, output = 1, error.message
    right = "is stored in other files" in output or "is a link to another file" in output
    require(status in _REFUSED and right, f"{where}: {name}, {way.__name__}: {output[-300:]}")
    return f"numbers that lie in another file, in {where}: refused"


def _way_out_of_a_folder(work: Path, rng: np.random.Generator) -> str:
    """An image name, or a link under a good one, that leads out of the image folder; a shard name that does."""
    secret = work / "secret.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(secret)
    kind = ("a name", "a link", "a shard's name")[int(rng.integers(3))]
    if kind == "a shard's name":
        names = ("../secret.h5", "train/../../secret.h5", "/etc/passwd")
        shard = names[int(rng.integers(len(names)))].encode()
        with h5py.File(work / "train.h5", "r+") as file:
            count = len(file["shard_name"])
            del file["shard_name"]
            file["shard_name"] = np.array([shard] * count, h5py.string_dtype("utf-8", len(shard)))
        sign_index(work / "train.h5")
        status, output = _command(
            "evaluate-decoder",
            "--checkpoint",
            work / "calm",
            "--features",
            work / "train.h5",
            "--annotations",
            work / "captions.json",
        )
        require(status in _REFUSED and "outside" in output, f"{shard!r}: {output[-300:]}")
        return "a shard's name that leaves the folder: refused"
    name = "000.png"
    if kind == "a link":
        (work / "photos" / name).unlink()
        target = (secret, Path("..") / secret.name, Path("/dev/zero"))[int(rng.integers(3))]
        (work / "photos" / name).symlink_to(target)
    else:
        escapes = ("../secret.png", str(secret), "a/../../secret.png", "/dev/zero", "\0.png")
        name = escapes[int(rng.integers(len(escapes)))]
    tree = json.loads((work / "captions.json").read_text())
    tree["images"][0]["file_name"] = name
    (work / "captions.json").write_text(json.dumps(tree))
    status, output = _command(
        "extract-features",
        "--images",
        work / "photos",
        "--annotations",
        work / "captions.json",
        "--weights",
        "random",
        "--output",
        work / "out.h5",
        "--device",
        "cpu",
    )
    if kind == "a name":
        require(status in _REFUSED, f"{name!r}: {output[-300:]}")
        return "an image name that leaves the folder: refused"
    require(status == EXIT_INVALID, f"{name!r}: exit status {status}: {output[-300:]}")
    with FeatureStore(work / "out.h5") as store:
        require("leads out of the image folder" in store.invalid_reasons.get(0, ""), f"reasons {store.invalid_reasons}")
    return "a link that leaves the folder: rejected with its reason"


PART = Part(
    "a file made to do harm: a pickle that runs code, HDF5, names and links that lead out", 400, 40, _prepare, _run
)
