"""Positional reads from a file that must not change."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.errors import GridcapError, InvalidImageError, StoreAccessError, StoreError
from gridcap.common.store.pinned_file import PinnedFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    return path


def test_read_into_fills_the_buffer_or_reports_the_end(path: Path) -> None:
    file, buffer = PinnedFile(path), bytearray(10)
    assert file.size == 100
    assert file.read_into(memoryview(buffer), 20)
    assert buffer == bytes(range(20, 30))
    assert not file.read_into(memoryview(buffer), 95)
    file.close()
    assert file.read_into(memoryview(buffer), 0), "the next read opens the file again"
    file.close()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may return fewer bytes than requested."""
    real_preadv = os.preadv

    def read_three(descriptor: int, buffers: list[Any], position: int) -> int:
        return real_preadv(descriptor, [buffers[0][:3]], position)

    file, buffer = PinnedFile(path), bytearray(10)
    monkeypatch.setattr("gridcap.common.store.pinned_file.os.preadv", read_three)
    assert file.read_into(memoryview(buffer), 20)
    assert buffer == bytes(range(20, 30))
    file.close()


def test_file_is_closed_when_the_object_is_deleted(path: Path) -> None:
    """Stores that were never closed must not exhaust the descriptors of a long-running process."""
    gc.collect()  # files of other tests
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(10):
        assert PinnedFile(path).read_into(memoryview(bytearray(1)), 0)
    gc.collect()
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.parametrize("change", [b"other", bytes(100)])
def test_changed_file_raises(path: Path, change: bytes) -> None:
    file = PinnedFile(path)
    path.write_bytes(change)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match="data: replaced or changed"):
        pickle.loads(pickle.dumps(file)).read_into(memoryview(bytearray(1)), 0)


def test_missing_file_raises_store_error(tmp_path: Path, path: Path) -> None:
    with pytest.raises(StoreError, match="gone: no such file"):
        PinnedFile(tmp_path / "gone")
    file = PinnedFile(path)
    path.unlink()
    with pytest.raises(StoreError, match="data: no such file"):
        file.read_into(memoryview(bytearray(1)), 0)


@pytest.mark.parametrize("kind", [StoreError, StoreAccessError, InvalidImageError])
def test_item_27_store_errors_can_be_pickled(kind: type[GridcapError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("a message", "a hint")))
    assert (type(copy), copy.message, copy.hint, str(copy)) == (kind, "a message", "a hint", "a message")
