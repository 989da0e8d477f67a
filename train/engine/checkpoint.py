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
    training_state.pt                optimizer state etc., needed for resuming only
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
from gridcap.common.errors import CheckpointError, first_line
from gridcap.common.files import fsync_path, sha256_of, temporary_sibling, write_json
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.build import build_decoder

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
    """What `save_checkpoint` writes.

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
        contents: what to write.
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
        CheckpointError: there is no checkpoint.
    """
    if (path / "model.safetensors").is_file():
        return path
    try:
        name = json.loads((path / POINTERS).read_text(encoding="utf-8"))[which]
    except FileNotFoundError as error:
        problem = "no such folder" if not path.exists() else "contains no checkpoint"
        raise CheckpointError(f"{path}: {problem}", "pass the folder of a run written by train-decoder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
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

    Args:
        path: folder of a run or of a checkpoint.
        which: "best" or "last"; ignored if `path` is a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, corrupted, or of another version.
    """
    folder = find_checkpoint(path, which)
    with _corruption_as_checkpoint_error(folder / "config.json"):
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_version(folder, saved["version"])
        config = PipelineConfig.model_validate(saved["pipeline"])
    _verify_checksums(folder, "config.json", "model.safetensors", "vocabulary.json", "provenance.json")
    with _corruption_as_checkpoint_error(folder / "provenance.json"):
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        grid_shape = [int(size) for size in provenance["grid_shape"]]
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    with _corruption_as_checkpoint_error(folder / "model.safetensors"):
        decoder = build_decoder(config.train.decoder, len(vocabulary), grid_shape)
        weights = load_file(folder / "model.safetensors")
        try:
            decoder.load_state_dict(weights)
        except RuntimeError as error:  # the first line of this message does not state the mismatch
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError(
                f"weights do not match the configuration, the grid shape, or the vocabulary of {len(vocabulary)} "
                f"tokens: {lines[-1]}"
            ) from error
    return Checkpoint(folder, decoder.eval(), vocabulary, config, provenance)


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Load the state that resuming needs in addition to the weights.

    Raises:
        CheckpointError: the file is missing or corrupted.
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
    except Exception as error:  # corrupted files make the loader raise many types of errors
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}", _OTHER_CHECKPOINT) from error


def _check_version(folder: Path, version: int) -> None:
    if version > VERSION:
        raise CheckpointError(f"{folder}: written by a newer version of gridcap (format {version})", "update gridcap")
    if version < VERSION:
        raise CheckpointError(
            f"{folder}: written by an older version of gridcap (format {version}, expected {VERSION})",
            "train again, or use the version of gridcap that wrote it",
        )


def _verify_checksums(folder: Path, *names: str) -> None:
    """Reject modified files: a flipped bit in a weight still gives a valid number."""
    with _corruption_as_checkpoint_error(folder / CHECKSUMS):
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: str(checksums[name]) for name in names}
    for name in names:
        with _corruption_as_checkpoint_error(folder / name):
            if sha256_of(folder / name) != expected[name]:
                raise ValueError("checksum mismatch")


@contextlib.contextmanager
def _corruption_as_checkpoint_error(file: Path) -> Iterator[None]:
    """Turn the errors that a corrupted file causes in its reader into an error that names the file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: corrupted checkpoint: {first_line(error)}", _OTHER_CHECKPOINT) from error
