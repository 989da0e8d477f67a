"""Cores, threads, and memory: affinity, cgroup limits, and load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gridcap.common import resources
from gridcap.common.resources import (
    available_cores,
    available_memory,
    choose_threads,
    cores_used_by_others,
    cpu_quota,
    fit_in_memory,
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine: returns the folder with `proc` and `cgroup`."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(resources, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(resources, "_CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def write_group(machine: Path, lines: str, **files: str) -> None:
    """Write /proc/self/cgroup and the files of cgroup folders: `a__cpu_max` -> a/cpu.max."""
    (machine / "proc" / "self" / "cgroup").write_text(lines)
    for name, text in files.items():
        *folders, file = name.split("__")
        folder = machine.joinpath("cgroup", *folders)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.replace("_", ".", 1)).write_text(text)


def test_without_a_quota_the_affinity_counts(machine: Path) -> None:
    assert (cpu_quota(), available_cores()) == (None, 8)
    write_group(machine, "0::/job\n", job__cpu_max="max 100000\n")
    assert (cpu_quota(), available_cores()) == (None, 8)


def test_item_29_the_smallest_quota_of_the_cgroup_and_its_ancestors_counts(machine: Path) -> None:
    write_group(machine, "0::/a/b\n", a__b__cpu_max="600000 100000\n", a__cpu_max="250000 100000\n")
    assert (cpu_quota(), available_cores()) == (2.5, 3)


def test_item_29_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    write_group(machine, "0::/docker/0123\n", cpu_max="150000 100000\n")
    assert (cpu_quota(), available_cores()) == (1.5, 2)


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_item_29_cgroup_v1_quotas_count(machine: Path, controllers: str) -> None:
    files = {f"{controllers}__job__cpu_cfs_quota_us": "50000\n", f"{controllers}__job__cpu_cfs_period_us": "100000\n"}
    write_group(machine, f"4:memory:/x\n1:{controllers}:/job\n", **files)
    assert (cpu_quota(), available_cores()) == (0.5, 1)


@pytest.mark.parametrize("text", ["", "nonsense", "x y", "-1"])
def test_an_unreadable_quota_is_ignored(machine: Path, text: str) -> None:
    write_group(machine, "0::/job\n", job__cpu_max=text)
    assert cpu_quota() is None


def test_a_machine_without_proc_has_all_cores(machine: Path) -> None:
    (machine / "proc" / "self").rmdir()
    assert (cpu_quota(), available_cores(), cores_used_by_others(0.01)) == (None, 8, 0)


def test_item_29_a_busy_core_gets_no_thread(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for busy, count in ((0.2, 8), (1.1, 7), (7.9, 1), (30, 1)):
        monkeypatch.setattr(resources, "cores_used_by_others", lambda busy=busy: busy)
        choice = choose_threads(None, {})
        assert choice.count == count
        assert bool(choice.reason) == (count < 8)
    assert "other processes use 8 of 8 cores" in choice.reason


@pytest.mark.parametrize(("cores", "count"), [("3 cores", 3), ("1 core", 1), ("1.5 cores", 2)])
def test_item_29_a_quota_is_the_reason_for_fewer_threads(
    machine: Path, monkeypatch: pytest.MonkeyPatch, cores: str, count: int
) -> None:
    monkeypatch.setattr(resources, "cores_used_by_others", lambda: 0.0)
    quota = int(float(cores.split()[0]) * 100_000)
    write_group(machine, "0::/job\n", job__cpu_max=f"{quota} 100000\n")
    choice = choose_threads(None, {})
    assert (choice.count, choice.reason) == (count, f"the CPU quota is {cores}")


def test_item_29_the_user_overrides_the_choice(machine: Path) -> None:
    assert choose_threads(5, {"OMP_NUM_THREADS": "2"}).count == 5
    assert choose_threads(None, {"OMP_NUM_THREADS": "2"}).count is None, "left to torch"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_item_29_a_busy_neighbor_is_measured_but_not_this_process() -> None:
    """All cores are occupied, so the result is at least one core for one neighbor, whatever else runs."""
    neighbor = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert neighbor.stdout is not None
        neighbor.stdout.readline()
        assert cores_used_by_others(0.5) > 0
    finally:
        neighbor.kill()
        neighbor.communicate()


MIB = 2**20


def test_item_29_without_a_limit_the_free_memory_of_the_machine_counts(machine: Path) -> None:
    assert available_memory() is None
    (machine / "proc" / "meminfo").write_text("MemTotal: 9999 kB\nMemFree: 10 kB\nMemAvailable:     2048 kB\n")
    write_group(machine, "0::/job\n", job__memory_max="max\n", job__memory_current="77\n")
    assert available_memory() == 2 * MIB


def test_item_29_the_tightest_memory_limit_counts_and_page_cache_is_free(machine: Path) -> None:
    (machine / "proc" / "meminfo").write_text("MemAvailable: 9999999 kB\n")
    files = {
        "a__b__memory_max": f"{900 * MIB}\n",
        "a__b__memory_current": f"{100 * MIB}\n",
        "a__memory_max": f"{500 * MIB}\n",
        "a__memory_current": f"{400 * MIB}\n",
        "a__memory_stat": f"anon 1\ninactive_file {300 * MIB}\n",
    }
    write_group(machine, "0::/a/b\n", **files)
    assert available_memory() == 400 * MIB


def test_item_29_cgroup_v1_memory_limits_count(machine: Path) -> None:
    files = {
        "memory__job__memory_limit_in_bytes": f"{64 * MIB}\n",
        "memory__job__memory_usage_in_bytes": f"{100 * MIB}\n",
        "memory__job__memory_stat": f"inactive_file 0\ntotal_inactive_file {50 * MIB}\n",
        "memory__memory_limit_in_bytes": "9223372036854771712\n",
        "memory__memory_usage_in_bytes": "1\n",
    }
    write_group(machine, "4:memory:/job\n1:cpu:/x\n", **files)
    assert available_memory() == 14 * MIB


@pytest.mark.parametrize("text", ["", "x", "max"])
def test_an_unreadable_memory_limit_is_ignored(machine: Path, text: str) -> None:
    write_group(machine, "0::/job\n", job__memory_max=text, job__memory_current=text, job__memory_stat=text)
    assert available_memory() is None


@pytest.mark.parametrize(
    ("available", "count"), [(None, 8), (0, 1), (4 * MIB, 1), (16 * MIB, 4), (31 * MIB, 7), (10**12, 8)]
)
def test_item_29_buffers_fit_in_a_quarter_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, available: int | None, count: int
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: available)
    assert fit_in_memory(8, MIB) == count
