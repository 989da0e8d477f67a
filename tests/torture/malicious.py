"""Malicious files in every place that takes a file: rejected, no code executed, no file outside the folder read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
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

REJECTED = (1, 2)  # exit statuses: failure, usage error


class Payload:
    """Creates a folder when it is unpickled."""

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


# Inputs that a user may pass, with their file suffixes.
_PLACES: dict[str, tuple[str, ...]] = {
    "encoder weights": (".pth", ".pt", ".safetensors"),
    "imported features": (".pkl", ".p", ".npz", ".npy", ".h5", ".pt"),
    "feature store": (".h5",),
    "captions file": (".json", ".csv"),
    "configuration": (".yaml",),
    "checkpoint": (),
}


def _prepare(folder: Path) -> None:
    runs.prepare_trained(folder / "base")


def _run(folder: Path, rng: np.random.Generator) -> str:
    use_mean_encoder()
    work = fresh_copy(folder)
    kinds = (_pickle, _external_data, _path_traversal)
    return kinds[int(rng.integers(len(kinds)))](work, rng)


def _command(name: str, *arguments: object) -> tuple[int, str]:
    """Run a gridcap subcommand and return its exit status and output; exceptions are raised."""
    result = CliRunner().invoke(gridcap, [name, *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _pickle(work: Path, rng: np.random.Generator) -> str:
    """Pass a pickle that runs code in place of one of the inputs."""
    marker, checkpoint, run = work / "executed", find_checkpoint(work / "baseline", "last"), work / "baseline"
    place = list(_PLACES)[int(rng.integers(len(_PLACES)))]
    if place == "checkpoint":
        files = sorted(checkpoint.iterdir())
        file = given = files[int(rng.integers(len(files)))]
    else:
        suffix = _PLACES[place][int(rng.integers(len(_PLACES[place])))]
        file = given = work / f"malicious{suffix}"
    if file.suffix == ".npy":
        given = work / "malicious"
        given.mkdir()
        file = given / "a.npy"
    payload = Payload(marker)
    value = payload if rng.random() < 0.5 else {"conv1.weight": payload}
    _LAYOUTS[int(rng.integers(len(_LAYOUTS)))](file, value)
    if place == "checkpoint" and file.name != "sha256.json":
        sign_checkpoint(checkpoint)
    extraction = ["--images", work / "photos", "--output", work / "out.h5"]
    training = ["--features", work / "train.h5", "--annotations", work / "captions.json", "--set", "train.device=cpu"]
    commands: dict[str, list[tuple[str, list[Any]]]] = {
        "encoder weights": [("extract", [*extraction, "--encoder", "resnet50", "--weights", given])],
        "imported features": [("import", [given, "--output", work / "out.h5"])],
        "feature store": [(command, [given]) for command in ("verify", "inspect")],
        "captions file": [("verify", [work / "train.h5", "--annotations", given])],
        "configuration": [("extract", [*extraction, "--config", given])],
        "checkpoint": [
            ("evaluate", ["--checkpoint", run, *training[:4]]),
            ("train", [*training, "--output", run, "--resume", "--set", "train.epochs=4"]),
            ("train", [*training, "--output", work / "new", "--init-from", run]),
        ],
    }
    if place == "encoder weights":
        use_real_encoder()  # the fake encoder has no weights
    command, arguments = commands[place][int(rng.integers(len(commands[place])))]
    status, output = _command(command, *arguments)
    require(not marker.exists(), f"{file.name} in place of the {place} was executed")
    unused = place == "checkpoint" and file.name == "training_state.pt" and "--resume" not in arguments
    named = any(name in output for name in (given.name, file.name, checkpoint.name, "baseline"))
    require((status in REJECTED and named) or unused, f"{file.name} in place of the {place}: {status}: {output[-300:]}")
    return f"pickle in place of the {place}: rejected"


def _external_data(work: Path, rng: np.random.Generator) -> str:
    """Make an HDF5 file refer to the data of another file: an index, a shard, or imported features."""
    with h5py.File(work / "secret.h5", "w") as file:
        file["secret"] = np.ones((4, *GRID), "<f2")
    where = ("index", "shard", "imported features")[int(rng.integers(3))]
    names = {"index": ("image_id", "valid"), "shard": ("features", "crc32", "image_id")}.get(where, ("features",))
    name = names[int(rng.integers(len(names)))]
    path = {"index": work / "train.h5", "shard": work / "train" / "00001.h5"}.get(where, work / "mine.h5")
    way = WAYS_OUT[int(rng.integers(len(WAYS_OUT)))]
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        way(file, name, work / "secret.h5")
    if where == "index":
        sign_index(path)
    if where == "imported features":
        status, output = _command("import", path, "--output", work / "out.h5")
    else:  # opened alone: in a store, the size in its header would already reject the shard
        try:
            with FeatureStore(path) as store:
                store.rows(range(len(store)), allow_invalid=True)
            status, output = 0, "read"
        except StoreError as error:
            status, output = 1, error.message
    expected = "is stored in other files" in output or "is a link to another file" in output
    require(status in REJECTED and expected, f"{where}: {name}, {way.__name__}: {output[-300:]}")
    return f"external data in {where}: rejected"


def _path_traversal(work: Path, rng: np.random.Generator) -> str:
    """Use an image name, a link, or a shard name that points outside its folder."""
    secret = work / "secret.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(secret)
    kind = ("image name", "link", "shard name")[int(rng.integers(3))]
    if kind == "shard name":
        names = ("../secret.h5", "train/../../secret.h5", "/etc/passwd")
        shard = names[int(rng.integers(len(names)))].encode()
        with h5py.File(work / "train.h5", "r+") as file:
            count = len(file["shard_name"])
            del file["shard_name"]
            file["shard_name"] = np.array([shard] * count, h5py.string_dtype("utf-8", len(shard)))
        sign_index(work / "train.h5")
        status, output = _command(
            "evaluate",
            "--checkpoint",
            work / "baseline",
            "--features",
            work / "train.h5",
            "--annotations",
            work / "captions.json",
        )
        require(status in REJECTED and "outside" in output, f"{shard!r}: {output[-300:]}")
        return "shard name outside the folder: rejected"
    name = "000.png"
    if kind == "link":
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
        "extract",
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
    if kind == "image name":
        require(status in REJECTED, f"{name!r}: {output[-300:]}")
        return "image name outside the folder: rejected"
    require(status == EXIT_INVALID, f"{name!r}: exit status {status}: {output[-300:]}")
    with FeatureStore(work / "out.h5") as store:
        require("leads out of the image folder" in store.invalid_reasons.get(0, ""), f"reasons {store.invalid_reasons}")
    return "link outside the folder: invalid image with its reason"


PART = Part(
    "malicious file: pickle that runs code; HDF5 data, names, and links outside the folder", 400, 40, _prepare, _run
)
