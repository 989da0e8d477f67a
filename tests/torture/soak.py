"""Long work: many rows through the trainer's stream, many images through extraction; memory and open files stay."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from gridcap.common.captions.split import captions_only, load_split
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.stream import CaptionStream, StreamOptions
from gridcap.train.data.vocabulary import Vocabulary
from tests.torture.case import Part, require
from tests.torture.stores import extract_all, write_photos

_ROWS, _ROWS_A_CASE = 1000, 20_000
_IMAGES_A_CASE = 2000
_GRID = (8, 8, 256)
_WARM = 2  # cases until every buffer has met its largest batch
_MORE = 1.05  # times what was taken when warm
_seen: list[tuple[int, int]] = []  # MiB and open files after each case of this process


def _prepare(folder: Path) -> None:
    names, provenance = [f"{i}.jpg" for i in range(_ROWS)], {"dtype": "float16", "grid_shape": list(_GRID)}
    spec = ShardSpec(list(enumerate(names)), GridLayout.from_provenance(provenance), provenance, plan="soak")
    with ShardWriter(folder / "train.h5", spec) as writer:
        writer.write(0, np.random.default_rng(0).random((_ROWS, *_GRID)).astype("f2"), {})
        writer.finish()
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"id": n, "image_id": n // 5, "caption": "a thing " * (1 + n % 12)} for n in range(5 * _ROWS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    photos = sorted(write_photos(folder / "photos").iterdir())
    (folder / "many").mkdir()
    for n in range(_IMAGES_A_CASE):
        os.link(photos[n % len(photos)], folder / "many" / f"{n:05}.png")


def _run(folder: Path, rng: np.random.Generator) -> str:
    with FeatureStore(folder / "train.h5") as store:
        records = load_split(captions_only(folder / "captions.json"), "train").records
        data = CaptionedImages.join(store, records, folder / "captions.json")
        vocabulary = Vocabulary.build([text for captions in data.captions for text in captions])
        stream = CaptionStream(data, vocabulary, StreamOptions(32, 5, 30, seed=int(rng.integers(1000))))
        rows = sum(len(batch.images) for epoch in range(_ROWS_A_CASE // _ROWS) for batch in stream.epoch(epoch))
    require(rows == _ROWS_A_CASE, f"{rows} rows came through")
    made = extract_all(folder / "many", folder / "store" / "s.h5")
    require(made.complete, "the store is not complete")
    shutil.rmtree(folder / "store")
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    _seen.append((memory, len([*Path("/proc/self/fd").iterdir()])))
    if len(_seen) <= _WARM:
        return "warming up"
    (warm, files), (now, open_now) = _seen[_WARM - 1], _seen[-1]
    require(now <= _MORE * warm, f"{now} MiB, and {warm} after {_WARM} cases")
    require(open_now <= files, f"{open_now} open files, and {files} after {_WARM} cases")
    return f"{_ROWS_A_CASE} rows and {_IMAGES_A_CASE} images more, memory and open files as before"


PART = Part("long work", 10, 4, _prepare, _run)
