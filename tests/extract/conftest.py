"""Fixtures for stage one: folders of small images, and a tiny encoder whose grids are easy to verify."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import gridcap.extract.encoders.torchvision as torchvision_module
import gridcap.extract.encoding as encoding_module
import gridcap.extract.indexing as indexing_module
import gridcap.extract.job as job_module
from gridcap.common.captions.images import list_images
from gridcap.common.config import load_config
from gridcap.common.process import keep_large_buffers
from gridcap.extract.encoders.grid_encoder import EncoderOptions
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.weights import identify_cnn_weights
from gridcap.extract.job import Extraction, ExtractionRequest, prepare
from gridcap.extract.run import extract_features
from gridcap.extract.staging import PendingGrids

GRID = (2, 2, 3)
_identify_once = functools.cache(identify_cnn_weights)  # rendering the scenes for random weights is slow


class FakeEncoder:
    """Averages the quadrants of an image; a grid depends on the pixels of its own image only."""

    side = 16
    grid_shape = GRID
    gpu_seconds = None
    built = 0
    batches: list[int] = []  # noqa: RUF012  # size of each encoded batch, over all instances

    def __init__(self, name: str, identity: Any, options: EncoderOptions, settings: Any = None) -> None:
        self._dtype = options.dtype
        type(self).built += 1

    def encode(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (self.side, self.side, 3)
        type(self).batches.append(len(images))
        return self.grids(images).astype(self._dtype)

    def submit(self, images: np.ndarray, batch_size: int | None = None) -> PendingGrids:
        grids = self.encode(images)
        return PendingGrids(lambda: grids)

    @staticmethod
    def grids(images: np.ndarray) -> np.ndarray:
        """float64 (B, 2, 2, 3): row, column, channel."""
        return images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4))


@pytest.fixture(autouse=True, scope="session")
def _large_buffers() -> None:
    """Configure the allocator as every command does before loading torch; it doubles the encoder's speed."""
    keep_large_buffers()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder: the commands would read the repository's pipeline.yaml."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_waiting_for_network_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing_module, "LISTING_INTERVAL", 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEncoder]:
    """Replace the CNN by a new FakeEncoder class."""

    class Fake(FakeEncoder):
        built = 0
        batches: list[int] = []  # noqa: RUF012

    def describe(*args: Any) -> dict[str, Any]:
        return {**describe_features(*args), "grid_shape": list(GRID)}

    monkeypatch.setattr(encoding_module, "GridEncoder", Fake)
    monkeypatch.setattr(job_module, "describe_features", describe)
    monkeypatch.setattr(torchvision_module, "identify_cnn_weights", _identify_once)
    return Fake


@pytest.fixture
def photos(tmp_path: Path):
    """Create a folder of `count` different lossless 16 x 16 images; those in `invalid` are text files."""

    def make(count: int, invalid: dict[int, str] | None = None, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            path = folder / f"{i:04}.png"
            rng = np.random.default_rng(i)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        for i, content in (invalid or {}).items():
            (folder / f"{i:04}.png").write_text(content)
        return folder

    return make


@pytest.fixture
def job(tmp_path: Path):
    """Prepare the extraction of a folder; keyword arguments set configuration keys: `extract__batch_size=2`."""

    def make(
        images: Path, output: Path | None = None, records: list[Any] | None = None, append: bool = False, **keys: Any
    ) -> Extraction:
        flags = {"extract.weights": "random", "extract.precision": "float32", "data.splits.s.images": images}
        flags.update({key.replace("__", "."): value for key, value in keys.items()})
        config = load_config(None, flags)
        records = list_images(images).records if records is None else records
        output = output or tmp_path / "features" / "s.h5"
        return prepare(ExtractionRequest(config, "s", records, images, output, append=append))

    return make


@pytest.fixture
def extracted(job):
    """Run an extraction to completion; return the extraction and its summary."""

    def run(images: Path, output: Path | None = None, **keys: Any):
        prepared = job(images, output, **keys)
        return prepared, extract_features(prepared, show_progress=False)

    return run


@pytest.fixture
def pipeline(tmp_path: Path):
    """Write pipeline.yaml into the current folder."""

    def write(**splits: dict[str, Any]) -> None:
        values = {n: {k: str(v) if isinstance(v, Path) else v for k, v in s.items()} for n, s in splits.items()}
        tree = {"data": {"splits": values}, "extract": {"weights": "random", "precision": "float32"}}
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))

    return write


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables of launchers, wherever these tests run."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "JOB_COMPLETION_INDEX"):
            monkeypatch.delenv(name)
    return monkeypatch
