"""Soak test: many rows through the caption stream and many images through extraction without leaks."""

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

ROWS, ROWS_PER_CASE = 1000, 20_000
IMAGES_PER_CASE = 2000
GRID = (8, 8, 256)
WARMUP = 2  # cases until all buffers have reached their final size
MAX_GROWTH = 1.05  # relative to the memory after the warmup
_usage: list[tuple[int, int]] = []  # MiB and open files after each case in this process


def _prepare(folder: Path) -> None:
    names, provenance = [f"{i}.jpg" for i in range(ROWS)], {"dtype": "float16", "grid_shape": list(GRID)}
    spec = ShardSpec(list(enumerate(names)), GridLayout.from_provenance(provenance), provenance, plan="soak")
    with ShardWriter(folder / "train.h5", spec) as writer:
        writer.write(0, np.random.default_rng(0).random((ROWS, *GRID)).astype("f2"), {})
        writer.finish()
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"id": n, "image_id": n // 5, "caption": "a thing " * (1 + n % 12)} for n in range(5 * ROWS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    photos = sorted(write_photos(folder / "photos").iterdir())
    (folder / "many").mkdir()
    for n in range(IMAGES_PER_CASE):
        os.link(photos[n % len(photos)], folder / "many" / f"{n:05}.png")


def _run(folder: Path, rng: np.random.Generator) -> str:
    with FeatureStore(folder / "train.h5") as store:
        records = load_split(captions_only(folder / "captions.json"), "train").records
        data = CaptionedImages.join(store, records, folder / "captions.json")
        vocabulary = Vocabulary.build([text for captions in data.captions for text in captions])
        stream = CaptionStream(data, vocabulary, StreamOptions(32, 5, 30, seed=int(rng.integers(1000))))
        rows = sum(len(batch.images) for epoch in range(ROWS_PER_CASE // ROWS) for batch in stream.epoch(epoch))
    require(rows == ROWS_PER_CASE, f"{rows} rows instead of {ROWS_PER_CASE}")
    summary = extract_all(folder / "many", folder / "store" / "s.h5")
    require(summary.complete, "the store is incomplete")
    shutil.rmtree(folder / "store")
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    _usage.append((memory, len([*Path("/proc/self/fd").iterdir()])))
    if len(_usage) <= WARMUP:
        return "warmup"
    (memory_before, files_before), (memory_now, files_now) = _usage[WARMUP - 1], _usage[-1]
    require(memory_now <= MAX_GROWTH * memory_before, f"{memory_now} MiB; {memory_before} MiB after {WARMUP} cases")
    require(files_now <= files_before, f"{files_now} open files; {files_before} after {WARMUP} cases")
    return f"{ROWS_PER_CASE} more rows and {IMAGES_PER_CASE} more images, memory and open files unchanged"


PART = Part("long run: leaks of memory and open files", 10, 4, _prepare, _run)
