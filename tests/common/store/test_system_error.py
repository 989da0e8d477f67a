"""System errors while a store is read name the cause and the remedy; none is called corruption (item 11)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gridcap.common.errors import StoreAccessError, StoreError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.store.system_error import store_error_from

WriteStore = Callable[..., tuple[Path, np.ndarray]]


@pytest.mark.parametrize(
    ("code", "cause", "remedy"),
    [
        (errno.EIO, "input/output error", "do not delete it"),
        (errno.ESTALE, "stale file handle", "do not delete it"),
        (errno.EMFILE, "too many open files", "ulimit -n"),
        (errno.ENFILE, "too many open files", "ulimit -n"),
        (errno.EACCES, "permission denied", "permissions"),
        (errno.ENOTDIR, "not a directory", "check the path"),
        (errno.ETIMEDOUT, "timed out", "do not delete it"),
    ],
)
def test_item_11_every_system_error_has_a_cause_and_a_remedy(code: int, cause: str, remedy: str) -> None:
    error = store_error_from(OSError(code, os.strerror(code)), Path("features/train.h5"))
    assert isinstance(error, StoreAccessError)
    assert error.message.startswith("features/train.h5: ")
    assert cause in error.message
    assert remedy in error.hint


EXHAUSTED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from gridcap.common.errors import StoreAccessError
from gridcap.common.store.{module} import {name}
from pathlib import Path
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    {name}(Path(sys.argv[1]))
except StoreAccessError as error:
    taken.clear()
    print(error.message, error.hint)
"""


@pytest.mark.parametrize(("module", "name"), [("shard_reader", "ShardReader"), ("index_reader", "check_index")])
def test_item_11_exhausted_descriptors_are_not_called_corruption(
    tmp_path: Path, write_store: WriteStore, module: str, name: str
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    file = path if name == "check_index" else path.with_suffix("") / "00000.h5"
    code = EXHAUSTED.format(module=module, name=name)
    if name == "check_index":  # format_of answers None for a file that cannot be read: h5py reports the reason
        code = code.replace("check_index", "read_index")
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "too many open files" in done.stdout, done.stderr
    assert "ulimit -n" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
@pytest.mark.parametrize("name", ["train.h5", "train/00001.h5"])
def test_item_11_missing_permission_is_not_called_corruption(
    tmp_path: Path, write_store: WriteStore, name: str
) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    (tmp_path / name).chmod(0)
    with pytest.raises(StoreAccessError, match="permission denied") as caught:
        FeatureStore(path)
    assert "permissions" in caught.value.hint


def test_item_11_folder_without_permission_is_a_store_error(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because root can read every folder."""
    path, _ = write_store(tmp_path / "train.h5")
    real = os.stat

    def fail(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).startswith(str(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    monkeypatch.setattr(Path, "stat", fail)  # Python 3.10 keeps its own reference to os.stat
    with pytest.raises(StoreAccessError, match="permission denied"):
        FeatureStore(path)


def test_item_11_index_moved_without_its_folder_says_so(tmp_path: Path, write_store: WriteStore) -> None:
    path, _ = write_store(tmp_path / "train.h5")
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "train.h5")
    with pytest.raises(StoreError, match=r"elsewhere/train/0000\d\.h5: no such file") as caught:
        FeatureStore(moved)
    assert "keep train.h5 next to the folder of its shards" in caught.value.hint


def test_item_11_renamed_and_linked_index_is_read(tmp_path: Path, write_store: WriteStore) -> None:
    path, grids = write_store(tmp_path / "features" / "train.h5")
    renamed = path.rename(path.with_name("renamed.h5"))
    link = tmp_path / "link.h5"
    link.symlink_to(renamed)
    relative = tmp_path / "relative.h5"
    relative.symlink_to("link.h5")
    for each in (renamed, link, relative):
        with FeatureStore(each) as store:
            np.testing.assert_array_equal(store[:], grids)


def test_item_11_broken_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "train.h5").symlink_to("gone.h5")
    with pytest.raises(StoreError, match=r"train\.h5: broken link to gone\.h5"):
        FeatureStore(tmp_path / "train.h5")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_item_11_failed_read_is_not_called_corruption(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, _ = write_store(tmp_path / "train.h5")

    def fail(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    with FeatureStore(path) as store:
        monkeypatch.setattr("gridcap.common.store.pinned_file.os.preadv", fail)
        with pytest.raises(StoreAccessError, match=r"0000\d\.h5: ") as caught:
            store[0]
    assert "do not delete it" in caught.value.hint
