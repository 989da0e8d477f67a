"""Tiny stores, captions, and configurations for the tests of `gridcap.train`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import settings

from gridcap.common.captions.records import ImageRecord
from gridcap.common.config import CaptionConfig, PipelineConfig, TrainConfig
from gridcap.common.store.codecs import codec_of
from gridcap.common.store.index_writer import IndexSpec, write_index
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.lstm import LstmConfig

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")

GRID = (2, 2, 8)
VARIANTS = [(color, shape) for color in ("red", "green", "blue") for shape in ("square", "circle")]
TINY_DECODERS = {
    "lstm": LstmConfig(embed_size=12, hidden_size=24, dropout=0.1),
    "attention": AttentionConfig(cell="gru", embed_size=12, hidden_size=24, attention_size=8, dropout=0.1),
}
PLAIN: dict[str, Any] = {  # a few steps converge faster without what helps on real data
    "schedule": {"kind": "constant", "warmup_steps": 0},
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Use one torch thread: faster on tiny tensors, and the same summation order in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_provenance(**changes):
    return {
        "encoder": "inception_v3",
        "layer": "Mixed_7c",
        "weights": {"name": "imagenet (fake)", "sha256": "0cc3c7bd" * 8, "random": False},
        "preprocessing": {
            "decoder": "pillow",
            "resize_mode": "stretch",
            "side": 299,
            "resize": "bilinear, antialiased",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
        "grid_shape": list(GRID),
        "dtype": "float16",
        "precision": "float32",
        "versions": {"pillow": "10.1.0", "torch": "2.6.0", "torchvision": "0.21.0"},
        **changes,
    }


@pytest.fixture(scope="session")
def provenance():
    """Return a function that makes a complete provenance; keywords override entries."""
    return make_provenance


def write_store(
    path: Path,
    grids: np.ndarray,
    image_ids: Sequence[int] | None = None,
    file_names: Sequence[str] | None = None,
    invalid_reasons: Mapping[int, str] | None = None,
    split: str = "train",
    shard_size: int = 7,
    **provenance,
) -> FeatureStore:
    """Write a feature store with several shards, and open it."""
    ids = list(image_ids if image_ids is not None else range(len(grids)))
    names = list(file_names or (f"{i:03}.jpg" for i in ids))
    complete = make_provenance(grid_shape=list(grids.shape[1:]), dtype=str(grids.dtype)) | provenance
    images = []
    for index, start in enumerate(range(0, len(grids), shard_size)):
        part = slice(start, start + shard_size)
        invalid = {
            row - start: why for row, why in (invalid_reasons or {}).items() if start <= row < start + shard_size
        }
        shard = path.with_suffix("") / f"{index:05}.h5"
        images.append(list(zip(ids[part], names[part], strict=True)))
        layout = GridLayout(grids.shape[1:], codec_of(grids.dtype))
        with ShardWriter(shard, ShardSpec(images[-1], layout, complete, index, f"plan of {path.name}")) as writer:
            writer.write(0, grids[part].copy(), invalid)
            writer.finish()
    shards = [f"{index:05}.h5" for index in range(len(images))]
    longest = max(len(name.encode()) for name in names)
    plans = [f"plan of {path.name}"] * len(shards)
    write_index(path, IndexSpec(path.with_suffix(""), shards, plans, images, longest, split, complete))
    return FeatureStore(path)


@pytest.fixture(scope="session")
def new_store():
    """Return `write_store`; the stores are closed afterwards."""
    stores = []

    def make(*args, **kwargs):
        stores.append(write_store(*args, **kwargs))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def learnable_grids(count: int, seed: int = 0) -> np.ndarray:
    """Return grids whose brightest channel encodes the color and shape of the image."""
    rng = np.random.default_rng(seed)
    grids = rng.normal(0, 0.1, (count, *GRID))
    for i in range(count):
        grids[i, ..., i % len(VARIANTS)] += 3
    return grids.astype(np.float16)


def learnable_records(count: int, first_id: int = 100) -> list[ImageRecord]:
    """Return one to three captions per image, consistent with `learnable_grids`."""
    records = []
    for i in range(count):
        color, shape = VARIANTS[i % len(VARIANTS)]
        captions = (f"a {color} {shape}", f"A {shape} that is {color}.", f"one {color} {shape} here")
        records.append(ImageRecord(first_id + i, f"{first_id + i:03}.jpg", captions[: 1 + i % 3]))
    return records


def write_coco(path: Path, records: Sequence[ImageRecord]) -> Path:
    """Write records as a COCO captions file."""
    captions = [(r.image_id, text) for r in records for text in r.captions]
    tree = {
        "images": [{"id": r.image_id, "file_name": r.file_name} for r in records],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="session")
def coco_file():
    """Return `write_coco`."""
    return write_coco


@pytest.fixture(scope="session")
def new_data(new_store):
    """Return a function that writes learnable images and captions to a new store."""

    def make(path: Path, count: int = 24, first_id: int = 100, seed: int = 0, **store) -> CaptionedImages:
        records = learnable_records(count, first_id)
        opened = new_store(path, learnable_grids(count, seed), [r.image_id for r in records], **store)
        return CaptionedImages.join(opened, records, write_coco(path.with_suffix(".json"), records))

    return make


@pytest.fixture
def train_data(tmp_path, new_data):
    """Training data: 24 learnable images."""
    return new_data(tmp_path / "train.h5")


@pytest.fixture
def val_data(tmp_path, new_data):
    """Validation data: 9 other learnable images."""
    return new_data(tmp_path / "val.h5", 9, first_id=500, seed=1, split="val")


def make_config(output: Path, seed: int = 0, caption: CaptionConfig | None = None, **train) -> PipelineConfig:
    values = {
        "decoder": TINY_DECODERS["attention"],
        "epochs": 2,
        "batch_size": 5,
        "captions_per_image": 2,
        "learning_rate": 0.01,
        "max_length": 8,
        "precision": "float32",
        "device": "cpu",
        "output": output,
        "min_vocabulary": 0,
        "max_unk": 1,
        **PLAIN,
    }
    caption_config = caption or CaptionConfig(beam_size=2, max_length=8, batch_size=4)
    return PipelineConfig(seed=seed, train=TrainConfig(**values | train), caption=caption_config)


@pytest.fixture(scope="session")
def new_config():
    """Return a function that makes the configuration of a tiny run; keywords are keys of the `train` section."""
    return make_config


@pytest.fixture(scope="session")
def tiny_decoders():
    """Return tiny decoder configurations by family."""
    return TINY_DECODERS


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    """Empty the PATH, so that Java is not found."""
    empty = tmp_path / "empty-path"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


TINY_PROJECT = {
    "seed": 1,
    "data": {
        "features_dir": "features",
        "splits": {
            "train": {"images": "images", "annotations": "train.json"},
            "val": {"images": "images", "annotations": "val.json"},
            "test": {"images": "images", "annotations": "test.json"},
        },
    },
    "train": {
        "decoder": {"family": "attention", "cell": "gru", "embed_size": 12, "hidden_size": 24, "attention_size": 8},
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.01,
        "captions_per_image": 2,
        "max_length": 8,
        "precision": "float32",
        "device": "cpu",
        "output": "runs/a",
        "min_vocabulary": 0,
        "max_unk": 1,
        **PLAIN,
    },
    "caption": {"beam_size": 2, "max_length": 8, "batch_size": 4},
}


@pytest.fixture(scope="session")
def project_template(tmp_path_factory, new_data):
    """A project folder: three stores, their captions, pipeline.yaml, a finished run, and its output."""
    from gridcap.train.cli import train_decoder

    folder = tmp_path_factory.mktemp("project")
    (folder / "features").mkdir()
    sizes = {"train": (18, 100), "val": (6, 500), "test": (7, 700)}
    for seed, (split, (count, first)) in enumerate(sizes.items()):
        new_data(folder / "features" / f"{split}.h5", count, first_id=first, seed=seed, split=split)
        (folder / "features" / f"{split}.json").rename(folder / f"{split}.json")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(TINY_PROJECT))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(train_decoder, ["--output", "runs/done"])
    assert done.exit_code == 0, done.output
    (folder / "train-output.txt").write_text(done.output)
    return folder


@pytest.fixture
def project(project_template, tmp_path, monkeypatch):
    """A copy of the project folder, which is also the current folder."""
    shutil.copytree(project_template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="session")
def invoke():
    """Return a function that runs a command and returns its output; errors must have a hint and no traceback."""

    def run(command, *arguments, status=0):
        done = CliRunner().invoke(command, [str(a) for a in arguments])
        assert done.exit_code == status, done.output
        if status:
            assert "Traceback" not in done.output
            assert "what to do:" in done.output or "Usage:" in done.output
        return done.output

    return run


@pytest.fixture(scope="session")
def files():
    """Return a function that reads the bytes of every file in a folder."""
    return lambda folder: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
