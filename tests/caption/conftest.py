"""Fixtures for captioning: checkpoints of tiny random decoders, and a fake encoder that averages pixels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gridcap.caption.captioner as captioner_module
import gridcap.extract.encoders.torchvision as torchvision_module
from gridcap.common.config import PipelineConfig, load_config
from gridcap.common.image import decoder_name
from gridcap.common.process import keep_large_buffers
from gridcap.extract.encoders.grid_encoder import EncoderOptions
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.registry import find_encoder
from gridcap.extract.encoders.weights import identify_cnn_weights
from gridcap.train.data.vocabulary import EOS, Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.engine.checkpoint import CheckpointContents, save_checkpoint

WORDS = ["a", "large", "small", "red", "blue", "ring", "cross", "in", "the", "corner"]
_identify_once = functools.cache(identify_cnn_weights)  # slow: random weights are calibrated on rendered scenes


class FakeEncoder:
    """Random projections of the mean colors of 8 x 8 cells: a pure function of the pixels with the real grid shape."""

    side = 299
    grid_shape = (8, 8, 2048)

    def __init__(self, name: str, identity: Any, options: EncoderOptions, settings: Any = None) -> None:
        self._dtype = options.dtype
        self._projection = np.random.default_rng(0).normal(size=(3, 2048))

    def encode(self, images: np.ndarray) -> np.ndarray:
        assert images.shape[1:] == (299, 299, 3)
        colors = images[:, :296, :296].reshape(-1, 8, 37, 8, 37, 3).mean((2, 4)) / 255
        return ((colors - 0.5) @ self._projection).astype(self._dtype)


@pytest.fixture(autouse=True, scope="session")
def _large_buffers() -> None:
    """Tune the allocator as every command does before it loads torch; it doubles the speed of the encoder."""
    keep_large_buffers()


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder: commands would read the pipeline.yaml of the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEncoder]:
    """Replace the CNN with FakeEncoder."""
    monkeypatch.setattr(captioner_module, "GridEncoder", FakeEncoder)
    monkeypatch.setattr(torchvision_module, "identify_cnn_weights", _identify_once)
    return FakeEncoder


def features_of(weights: str = "random", **change: Any) -> dict[str, Any]:
    """Return the provenance of inception_v3 features."""
    identity = _identify_once("inception_v3", weights)
    provenance = describe_features(
        find_encoder("inception_v3"), identity, EncoderOptions("float32", "cpu"), "stretch", decoder_name()
    )
    return provenance | change


def decoder_config(family: str) -> PipelineConfig:
    sizes = {"family": family, "embed_size": 8, "hidden_size": 12}
    if family == "attention":
        sizes |= {"attention_size": 6, "cell": "gru"}
    return load_config(None, {"train.decoder": sizes})


def tiny_decoder(config: PipelineConfig, seed: int, end_bias: float) -> Decoder:
    """Return a random decoder whose captions depend on the grid; a larger `end_bias` makes them shorter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = build_decoder(config.train.decoder, len(WORDS) + 4, (8, 8, 2048))
        with torch.no_grad():
            for value in decoder.parameters():
                if value.dim() == 2:
                    value.normal_(0, 2.5 / value.shape[1] ** 0.5)
            decoder.output.bias[EOS] += end_bias
    return decoder.eval()


@pytest.fixture
def checkpoint(tmp_path: Path):
    """Return a function that saves a run with one checkpoint and returns its folder."""

    def make(
        family: str = "attention",
        seed: int = 1,
        end_bias: float = 0.0,
        provenance: dict[str, Any] | None = None,
        name: str = "run",
    ) -> Path:
        config = decoder_config(family)
        decoder, words = tiny_decoder(config, seed, end_bias), Vocabulary.build([" ".join(WORDS)])
        contents = CheckpointContents(1, decoder, words, config, provenance or features_of(), {})
        save_checkpoint(tmp_path / name, contents, best_step=1)
        return tmp_path / name

    return make


@pytest.fixture
def provenance_of():
    """Return a function that builds a provenance: `provenance_of(weights="random:1", dtype="float32")`."""
    return features_of


@pytest.fixture
def scenes(tmp_path: Path):
    """Return a function that writes `count` small JPEGs of colored patches; those in `invalid` are text files."""

    def make(count: int, invalid: tuple[int, ...] = (), size: tuple[int, int] = (64, 64), name: str = "scenes") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).save(folder / f"{i}.jpg", quality=95)
        for i in invalid:
            (folder / f"{i}.jpg").write_text("this is not an image")
        return folder

    return make
