"""Leases of output folders, with real processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from gridcap.common import lease
from gridcap.common.errors import FolderInUseError
from gridcap.common.lease import LEASE_FILE, Holder, exclusive_folder

HOLD = """
import sys, time
from pathlib import Path
from gridcap.common.lease import exclusive_folder
with exclusive_folder(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Return a function that starts a process which holds the lease of a folder until its stdin is closed."""
    processes = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def acquire(folder):
    """Acquire and release a lease, and return the messages."""
    messages = []
    with exclusive_folder(folder, messages.append):
        assert (folder / LEASE_FILE).exists()
    return messages


def write_foreign_lease(folder):
    """Write the lease of a process on another machine."""
    folder.mkdir()
    holder = Holder("abc", "node7", "node7-1-other-boot", os.getpid(), 1, "2026-01-01 10:00:00", "train-decoder")
    (folder / LEASE_FILE).write_text(json.dumps(asdict(holder)))
    return folder / LEASE_FILE


def test_item_01_second_process_is_rejected_and_the_error_names_the_first(tmp_path, hold):
    process = hold(tmp_path / "run")
    with pytest.raises(FolderInUseError, match=f"run: in use by process {process.pid} on .*running since"):
        acquire(tmp_path / "run")
    process.communicate("")
    assert acquire(tmp_path / "run") == []


def test_item_01_lease_of_a_killed_process_is_taken_over_with_a_notice(tmp_path, hold):
    process = hold(tmp_path / "run")
    process.kill()
    process.communicate()
    (message,) = acquire(tmp_path / "run")
    assert f"taking over from process {process.pid}" in message


def test_item_01_lease_of_a_zombie_is_taken_over(tmp_path, hold):
    process = hold(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.read()  # returns when the process has ended; it has not been waited for
    assert len(acquire(tmp_path / "run")) == 1


def test_item_01_reused_process_id_is_recognized(tmp_path):
    with exclusive_folder(tmp_path, print):
        content = json.loads((tmp_path / LEASE_FILE).read_text())
    (tmp_path / LEASE_FILE).write_text(json.dumps(content | {"process_start": 1}))
    assert len(acquire(tmp_path)) == 1


def test_item_01_only_one_of_many_simultaneous_processes_acquires_a_stale_lease(tmp_path, hold):
    process = hold(tmp_path / "run")
    process.kill()
    process.communicate()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    lines = []
    for child in children:
        while (line := child.stdout.readline()) and line != "held\n":
            pass
        lines.append(line)
    assert lines.count("held\n") == 1, "the others exit with an error while the winner holds the lease"
    for child in children:
        child.communicate("")


def test_item_01_foreign_lease_with_heartbeat_is_respected(tmp_path, monkeypatch):
    path = write_foreign_lease(tmp_path / "run")
    monkeypatch.setattr(lease, "POLL_INTERVAL", 0.01)
    real = lease._heartbeat
    beats = iter(range(100))
    monkeypatch.setattr(lease, "_heartbeat", lambda p: real(p) + next(beats))
    with pytest.raises(FolderInUseError, match="on node7"):
        acquire(tmp_path / "run")
    assert path.exists()


def test_item_01_foreign_lease_without_heartbeat_is_taken_over_after_waiting(tmp_path, monkeypatch):
    write_foreign_lease(tmp_path / "run")
    monkeypatch.setattr(lease, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(lease, "STALE_AFTER", 0.05)
    waiting, taking_over = acquire(tmp_path / "run")
    assert "waiting" in waiting
    assert "taking over from process" in taking_over


def test_item_01_old_foreign_lease_is_taken_over_without_waiting(tmp_path):
    path = write_foreign_lease(tmp_path / "run")
    os.utime(path, (time.time() - 1e6,) * 2)
    (message,) = acquire(tmp_path / "run")
    assert "taking over" in message


def test_item_01_corrupted_lease_is_taken_over_after_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(lease, "STALE_AFTER", 0.05)
    (tmp_path / LEASE_FILE).write_text("")
    assert "an unknown process" in acquire(tmp_path)[1]


def test_item_01_suspended_process_notices_that_its_lease_was_taken_over(tmp_path):
    with exclusive_folder(tmp_path, print) as held:
        held.check()
        content = json.loads((tmp_path / LEASE_FILE).read_text())
        (tmp_path / LEASE_FILE).write_text(json.dumps(content | {"token": "other"}))
        with pytest.raises(FolderInUseError, match="taken over by process"):
            held.check()
    assert (tmp_path / LEASE_FILE).exists(), "the lease of the other process is kept"


@pytest.fixture
def unreadable(monkeypatch):
    """Return a function that makes reading leases fail, as on an unreliable network file system, until it is undone."""

    def call(patch, number=errno.EIO):
        def fail(path):
            raise OSError(number, os.strerror(number), str(path))

        patch.setattr(lease, "_read", fail)

    return call


def test_item_11_lease_that_cannot_be_read_is_not_stale(tmp_path, hold, monkeypatch, unreadable):
    process = hold(tmp_path / "run")
    with monkeypatch.context() as patch:
        unreadable(patch)
        with pytest.raises(OSError, match="Input/output error"):
            acquire(tmp_path / "run")
    with pytest.raises(FolderInUseError, match=f"process {process.pid}"):
        acquire(tmp_path / "run")


def test_item_11_holder_keeps_its_lease_after_a_failed_read(tmp_path, monkeypatch, unreadable):
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.01)
    with exclusive_folder(tmp_path, print) as held:
        with monkeypatch.context() as patch:
            unreadable(patch)
            with pytest.raises(OSError, match="Input/output error"):
                held.check()
            time.sleep(0.1)  # several heartbeats fail
        os.utime(tmp_path / LEASE_FILE, (1, 1))
        while (tmp_path / LEASE_FILE).stat().st_mtime == 1:
            time.sleep(0.01)
        held.check()
        with monkeypatch.context() as patch:
            unreadable(patch)
            held.release()  # must not hide the error that ends a run


def test_deleted_lease_is_restored(tmp_path):
    with exclusive_folder(tmp_path, print) as held:
        (tmp_path / LEASE_FILE).unlink()
        held.check()
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LEASE_FILE).exists()


def test_lease_that_replaced_a_stale_one_is_put_back_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = write_foreign_lease(tmp_path / "run")
    content = path.read_text()
    monkeypatch.setattr("os.link", no_links)
    assert not lease._remove_stale(path, None)
    assert path.read_text() == content


def test_heartbeat_updates_the_modification_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.01)
    with exclusive_folder(tmp_path, print):
        os.utime(tmp_path / LEASE_FILE, (1, 1))
        while (tmp_path / LEASE_FILE).stat().st_mtime == 1:
            time.sleep(0.01)


def test_folder_is_created_and_removed_again_if_it_stays_empty(tmp_path):
    with exclusive_folder(tmp_path / "a" / "b", print):
        pass
    assert list(tmp_path.iterdir()) == []
    with exclusive_folder(tmp_path / "a" / "b", print):
        Path(tmp_path / "a" / "b" / "result").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["result"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_lease_that_was_replaced_before_its_removal_is_restored(tmp_path, monkeypatch, has_links):
    """Another process may take the stale lease over first, also on a file system without hard links."""

    def no_links(*_):
        raise PermissionError("no hard links here")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / LEASE_FILE
    path.write_text("the lease of another process")
    stale = Holder("token", "host", "machine", 1, None, "yesterday", "command")
    assert not lease._remove_stale(path, stale)
    assert path.read_text() == "the lease of another process"
    assert [entry.name for entry in tmp_path.iterdir()] == [LEASE_FILE]
