"""Training runs of a tiny decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gridcap.common.captions.images import SourceImages
from gridcap.common.config import load_config
from gridcap.common.store.reader import FeatureStore
from gridcap.train.data.inputs import join_captions
from gridcap.train.engine.checkpoint import find_checkpoint
from gridcap.train.engine.loop import fit
from tests.torture.case import require
from tests.torture.stores import extract_all, write_photos

WORDS = ("red", "green", "blue", "gray", "small", "large", "ring", "cross")


def prepare(folder: Path) -> None:
    """Write a store and its captions file."""
    photos = write_photos(folder / "photos")
    extract_all(photos, folder / "train.h5")
    records = list(SourceImages(photos))
    captions = [
        {"id": 3 * n + k, "image_id": r.image_id, "caption": f"a {WORDS[n % 8]} {WORDS[(n + k) % 8]} thing"}
        for n, r in enumerate(records)
        for k in range(3)
    ]
    images = [{"id": r.image_id, "file_name": r.file_name} for r in records]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))


def prepare_trained(folder: Path) -> None:
    """Write a store, its captions file, and a run trained on them, `baseline`."""
    prepare(folder)
    train(folder, folder / "baseline", resume=False)


def require_same_weights(run: Path, baseline: Path) -> None:
    """Raise FailedError unless two runs ended at the same step with the same bytes."""
    actual, expected = find_checkpoint(run, "last"), find_checkpoint(baseline, "last")
    require(actual.name == expected.name, f"{actual.name} instead of {expected.name}")
    same = (actual / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    require(same, "the weights differ")


def train(folder: Path, output: Path, resume: bool, init_from: Path | None = None) -> list[dict[str, Any]]:
    """Start or resume the run in `output`; `init_from` is a run whose decoder is used for initialization."""
    decoder = {"family": "attention", "embed_size": 8, "hidden_size": 12, "attention_size": 6, "dropout": 0.2}
    config = load_config(
        None,
        {
            "train.decoder": decoder,
            "train.output": output,
            "train.epochs": 3,
            "train.batch_size": 4,
            "train.captions_per_image": 2,
            "train.max_length": 8,
            "train.min_vocabulary": 0,
            "train.ema_decay": 0.9,
            "train.checkpoint_steps": 2,
            "train.init_from": init_from,
            "train.precision": "float32",
            "train.device": "cpu",
            "train.learning_rate": 0.01,
        },
    )
    with FeatureStore(folder / "train.h5") as store:
        data = join_captions(store, folder / "captions.json", [config], "train", "--annotations").data
        return fit(config, data, None, resume=resume, progress=False)
