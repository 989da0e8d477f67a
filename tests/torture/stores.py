"""Small stores written by the real extraction with a fake encoder that averages pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gridcap.extract.encoding
import gridcap.extract.job
from gridcap.common.captions.images import SourceImages
from gridcap.common.config import load_config
from gridcap.extract.cluster.share import WHOLE, Share
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.job import Extraction, ExtractionRequest, prepare
from gridcap.extract.run import extract_features
from gridcap.extract.staging import PendingGrids
from gridcap.extract.summary import Summary

GRID = (2, 2, 3)
PHOTOS = 22
SHARD = 4


class MeanEncoder:
    """Fake encoder that returns the mean colors of the quarters of an image."""

    side = 16
    grid_shape = GRID
    gpu_seconds = None

    def __init__(self, name: str, identity: Any, options: EncoderOptions, settings: Any = None) -> None:
        self._dtype = options.dtype

    def submit(self, images: np.ndarray, batch_size: int | None = None) -> PendingGrids:
        """Return the grids of uint8 (B, 16, 16, 3)."""
        grids = images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).astype(self._dtype)
        return PendingGrids(lambda: grids)


def _describe(*arguments: Any) -> dict[str, Any]:
    return {**describe_features(*arguments), "grid_shape": list(GRID)}


def use_mean_encoder() -> None:
    """Replace the CNN with MeanEncoder in this process."""
    setattr(gridcap.extract.encoding, "GridEncoder", MeanEncoder)  # noqa: B010 (mypy rejects the assignment)
    setattr(gridcap.extract.job, "describe_features", _describe)  # noqa: B010


def use_real_encoder() -> None:
    """Restore the CNN."""
    setattr(gridcap.extract.encoding, "GridEncoder", GridEncoder)  # noqa: B010
    setattr(gridcap.extract.job, "describe_features", describe_features)  # noqa: B010


def write_photos(folder: Path) -> Path:
    """Write PHOTOS images, one of which is a text file."""
    folder.mkdir(parents=True)
    for i in range(PHOTOS):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.png")
    (folder / "007.png").write_text("not an image")
    return folder


def make_job(photos: Path, output: Path) -> Extraction:
    """Prepare the extraction of these photos."""
    flags = {
        "extract.weights": "random",
        "extract.shard_size": SHARD,
        "extract.batch_size": 2,
        "extract.num_workers": 2,
    }
    config = load_config(None, {**flags, "extract.precision": "float32", "extract.device": "cpu"})
    return prepare(ExtractionRequest(config, "torture", SourceImages(photos), photos, output, threads=1))


def extract_all(photos: Path, output: Path, share: Share = WHOLE) -> Summary:
    """Extract the missing shards of the store, or a share of them."""
    use_mean_encoder()
    return extract_features(make_job(photos, output), share, show_progress=False)
