"""Atomic file writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gridcap.common.files import (
    check_writable,
    fsync_path,
    publish_text,
    remove_leftovers,
    replacing,
    sha256_of,
    temporary_sibling,
    this_machine,
    write_json,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_replacing_creates_the_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names_in(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old_file_only(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the new")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_an_exception_before_the_first_write_creates_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt"):
        raise RuntimeError
    assert names_in(tmp_path) == []


def test_a_failed_rename_removes_the_temporary_file(tmp_path: Path) -> None:
    """A folder has the name of the file."""
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "new")
    assert names_in(tmp_path) == ["a.txt"]


def test_the_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush, rename, flush the folder: in another order, a power cut leaves an empty file under the final name."""
    path, steps = tmp_path / "a.txt", []
    really_replace = os.replace
    monkeypatch.setattr("gridcap.common.files.fsync_path", lambda p: steps.append(("flush", p.is_dir())))
    monkeypatch.setattr("os.replace", lambda a, b: (steps.append("rename"), really_replace(a, b)))
    write_text(path, "new")
    assert steps == [("flush", False), "rename", ("flush", True)]
    assert path.read_text() == "new"


def test_an_open_reader_keeps_the_old_content(tmp_path: Path) -> None:
    """The old file is replaced, not overwritten."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with open(path) as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_temporary_names_are_hidden_unique_and_in_the_same_folder(tmp_path: Path) -> None:
    path = tmp_path / "00001.h5"
    names = {temporary_sibling(path) for _ in range(100)}
    assert len(names) == 100
    for name in names:
        assert name.parent == tmp_path
        assert name.name.startswith(".00001.h5.")
        assert name.suffix == ".tmp"  # does not match patterns such as *.h5


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "é" * 125 + ".json"])
def test_a_name_of_the_maximum_length_can_be_written(tmp_path: Path, name: str) -> None:
    """The temporary name must not be longer than the file system allows."""
    write_text(tmp_path / name, "text")
    assert names_in(tmp_path) == [name]


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "café ✓\n")
    assert (tmp_path / "a.txt").read_bytes() == "café ✓\n".encode()


def test_json_is_indented_and_not_ascii_escaped(tmp_path: Path) -> None:
    value = {"caption": "un café", "n": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "un café" in text
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 3


def test_a_value_that_json_cannot_represent_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "1\n"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, (1 << 22) + 1])
def test_sha256_covers_all_blocks(tmp_path: Path, size: int) -> None:
    """Sizes around the block size."""
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_flushing_a_missing_file_raises_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "missing")


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    """A shard that another process, here or on another machine, is still writing must be kept."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = this_machine()
    kept = [
        "00000.h5",
        f".00000.h5.{host}-{os.getpid()}-0123abcd.tmp",  # its process is running
        f".00000.h5.another{host}-{gone.pid}-0123abcd.tmp",  # another machine
        f".00000.h5.{host}-{gone.pid}-0123abcd",
        ".mine.tmp",
        "a.tmp",
    ]
    for name in [*kept, f".00000.h5.{host}-{gone.pid}-0123abcd.tmp", f".plan.json.{host}-{gone.pid}-ffffffff.tmp"]:
        (tmp_path / name).touch()
    (tmp_path / f".run.{host}-{gone.pid}-0123abcd.tmp").mkdir()
    (tmp_path / f".run.{host}-{gone.pid}-0123abcd.tmp" / "model").touch()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted(kept)


def test_temporary_files_of_this_process_are_kept(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        remove_leftovers(tmp_path)
        assert temporary.exists()


def test_temporary_files_of_other_machines_are_removed_after_a_day(tmp_path: Path) -> None:
    """Their processes cannot be checked, and a killed pod never returns under the same name."""
    old, new = (tmp_path / f".0000{i}.h5.pod-4026531836-7-0123abcd.tmp" for i in range(2))
    for path, age in ((old, 25 * 3600), (new, 23 * 3600)):
        path.touch()
        os.utime(path, (time.time() - age, time.time() - age))
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [new.name]


def test_exactly_one_of_several_writers_publishes(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda i: publish_text(tmp_path / "plan.json", f"plan {i}"), range(40)))
    assert sum(wrote) == 1
    assert (tmp_path / "plan.json").read_text() == f"plan {wrote.index(True)}"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_publishing_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert publish_text(tmp_path / "plan.json", "text")
    assert not publish_text(tmp_path / "plan.json", "another text"), "an existing file is kept"
    assert (tmp_path / "plan.json").read_text() == "text"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "new" / "a.json")
    check_writable(tmp_path / "old.json")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
    with pytest.raises(IsADirectoryError) as folder:
        check_writable(tmp_path / "new")
    assert folder.value.filename == str(tmp_path / "new")
    with pytest.raises(FileExistsError):
        check_writable(tmp_path / "old.json" / "a.json")


def test_a_full_disk_error_names_the_target_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.json")


def test_errors_name_the_target_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.json") as temporary:
        temporary.read_text()
    assert caught.value.filename == str(tmp_path / "a.json")
