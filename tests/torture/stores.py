"""A small store made by the real extraction, with an encoder that only averages: what is tortured is all around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gridcap.extract.encoding
import gridcap.extract.job
from gridcap.common.captions.folder import FolderImages
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
    """The mean colors of an image's quarters."""

    side = 16
    grid_shape = GRID

    def __init__(self, name: str, identity: Any, options: EncoderOptions) -> None:
        self._dtype = options.dtype

    def submit(self, images: np.ndarray) -> PendingGrids:
        """Grids of uint8 (B, 16, 16, 3)."""
        grids = images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).astype(self._dtype)
        return PendingGrids(lambda: grids)


def _describe(*arguments: Any) -> dict[str, Any]:
    return {**describe_features(*arguments), "grid_shape": list(GRID)}


def use_mean_encoder() -> None:
    """Put MeanEncoder in the place of the CNN, in this process."""
    setattr(gridcap.extract.encoding, "GridEncoder", MeanEncoder)  # noqa: B010 (mypy would not have it otherwise)
    setattr(gridcap.extract.job, "describe_features", _describe)  # noqa: B010


def use_real_encoder() -> None:
    """Put the CNN back in its place."""
    setattr(gridcap.extract.encoding, "GridEncoder", GridEncoder)  # noqa: B010
    setattr(gridcap.extract.job, "describe_features", describe_features)  # noqa: B010


def write_photos(folder: Path) -> Path:
    """PHOTOS pictures, one of them text."""
    folder.mkdir(parents=True)
    for i in range(PHOTOS):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.png")
    (folder / "007.png").write_text("no picture")
    return folder


def make_job(photos: Path, output: Path) -> Extraction:
    """What the extraction of these photos needs."""
    flags = {
        "extract.weights": "random",
        "extract.shard_size": SHARD,
        "extract.batch_size": 2,
        "extract.num_workers": 2,
    }
    config = load_config(None, {**flags, "extract.precision": "float32", "extract.device": "cpu"})
    return prepare(ExtractionRequest(config, "torture", FolderImages(photos), photos, output, threads=1))


def extract_all(photos: Path, output: Path, share: Share = WHOLE) -> Summary:
    """Make the store, or a worker's share of it, or what is missing of it."""
    use_mean_encoder()
    return extract_features(make_job(photos, output), share, show_progress=False)
