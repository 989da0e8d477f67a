"""Encoder weights: identification, download, and loading of state dicts."""

from __future__ import annotations

import hashlib
import http.client
import pickle
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import models

from gridcap.common.download import retry_network_errors
from gridcap.common.errors import WeightsError, first_line
from gridcap.common.files import sha256_of
from gridcap.common.scenes import calibration_batch
from gridcap.extract.encoders.registry import find_encoder
from gridcap.extract.encoders.specs import CNNS

CALIBRATION_IMAGES = 32
# Part of the identity of random weights: another text is another identity.
RANDOM_RECIPE = "gridcap random weights, recipe 2: Kaiming uniform, BatchNorm calibrated on 32 scenes, one thread"
STATE_DICT_HINT = "use a state dict saved with torch.save or safetensors; pickled models are not loaded"


@dataclass(frozen=True)
class WeightsIdentity:
    """Identity of a set of weights.

    Random weights are a function of the encoder, the seed, and the rendered scenes that calibrate them; their SHA-256
    is the SHA-256 of that recipe.

    Attributes:
        name: display name.
        sha256: SHA-256 of the file, or of the recipe.
        random: whether the weights are random.
        file: the file, or None for random or missing weights.
    """

    name: str
    sha256: str
    random: bool
    file: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return the provenance entry."""
        return {"name": self.name, "sha256": self.sha256, "random": self.random}


def identify_weights(encoder: str, weights: str, download: bool = True) -> WeightsIdentity:
    """Locate the weights of an encoder without loading them; see `Encoder.identify_weights`.

    Raises:
        UserError: there is no encoder of this name.
        WeightsError: the weights are not available.
    """
    return find_encoder(encoder).identify_weights(weights, download)


def identify_file(weights: str) -> WeightsIdentity:
    """Return the identity of a weights file.

    Raises:
        WeightsError: there is no such file.
    """
    file = Path(weights)
    if not file.is_file():
        raise WeightsError(f"{file}: weights file not found", "pass --weights imagenet, random, or the path of a file")
    return WeightsIdentity(file.name, sha256_of(file), False, file)


def identify_cnn_weights(encoder: str, weights: str, download: bool = True) -> WeightsIdentity:
    """Locate the weights of a torchvision CNN without building it; download them once if needed.

    Args:
        encoder: name of the CNN.
        weights: "imagenet", "random", "random:SEED", or a file.
        download: download ImageNet weights that are not in torch's cache. If False, the identity of missing weights
            has the name "imagenet (not downloaded yet)" and no SHA-256.

    Raises:
        WeightsError: the file does not exist, is corrupted, or cannot be downloaded.
    """
    if match := re.fullmatch(r"random(?::(\d+))?", weights):
        seed = int(match[1] or 0)
        recipe = hashlib.sha256(f"{RANDOM_RECIPE}; {encoder}, seed {seed}".encode())
        recipe.update(calibration_batch(CALIBRATION_IMAGES, CNNS[encoder].side).data)
        return WeightsIdentity(f"random:{seed}", recipe.hexdigest(), True, None)
    if weights == "imagenet":
        url = imagenet_url(encoder)
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not download and not file.exists():
            return WeightsIdentity("imagenet (not downloaded yet)", "", False, None)
        return WeightsIdentity(imagenet_name(encoder), _download(url, file), False, file)
    return identify_file(weights)


def imagenet_name(encoder: str) -> str:
    """Return the name of torchvision's ImageNet weights in the provenance."""
    return f"imagenet ({CNNS[encoder].weights.rpartition('.')[2]})"


def imagenet_url(encoder: str) -> str:
    """Return the address of torchvision's ImageNet weights."""
    return str(models.get_weight(CNNS[encoder].weights).url)


def _download(url: str, file: Path) -> str:
    """Download weights to `file` unless it exists; return its SHA-256 after checking it against the file name."""
    manual = f"download {url} on another machine and copy it there, or pass the file with --weights"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            retry_network_errors(lambda: torch.hub.download_url_to_file(url, str(file), hash_prefix=hash_in(file.name)))
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or f"{type(error).__name__}: {first_line(error)}"
            raise WeightsError(f"{file}: not found, and the download failed: {reason}", manual) from error
    sha256 = sha256_of(file)
    if not sha256.startswith(hash_in(file.name)):
        raise WeightsError(
            f"{file}: corrupted: its SHA-256 does not start with {hash_in(file.name)}", f"delete it; {manual}"
        )
    return sha256


def hash_in(name: str) -> str:
    """Return the SHA-256 prefix in one of torchvision's file names, such as name-0cc3c7bd.pth."""
    return name.rpartition("-")[2].partition(".")[0]


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Load a state dict without executing code from the file.

    Wrappers ({"state_dict": ...}, {"model": ...}) and the prefix "module." of DataParallel are removed.

    Raises:
        WeightsError: the file is corrupted or does not contain a state dict.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError, EOFError) as error:  # a text file may fail in any of these ways
        raise WeightsError(f"{file}: not a state dict of tensors", STATE_DICT_HINT) from error
    except Exception as error:  # the loaders raise many types for a corrupted file
        raise WeightsError(f"{file}: cannot be read as weights: {first_line(error)}", STATE_DICT_HINT) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{file}: does not contain a state dict (name -> tensor)", STATE_DICT_HINT)
    return {name.removeprefix("module."): value for name, value in state.items()}
