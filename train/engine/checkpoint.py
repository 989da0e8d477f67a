"""Checkpoints: folders without pickled code, written whole or not at all.

runs/x/config.yaml                   the resolved configuration of the run
runs/x/metrics.jsonl                 a line an epoch
runs/x/steps.jsonl                   a line every 20 steps; tensorboard/ holds the same
runs/x/curves.png                    both, drawn
runs/x/checkpoints.json              which checkpoint is the best and which the last
runs/x/checkpoints/step-00001234/
    model.safetensors                weights (averaged, where the run averages)
    config.json                      configuration
    vocabulary.json                  words
    provenance.json                  which features it was trained on
    training_state.pt                what a resume needs besides
    sha256.json                      of each of these files
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

VERSION = 3  # 2 had no checksums, 1 had other decoders
POINTERS = "checkpoints.json"
_CHECKSUMS = "sha256.json"
_REFUSED = (
    "use another checkpoint of the run (runs/x/checkpoints/step-...): to evaluate, or to go on from in a new run by "
    "--init-from"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a captioner needs, loaded.

    Attributes:
        path: its folder.
        decoder: on the CPU, in evaluation mode.
        vocabulary: its words.
        config: of the run that made it.
        provenance: of the features it was trained on; everything that feeds the decoder must match it.
    """

    path: Path
    decoder: Decoder
    vocabulary: Vocabulary
    config: PipelineConfig
    provenance: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    decoder: Decoder,
    vocabulary: Vocabulary,
    config: PipelineConfig,
    provenance: dict[str, Any],
    state: dict[str, Any],
    best_step: int,
) -> Path:
    """Write a checkpoint, then say in `checkpoints.json` that it is the last, then remove those nobody needs.

    Killed at any moment, `checkpoints.json` names whole checkpoints.

    Args:
        run: folder of the run.
        step: steps done.
        decoder: what is to be used.
        state: tensors and plain values that a resume needs.
        best_step: steps done when the best checkpoint was made.
    """
    final = run / "checkpoints" / f"step-{step:08}"
    temporary = temporary_sibling(final)
    temporary.mkdir(parents=True)
    try:
        # As bytes, which we write: torch and safetensors say of a full disk that something of theirs failed.
        weights = {k: v.detach().cpu().contiguous() for k, v in decoder.state_dict().items()}
        (temporary / "model.safetensors").write_bytes(save(weights))
        write_json(temporary / "config.json", {"format": "gridcap-checkpoint", "version": VERSION, **_plain(config)})
        vocabulary.save(temporary / "vocabulary.json")
        write_json(temporary / "provenance.json", provenance)
        content = io.BytesIO()
        torch.save(state, content)
        (temporary / "training_state.pt").write_bytes(content.getbuffer())
        write_json(temporary / _CHECKSUMS, {file.name: sha256_of(file) for file in sorted(temporary.iterdir())})
        for file in temporary.iterdir():
            fsync_path(file)
        fsync_path(temporary)
        if final.exists():  # of a run killed after this rename and before the pointers moved
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_path(final.parent)
    except OSError as error:
        error.filename = error.filename or str(final)  # a full disk does not say what did not fit
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    keep = {"last": final.name, "best": f"step-{best_step:08}"}
    write_json(run / POINTERS, keep)
    for folder in final.parent.iterdir():
        if folder.name not in keep.values():
            shutil.rmtree(folder, ignore_errors=True)
    return final


def _plain(config: PipelineConfig) -> dict[str, Any]:
    return {"pipeline": config.model_dump(mode="json")}


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """The checkpoint's folder, given it or its run's folder.

    Args:
        path: runs/x, or runs/x/checkpoints/step-00001234.
        which: "best" or "last", of a run.

    Raises:
        CheckpointError: no checkpoint there.
    """
    if (path / "model.safetensors").is_file():
        return path
    try:
        name = json.loads((path / POINTERS).read_text(encoding="utf-8"))[which]
    except FileNotFoundError as error:
        what = "no such folder" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(f"{path}: {what}", "give the folder of a run made by train-decoder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / POINTERS}: damaged: {error}", "give one of its checkpoints/step-... to evaluate or to --init-from"
        ) from error
    return path / "checkpoints" / str(name)


def run_folder(path: Path) -> Path:
    """The run that a checkpoint belongs to, given either."""
    return path.parent.parent if (path / "model.safetensors").is_file() else path


def load_checkpoint(path: Path, which: str = "best") -> Checkpoint:
    """Load a checkpoint; no code from it is ever run.

    Args:
        path: of a run or of a checkpoint.
        which: "best" or "last", of a run.

    Raises:
        CheckpointError: missing, damaged, or of a newer version.
    """
    folder = find_checkpoint(path, which)
    with _damage_of(folder / "config.json"):
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if saved["version"] > VERSION:
            raise CheckpointError(f"{folder}: made by a newer gridcap (version {saved['version']})", "update gridcap")
        if saved["version"] < VERSION:
            raise CheckpointError(
                f"{folder}: made by an older gridcap (version {saved['version']})",
                "train again, or use the gridcap it was made with",
            )
        config = PipelineConfig.model_validate(saved["pipeline"])
    _compare(folder, "config.json", "model.safetensors", "vocabulary.json", "provenance.json")
    with _damage_of(folder / "provenance.json"):
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        grid_shape = [int(size) for size in provenance["grid_shape"]]
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    with _damage_of(folder / "model.safetensors"):
        decoder = build_decoder(config.train.decoder, len(vocabulary), grid_shape)
        weights = load_file(folder / "model.safetensors")
        try:
            decoder.load_state_dict(weights)
        except RuntimeError as error:  # whose first line does not say what is wrong
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError(
                f"does not fit its configuration, its grids and its vocabulary of {len(vocabulary)} words: {lines[-1]}"
            ) from error
    return Checkpoint(folder, decoder.eval(), vocabulary, config, provenance)


def _compare(folder: Path, *names: str) -> None:
    """Refuse files that are not what was written: a flipped bit in a weight is a number like any other."""
    with _damage_of(folder / _CHECKSUMS):
        written = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: str(written[name]) for name in names}
    for name in names:
        with _damage_of(folder / name):
            if sha256_of(folder / name) != expected[name]:
                raise ValueError("its bytes are not those that were written")


@contextlib.contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into an error that names the file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged checkpoint: {first_line(error)}", _REFUSED) from error


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """What a resume needs besides the weights.

    Raises:
        CheckpointError: missing or damaged.
    """
    file = checkpoint / "training_state.pt"
    _compare(checkpoint, file.name)
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: holds something else than tensors and plain values", _REFUSED) from error
    except Exception as error:  # whatever a damaged file leads the loader to raise
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}", _REFUSED) from error
