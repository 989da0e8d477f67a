"""Reading a store from a warm cache: rows in random order into one buffer, and what other forms of it cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from bench.inputs import GRID, make_store
from bench.measure import Row, rate, rounds
from gridcap.common.store.reader import FeatureStore

BATCH = 64  # rows into the buffer at a time


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Rows a second, with one and two threads; bytes and rows a second of other forms."""
    rows, count = (512, 1) if quick else (2048, 3)
    path = make_store(work / "plain.h5", rows)
    orders = [np.random.default_rng(i).permutation(rows)[:BATCH] for i in range(16)]
    for threads in (1, 2):
        values = rounds(
            count,
            {
                "baseline": lambda: _by_h5py(path, orders),
                "ours": partial(_by_store, path, orders, threads),
                "limit": partial(_by_preadv, path, orders, threads),
            },
        )
        yield Row(
            "reading",
            f"rows in random order, {threads} thread{'s' * (threads > 1)}",
            "rows/s",
            values["ours"],
            values["baseline"],
            values["limit"],
            "h5py's dataset[i]",
            "os.preadv into one buffer",
            {"of baseline": 5.0, "of limit": 0.8},
        )
    yield from _forms(work, path, rows, orders, count)


def _forms(work: Path, plain: Path, rows: int, orders: list[np.ndarray], count: int) -> Iterator[Row]:
    """The same rows as other files, all read by our own reader."""
    forms: dict[str, Path] = {
        "float16, plain": plain,
        "uint8 with scales": make_store(work / "uint8.h5", rows, "uint8"),
    }
    for name, options in (
        ("float16, gzip 4", dict[str, object](compression="gzip", compression_opts=4)),
        ("float16, lzf", dict[str, object](compression="lzf")),
    ):
        forms[name] = _rewritten(plain, work / f"{options['compression']}.h5", options)
    for name, path in forms.items():
        values = rounds(count, {"ours": partial(_by_store, path, orders, 2)})
        size = path.stat().st_size / rows / 1024
        yield Row("reading", f"as {name}", "rows/s", values["ours"], note=f"{size:.0f} KiB a row, 2 threads")


def _rewritten(source: Path, target: Path, options: dict[str, object]) -> Path:
    """A store as another program leaves it: a chunk a row, compressed."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        for name in old:
            if name == "features":
                new.create_dataset(name, data=old[name][:], chunks=(1, *GRID), **options)
            else:
                old.copy(name, new)
    return target


def _each(orders: list[np.ndarray], read: Callable[[np.ndarray], object]) -> float:
    def all_of_them() -> None:
        for order in orders:
            read(order)

    all_of_them()  # into the cache
    return rate(len(orders) * BATCH, all_of_them)


def _by_store(path: Path, orders: list[np.ndarray], threads: int) -> float:
    with FeatureStore(path, threads) as store:
        buffer = np.empty((BATCH, *GRID), store.dtype)
        return _each(orders, lambda order: store.rows(order, out=buffer))


def _by_h5py(path: Path, orders: list[np.ndarray]) -> float:
    with h5py.File(path) as file:
        features, buffer = file["features"], np.empty((BATCH, *GRID), np.float16)

        def read(order: np.ndarray) -> None:
            for place, row in enumerate(order):
                buffer[place] = features[row]

        return _each(orders, read)


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
            return _each(orders, lambda order: some(order, shares[0]))
        with ThreadPoolExecutor(threads) as pool:
            return _each(orders, lambda order: list(pool.map(some, [order] * threads, shares)))
    finally:
        os.close(descriptor)
