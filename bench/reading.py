"""Reading throughput from the page cache: random rows into one buffer, for several storage formats.

`python -m bench.reading STORE.h5` compares the codecs on the grids of a store.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from bench.inputs import GRID, make_grids, make_store
from bench.measure import Row, rate, run_rounds
from gridcap.common.store.codecs import codec_names, find_codec
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.shard_format import GridLayout, ShardSpec
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.common.text import plural

BATCH = 64  # rows per read


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure rows per second with one and two threads, and for other storage formats."""
    rows, count = (512, 1) if quick else (2048, 3)
    path = make_store(work / "plain.h5", rows)
    orders = [np.random.default_rng(i).permutation(rows)[:BATCH] for i in range(16)]
    for threads in (1, 2):
        values = run_rounds(
            count,
            {
                "baseline": lambda: _by_h5py(path, orders),
                "gridcap": partial(_by_store, path, orders, threads),
                "upper bound": partial(_by_preadv, path, orders, threads),
            },
        )
        yield Row(
            "reading",
            f"random rows, {plural(threads, 'thread')}",
            "rows/s",
            values["gridcap"],
            values["baseline"],
            values["upper bound"],
            "h5py's dataset[i]",
            "os.preadv into one buffer",
            {"speedup": 5.0, "fraction of upper bound": 0.8},
        )
    yield from _measure_formats(work, path, rows, orders, count)
    yield from _measure_writing(work, rows, count)


def _measure_formats(work: Path, plain: Path, rows: int, orders: list[np.ndarray], count: int) -> Iterator[Row]:
    """Measure the same rows in other storage formats, all read through FeatureStore."""
    formats: dict[str, Path] = {
        "float16, uncompressed": plain,
        "uint8 with scales": make_store(work / "uint8.h5", rows, "uint8"),
        "float32, uncompressed": make_store(work / "float32.h5", rows, "float32"),
        "float16-zstd, half of the values zero": make_store(work / "half.h5", rows, "float16-zstd"),
        "float16-zstd, 92% of the values zero": make_store(work / "sparse.h5", rows, "float16-zstd", zeros=0.92),
    }
    for name, options in (
        ("float16, gzip 4", dict[str, object](compression="gzip", compression_opts=4)),
        ("float16, lzf", dict[str, object](compression="lzf")),
    ):
        formats[name] = _recompress(plain, work / f"{options['compression']}.h5", options)
    for name, path in formats.items():
        values = run_rounds(count, {"gridcap": partial(_by_store, path, orders, 2)})
        size = path.stat().st_size / rows / 1024
        yield Row(
            "reading", f"stored as {name}", "rows/s", values["gridcap"], note=f"{size:.0f} KiB per row, 2 threads"
        )


def _measure_writing(work: Path, rows: int, count: int) -> Iterator[Row]:
    """Measure how fast each codec writes a shard, checksums and reading back included."""
    for dtype in codec_names():
        grids = make_grids(64, zeros=0.92)

        def write(dtype: str = dtype, grids: np.ndarray = grids) -> float:
            provenance = {"grid_shape": list(GRID), "dtype": dtype}
            images = [(i, "a") for i in range(rows)]
            spec = ShardSpec(images, GridLayout(GRID, find_codec(dtype)), provenance)

            def write_all() -> None:
                with ShardWriter(work / "written.h5", spec) as writer:
                    for start in range(0, rows, len(grids)):
                        writer.write(start, grids.copy(), {})
                    writer.finish()

            return rate(rows, write_all)

        values = run_rounds(count, {"gridcap": write})
        yield Row("reading", f"writing {dtype}", "rows/s", values["gridcap"], note="92% of the values zero")


def _recompress(source: Path, target: Path, options: dict[str, object]) -> Path:
    """Rewrite a store as other programs do: compressed, with one chunk per row."""
    with h5py.File(source) as original, h5py.File(target, "w") as copy:
        for name, value in original.attrs.items():
            copy.attrs[name] = value
        for name in original:
            if name == "features":
                copy.create_dataset(name, data=original[name][:], chunks=(1, *GRID), **options)
            else:
                original.copy(name, copy)
    return target


def _row_rate(orders: list[np.ndarray], read: Callable[[np.ndarray], object]) -> float:
    def read_all() -> None:
        for order in orders:
            read(order)

    read_all()  # fills the page cache
    return rate(len(orders) * BATCH, read_all)


def _by_store(path: Path, orders: list[np.ndarray], threads: int) -> float:
    with FeatureStore(path, threads) as store:
        buffer = np.empty((BATCH, *GRID), store.dtype)
        return _row_rate(orders, lambda order: store.rows(order, out=buffer))


def _by_h5py(path: Path, orders: list[np.ndarray]) -> float:
    with h5py.File(path) as file:
        features, buffer = file["features"], np.empty((BATCH, *GRID), np.float16)

        def read(order: np.ndarray) -> None:
            for place, row in enumerate(order):
                buffer[place] = features[row]

        return _row_rate(orders, read)


def _by_preadv(path: Path, orders: list[np.ndarray], threads: int) -> float:
    with h5py.File(path) as file:
        start, size = file["features"].id.get_offset(), file["features"][0].nbytes
    descriptor = os.open(path, os.O_RDONLY)
    buffer = np.empty((BATCH, *GRID), np.float16)
    parts = [part.data for part in buffer.reshape(BATCH, -1).view(np.uint8)]

    def some(order: np.ndarray, places: range) -> None:
        for place in places:
            os.preadv(descriptor, [parts[place]], start + int(order[place]) * size)

    shares = [range(i, BATCH, threads) for i in range(threads)]
    try:
        if threads == 1:
            return _row_rate(orders, lambda order: some(order, shares[0]))
        with ThreadPoolExecutor(threads) as pool:
            return _row_rate(orders, lambda order: list(pool.map(some, [order] * threads, shares)))
    finally:
        os.close(descriptor)


def compare_codecs(source: Path, rows: int = 1024) -> None:
    """Print size, writing rate, and reading rate of each codec, for the grids of a store (repeated up to `rows`)."""
    with FeatureStore(source) as store:
        valid = np.flatnonzero(store.valid)[:rows]
        grids = store.rows(np.resize(valid, rows))
    print(f"{source}: {len(valid)} grids, {(grids == 0).mean():.1%} zeros; 2 threads for reading")
    orders = [np.random.default_rng(i).permutation(rows)[:BATCH] for i in range(rows // BATCH)]
    images = [(i, "a") for i in range(rows)]
    for dtype in codec_names():
        layout = GridLayout(store.grid_shape, find_codec(dtype))
        provenance = {**store.provenance, "dtype": dtype, "views": ["original"]}
        with tempfile.TemporaryDirectory(prefix="gridcap-bench-") as work:
            path, start = Path(work) / "s.h5", time.perf_counter()
            with ShardWriter(path, ShardSpec(images, layout, provenance)) as writer:
                for first in range(0, rows, BATCH):
                    writer.write(first, grids[first : first + BATCH].astype(layout.dtype), {})
                size = writer.finish().size
            written = rows / (time.perf_counter() - start)
            with FeatureStore(path, 2) as copy:
                buffer = np.empty((BATCH, *store.grid_shape), copy.dtype)
                rates = sorted(_row_rate(orders, lambda order: copy.rows(order, out=buffer)) for _ in range(3))  # noqa: B023
        print(f"{dtype:14} {size / rows / 1024:6.1f} KiB per row, written {written:,.0f}, read {rates[1]:,.0f} rows/s")


if __name__ == "__main__":
    compare_codecs(Path(sys.argv[1]))
