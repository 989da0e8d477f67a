"""Reading of .npz files."""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gridcap.extract.importers import npz
from gridcap.extract.importers.npz import open_npz


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_item_30_large_arrays_are_mapped_and_equal(tmp_path, save, order, monkeypatch):
    monkeypatch.setattr(npz, "LARGE", 1000)
    features = np.asarray(np.random.default_rng(0).random((10, 3, 3, 4), np.float32), order=order)
    names = np.array([f"{i}.jpg" for i in range(10)])
    save(tmp_path / "a.npz", file_name=names, features=features, scale=np.float32(2))
    arrays = open_npz(tmp_path / "a.npz")
    assert list(arrays) == ["file_name", "features", "scale"]
    assert isinstance(arrays["features"], np.memmap)
    assert isinstance(arrays["features"]._mmap, mmap.mmap)
    assert not isinstance(arrays["file_name"], np.memmap)
    np.testing.assert_array_equal(arrays["features"], features)
    np.testing.assert_array_equal(arrays["file_name"], names)
    assert arrays["scale"] == 2


@pytest.mark.parametrize("large", [10**9, 1])
def test_corrupted_and_pickled_arrays_are_rejected(tmp_path, monkeypatch, large):
    monkeypatch.setattr(npz, "LARGE", large)
    np.savez(tmp_path / "objects.npz", features=np.array([{}], object))
    with pytest.raises(ValueError, match=r"Object arrays|Python objects"):
        open_npz(tmp_path / "objects.npz")
    np.savez(tmp_path / "a.npz", features=np.zeros((4, 100), np.float32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[500] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        open_npz(tmp_path / "a.npz")


def test_stored_arrays_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "LARGE", 1)
    np.savez(tmp_path / "a.npz", features=np.arange(1000, dtype=np.float32))
    array = open_npz(tmp_path / "a.npz")["features"]
    assert isinstance(array, np.memmap)
    assert array.filename == str(tmp_path / "a.npz") or Path(str(array.filename)) == tmp_path / "a.npz"
