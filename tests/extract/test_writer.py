"""Shards written at the same time: the order of their batches, and the state after a failure."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.errors import ExtractionError
from gridcap.common.store.shard_writer import ShardWriter
from gridcap.extract.run import extract_features
from gridcap.extract.writer import batches_of
from tests.extract.store_helpers import assert_matches_photos, shards_in


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6))
def test_each_shard_is_written_in_order_by_one_thread(
    rows: int, shard_size: int, batch_size: int, writers: int
) -> None:
    class Rows:
        shards = -(-rows // shard_size)

        def rows_of(self, shard: int) -> range:
            return range(shard * shard_size, min(rows, (shard + 1) * shard_size))

    plan: Any = Rows()
    plan.batch_size = batch_size
    batches = list(batches_of(plan, range(plan.shards), writers))
    open_in: dict[int, int] = {}  # writer -> shard
    for batch in batches:
        whole = plan.rows_of(batch.shard)
        assert open_in.setdefault(batch.writer, batch.shard) == batch.shard, "the previous shard is not finished"
        assert batch.start - whole.start == sum(
            b.stop - b.start for b in batches[: batches.index(batch)] if b.shard == batch.shard
        )
        if batch.stop == whole.stop:
            del open_in[batch.writer]
    assert not open_in
    assert sum(batch.stop - batch.start for batch in batches) == rows
    if writers == 1:
        assert [batch.start for batch in batches] == sorted(batch.start for batch in batches)


@pytest.mark.parametrize("writers", [2, 3, 8])
def test_several_threads_write_the_same_bytes_as_one_thread(
    fake: Any, photos: Any, job: Any, tmp_path: Path, writers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(23, invalid={4: "text", 22: ""})
    keys = {"extract__shard_size": 4, "extract__batch_size": 3, "extract__views": "original,hflip"}
    alone = job(folder, tmp_path / "alone" / "s.h5", **keys)
    extract_features(alone, show_progress=False)
    monkeypatch.setattr("gridcap.extract.worker.writer_count", lambda on_gpu, shards: writers)
    together = job(folder, tmp_path / "together" / "s.h5", **keys)
    summary = extract_features(together, show_progress=False)
    assert (summary.written, summary.complete, summary.invalid.total()) == (6, True, 2)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_an_error_in_one_writer_stops_all_without_unfinished_shards(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.extract.worker.writer_count", lambda on_gpu, shards: 3)
    real = fake.encode

    def overflow(self: Any, images: np.ndarray) -> np.ndarray:
        grids: np.ndarray = real(self, images)
        return np.full_like(grids, np.inf) if sum(fake.batches) > 8 else grids

    monkeypatch.setattr(fake, "encode", overflow)
    prepared = job(photos(20), extract__shard_size=4, extract__batch_size=2)
    with pytest.raises(ExtractionError, match="cannot represent"):
        extract_features(prepared, show_progress=False)
    assert not prepared.output.exists()
    assert not list(prepared.folder.rglob("*.tmp"))
    monkeypatch.setattr(fake, "encode", real)
    assert extract_features(prepared, show_progress=False).complete


def test_the_next_shard_is_written_while_a_shard_is_finished(
    fake: Any, photos: Any, extracted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, finished = threading.Event(), []
    real_finish, real_write = ShardWriter.finish, ShardWriter.write

    def write(self: ShardWriter, *arguments: Any) -> None:
        real_write(self, *arguments)
        if self.path.name == "00001.h5":
            written.set()

    def finish(self: ShardWriter, *arguments: Any) -> Any:
        if self.path.name == "00000.h5":
            assert written.wait(20), "the first shard is finished only after rows of the second one were written"
        finished.append(self.path.name)
        return real_finish(self, *arguments)

    monkeypatch.setattr(ShardWriter, "write", write)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    folder = photos(6)
    job, summary = extracted(folder, extract__shard_size=2, extract__batch_size=2)
    assert finished == ["00000.h5", "00001.h5", "00002.h5"]
    assert summary.written == 3
    assert_matches_photos(fake, folder, job.output)


@pytest.mark.parametrize("shard", [0, 1, 3])
def test_an_error_while_a_shard_is_finished_ends_the_run_without_that_shard(
    fake: Any, photos: Any, job: Any, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    def fail(self: ShardWriter, *arguments: Any) -> Any:
        if self.path.name == f"{shard:05}.h5":
            raise OSError(28, "No space left on device")
        return real(self, *arguments)

    real = ShardWriter.finish
    folder = photos(40)
    prepared = job(folder, extract__shard_size=10, extract__batch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", fail)
        with pytest.raises(OSError, match="No space"):
            extract_features(prepared, show_progress=False)
    assert not list(prepared.folder.rglob("*.tmp"))
    assert f"{shard:05}.h5" not in shards_in(prepared.folder)
    if shard < 3:
        assert sum(fake.batches) < 40, "later images are not computed in vain"
    assert extract_features(prepared, show_progress=False).complete
    assert_matches_photos(fake, folder, prepared.output)
