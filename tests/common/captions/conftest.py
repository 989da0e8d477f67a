"""Writers of small captions files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.captions.read import read_captions
from gridcap.common.captions.records import CaptionSet
from gridcap.common.config import SplitConfig

Entry = dict[str, Any]

IMAGES: list[Entry] = [
    {"id": 30, "file_name": "c.jpg"},
    {"id": 10, "file_name": "a.jpg"},
    {"id": 20, "file_name": "sub/b.jpg"},
]
CAPTIONS: list[Entry] = [
    {"id": 1, "image_id": 10, "caption": "a dog"},
    {"id": 2, "image_id": 30, "caption": "a cat"},
    {"id": 3, "image_id": 10, "caption": "the dog again"},
    {"id": 4, "image_id": 20, "caption": "a cow"},
]


@pytest.fixture
def images() -> list[Entry]:
    return list(IMAGES)


@pytest.fixture
def captions() -> list[Entry]:
    return list(CAPTIONS)


@pytest.fixture
def load_coco(tmp_path: Path) -> Callable[..., CaptionSet]:
    """load_coco(images, annotations) writes a COCO captions file and reads it."""

    def load(images: Sequence[object] = IMAGES, annotations: object = CAPTIONS) -> CaptionSet:
        path = tmp_path / "captions.json"
        path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
        return read_captions(path)

    return load


@pytest.fixture
def load_karpathy(tmp_path: Path) -> Callable[..., CaptionSet]:
    """load_karpathy(part, *entries) writes a dataset_coco.json and reads one part."""

    def load(part: str, *entries: object) -> CaptionSet:
        path = tmp_path / "dataset_coco.json"
        path.write_text(json.dumps({"dataset": "coco", "images": entries}))
        return read_captions(path, part)

    return load


@pytest.fixture
def load_csv(tmp_path: Path) -> Callable[[str], CaptionSet]:
    """load_csv(text) writes a CSV file and reads it."""

    def load(text: str) -> CaptionSet:
        path = tmp_path / "captions.csv"
        path.write_bytes(text.encode())
        return read_captions(path)

    return load


@pytest.fixture
def count_problems() -> Callable[[CaptionSet, str], int]:
    """count_problems(loaded, kind) counts the problems whose kind contains `kind`; there must be no others."""

    def count(loaded: CaptionSet, kind: str) -> int:
        assert all(kind in name for name in loaded.problems.counts), loaded.problems.counts
        return loaded.problems.total

    return count


@pytest.fixture
def captions_by_name() -> Callable[[CaptionSet], dict[str, tuple[str, ...]]]:
    return lambda loaded: {record.file_name: record.captions for record in loaded.records}


@pytest.fixture
def write_coco() -> Callable[..., SplitConfig]:
    """write_coco(path, images, captions, empty) writes a COCO file and returns its split.

    The i-th image has captions[i] captions; the first has `empty` empty ones in addition.
    """

    def write(path: Path, images: int, captions: Sequence[int] = (), empty: int = 0) -> SplitConfig:
        entries = [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)]
        owners = [i for i, count in enumerate(captions) for _ in range(count)]
        texts: list[Entry] = [{"id": n, "image_id": i, "caption": f"caption {n}"} for n, i in enumerate(owners)]
        texts += [{"id": len(owners) + n, "image_id": 0, "caption": ""} for n in range(empty)]
        path.write_text(json.dumps({"images": entries, "annotations": texts}))
        return SplitConfig(images=path.parent, annotations=path)

    return write
