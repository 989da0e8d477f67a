"""Checkpoints: folders without pickled code, written atomically.

runs/x/config.yaml                   resolved configuration of the run
runs/x/metrics.jsonl                 one row per epoch
runs/x/steps.jsonl                   one row per 20 steps; tensorboard/ contains the same values
runs/x/curves.png                    training curves
runs/x/checkpoints.json              names of the best and the last checkpoint
runs/x/checkpoints/step-00001234/
    model.safetensors                weights (averaged, if the run uses EMA)
    config.json                      configuration
    vocabulary.json                  vocabulary
    provenance.json                  provenance of the features it was trained on
    training_state.pt                optimizer state etc., needed only for resuming
    sha256.json                      checksums of these files
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gridcap.common.config import PipelineConfig
from gridcap.common.errors import CheckpointError, explain_out_of_memory, first_line
from gridcap.common.files import fsync_path, sha256_of, temporary_sibling, write_json
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.registry import build_decoder, resolve_decoder

VERSION = 4  # 4: new configuration keys; 3: checksums; 2: other decoders
POINTERS = "checkpoints.json"
CHECKSUMS = "sha256.json"
_OTHER_CHECKPOINT = (
    "use another checkpoint of the run (runs/x/checkpoints/step-...), to evaluate it or to start a new run from it "
    "with --init-from"
)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, ready for inference.

    Attributes:
        path: folder of the checkpoint.
        decoder: on the CPU, in evaluation mode.
        vocabulary: vocabulary of the decoder.
        config: configuration of the run.
        provenance: provenance of the training features; features for inference must match it.
    """

    path: Path
    decoder: Decoder
    vocabulary: Vocabulary
    config: PipelineConfig
    provenance: dict[str, Any]


@dataclass(frozen=True)
class CheckpointContents:
    """The contents of a checkpoint to write.

    Attributes:
        step: number of finished steps.
        decoder: decoder for inference.
        vocabulary: vocabulary of the decoder.
        config: configuration of the run.
        provenance: provenance of the training features.
        training_state: tensors and plain values needed for resuming.
    """

    step: int
    decoder: Decoder
    vocabulary: Vocabulary
    config: PipelineConfig
    provenance: dict[str, Any]
    training_state: dict[str, Any]


def save_checkpoint(run: Path, contents: CheckpointContents, best_step: int) -> Path:
    """Write a checkpoint, update `checkpoints.json`, and delete the checkpoints that are neither best nor last.

    If the process is killed at any time, `checkpoints.json` still names complete checkpoints.

    Args:
        run: folder of the run.
        contents: contents of the checkpoint.
        best_step: step of the best checkpoint.

    Returns:
        The folder of the checkpoint.
    """
    folder = run / "checkpoints" / _name(contents.step)
    temporary = temporary_sibling(folder)
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, contents)
        if folder.exists():  # from a run that was killed before it updated the pointers
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        fsync_path(folder.parent)
    except OSError as error:
        error.filename = error.filename or str(folder)  # the error for a full disk does not name the file
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    pointers = {"last": folder.name, "best": _name(best_step)}
    write_json(run / POINTERS, pointers)
    for other in folder.parent.iterdir():
        if other.name not in pointers.values():
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _name(step: int) -> str:
    return f"step-{step:08}"


def _write_files(folder: Path, contents: CheckpointContents) -> None:
    """Write and flush all files of a checkpoint.

    The weights and the training state are serialized in memory: torch and safetensors hide the operating-system error
    of a full disk.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in contents.decoder.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights))
    header = {"format": "gridcap-checkpoint", "version": VERSION}
    write_json(folder / "config.json", header | {"pipeline": contents.config.model_dump(mode="json")})
    contents.vocabulary.save(folder / "vocabulary.json")
    write_json(folder / "provenance.json", contents.provenance)
    buffer = io.BytesIO()
    torch.save(contents.training_state, buffer)
    (folder / "training_state.pt").write_bytes(buffer.getbuffer())
    write_json(folder / CHECKSUMS, {file.name: sha256_of(file) for file in sorted(folder.iterdir())})
    for file in folder.iterdir():
        fsync_path(file)
    fsync_path(folder)


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: folder of a run (runs/x) or of a checkpoint (runs/x/checkpoints/step-00001234).
        which: "best" or "last"; ignored if `path` is a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or the file that names it is corrupted.
        OSError: the file that names it cannot be read.
    """
    if (path / "model.safetensors").is_file():
        return path
    try:
        name = json.loads((path / POINTERS).read_text(encoding="utf-8"))[which]
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "contains no checkpoint" if path.is_dir() else "not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {problem}", "pass the folder of a run written by train-decoder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / POINTERS}: corrupted: {error}",
            "pass one of its checkpoints/step-... to evaluate it, or to --init-from",
        ) from error
    return path / "checkpoints" / str(name)


def run_folder(path: Path) -> Path:
    """Return the folder of the run, given the run or one of its checkpoints."""
    return path.parent.parent if (path / "model.safetensors").is_file() else path


def load_checkpoint(path: Path, which: str = "best") -> Checkpoint:
    """Load a checkpoint for inference. No code from the checkpoint is executed.

    The run may still be in progress: if it replaces the checkpoint while it is read, the new one is loaded.

    Args:
        path: folder of a run or of a checkpoint.
        which: "best" or "last"; ignored if `path` is a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, corrupted, or of another version.
        OSError: a file cannot be read.
    """
    folder = find_checkpoint(path, which)
    while True:
        try:
            return _load(folder)
        except CheckpointError:
            latest = find_checkpoint(path, which)
            if latest == folder:
                raise
            folder = latest


def _load(folder: Path) -> Checkpoint:
    with _reading(folder / "config.json"):
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_version(folder, saved["version"])
        config = resolve_decoder(PipelineConfig.model_validate(saved["pipeline"]))
    _verify_checksums(folder, "config.json", "model.safetensors", "vocabulary.json", "provenance.json")
    with _reading(folder / "provenance.json"):
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        rows, columns, channels = (int(size) for size in provenance["grid_shape"])
    with _reading(folder / "vocabulary.json"):
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
    with _reading(folder / "model.safetensors"):
        weights = load_file(folder / "model.safetensors")
    try:
        decoder = build_decoder(config.train.decoder, len(vocabulary), (rows, columns, channels))
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        if explain_out_of_memory(error):
            raise
        mismatch = str(error).strip().splitlines()[-1].strip()  # the first line does not state it
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: corrupted checkpoint: weights do not match the configuration, the grid "
            f"shape, or the vocabulary of {len(vocabulary)} tokens: {mismatch}",
            _OTHER_CHECKPOINT,
        ) from error
    return Checkpoint(folder, decoder.eval(), vocabulary, config, provenance)


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Load the state that resuming needs in addition to the weights.

    Raises:
        CheckpointError: the file is missing or corrupted.
        OSError: the file cannot be read.
    """
    file = checkpoint / "training_state.pt"
    _verify_checksums(checkpoint, file.name)
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: contains objects other than tensors and plain values", _OTHER_CHECKPOINT
        ) from error
    except Exception as error:  # the loader raises many types of errors for corrupted files
        if isinstance(error, OSError) or explain_out_of_memory(error):
            raise
        raise CheckpointError(f"{file}: corrupted checkpoint: {first_line(error)}", _OTHER_CHECKPOINT) from error


def _check_version(folder: Path, version: int) -> None:
    if version > VERSION:
        raise CheckpointError(
            f"{folder}: written by a newer version of gridcap (format version {version})", "update gridcap"
        )
    if version < VERSION:
        raise CheckpointError(
            f"{folder}: written by an older version of gridcap (format version {version}, expected {VERSION})",
            "train again, or use the version of gridcap that wrote it",
        )


def _verify_checksums(folder: Path, *names: str) -> None:
    """Reject modified files: a flipped bit in a weight still gives a valid number."""
    with _reading(folder / CHECKSUMS):
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: str(checksums[name]) for name in names}
    for name in names:
        with _reading(folder / name):
            if sha256_of(folder / name) != expected[name]:
                raise ValueError("checksum mismatch")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Convert the errors of reading a file. Only unexpected content is corruption.

    Raises:
        CheckpointError: the file is missing or corrupted.
        OSError: the file cannot be read; it may be intact.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file", _OTHER_CHECKPOINT) from error
    except OSError as error:
        error.filename = error.filename or str(file)  # the error for a failed read does not name the file
        raise
    except (ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file}: corrupted checkpoint: {first_line(error)}", _OTHER_CHECKPOINT) from error
