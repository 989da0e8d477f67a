"""Small shards and stores, and a current folder without a pipeline.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gridcap.common.store.codecs import codec_of
from gridcap.common.store.index_writer import IndexSpec, write_index
from gridcap.common.store.shard_format import GridLayout, ShardInfo, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter

GRID = (2, 3, 4)
PLAN = "the plan"
PROVENANCE: dict[str, Any] = {
    "encoder": "inception_v3",
    "layer": "Mixed_7c",
    "weights": {"name": "imagenet", "sha256": "ab" * 32, "random": False},
    "preprocessing": {"resize_mode": "stretch", "side": 299},
    "grid_shape": list(GRID),
    "dtype": "float16",
}


@pytest.fixture(autouse=True)
def empty_current_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read ./pipeline.yaml: the file of the repository must not affect these tests."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def provenance() -> dict[str, Any]:
    """A provenance as `extract-features` writes it."""
    return PROVENANCE


@pytest.fixture(scope="session")
def make_grids() -> Callable[..., np.ndarray]:
    """make_grids(rows, seed, dtype) -> (rows, 2, 3, 4) random grids."""

    def make(rows: int, seed: int = 0, dtype: str = "float16") -> np.ndarray:
        grids: np.ndarray = np.random.default_rng(seed).normal(size=(rows, *GRID)).astype(dtype)
        return grids

    return make


def index_shards(index: Path, sizes: Sequence[int]) -> None:
    """Write the index of consecutive shards with the images of `write_shard`."""
    images = [(10 * row, f"folder/{10 * row}.jpg") for row in range(sum(sizes))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [images[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    names = [f"{number:05}.h5" for number in range(len(sizes))]
    write_index(index, IndexSpec(index.with_suffix(""), names, [PLAN] * len(names), parts, 30, "train", PROVENANCE))


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., ShardInfo]:
    """write_shard(path, grids, ...) writes one finished shard with ids and names counted from `first`."""

    def write(
        path: Path,
        grids: np.ndarray,
        *,
        first: int = 0,
        index: int = 0,
        plan: str = PLAN,
        invalid_reasons: Mapping[int, str] | None = None,
        batch: int = 1000,
        names: Sequence[str] | None = None,
    ) -> ShardInfo:
        rows, invalid_reasons = len(grids), invalid_reasons or {}
        ids = [10 * (first + row) for row in range(rows)]
        images = list(zip(ids, names or [f"folder/{i}.jpg" for i in ids], strict=True))
        layout = GridLayout(grids.shape[1:], codec_of(grids.dtype))
        with ShardWriter(path, ShardSpec(images, layout, PROVENANCE, index, plan, "train")) as writer:
            for start in range(0, rows, batch):
                part = grids[start : start + batch].copy()
                local = {row: why for row, why in invalid_reasons.items() if start <= row < start + batch}
                writer.write(start, part, local)
            return writer.finish()

    return write


@pytest.fixture(scope="session")
def write_store(
    write_shard: Callable[..., ShardInfo], make_grids: Callable[..., np.ndarray]
) -> Callable[..., tuple[Path, np.ndarray]]:
    """write_store(index_path, sizes, invalid_reasons) -> the index path and the stored grids, NaN where invalid."""

    def write(
        index: Path, sizes: Sequence[int] = (3, 4, 2), invalid_reasons: Mapping[int, str] | None = None
    ) -> tuple[Path, np.ndarray]:
        grids, invalid_reasons = make_grids(sum(sizes), seed=1), invalid_reasons or {}
        folder, start = index.with_suffix(""), 0
        for number, size in enumerate(sizes):
            local = {row - start: why for row, why in invalid_reasons.items() if start <= row < start + size}
            part = grids[start : start + size]
            write_shard(folder / f"{number:05}.h5", part, first=start, index=number, invalid_reasons=local)
            start += size
        index_shards(index, sizes)
        grids[list(invalid_reasons)] = np.nan
        return index, grids

    return write


@pytest.fixture(scope="session")
def rewrite_compressed() -> Callable[[Path, Path], None]:
    """Copy a shard as another program would: `features` chunked and compressed, the rest unchanged."""

    def rewrite(source: Path, target: Path) -> None:
        with h5py.File(source) as old, h5py.File(target, "w") as new:
            for name in old:
                if name == "features":
                    grids = old[name][:]
                    new.create_dataset(name, data=grids, chunks=(1, *grids.shape[1:]), compression="gzip")
                else:
                    old.copy(name, new)
            for key, value in old.attrs.items():
                new.attrs[key] = value

    return rewrite
