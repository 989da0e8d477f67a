"""The extract-features command as one of several processes, and --devices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gridcap.common.store.reader import FeatureStore
from gridcap.extract.cluster.share import Share
from tests.extract.cli_helpers import SMALL, fails, run


def test_processes_write_their_shares_and_the_last_one_writes_the_index(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path
) -> None:
    folder = photos(10)
    first = run("--images", folder, *SMALL, "--rank", 0, "--world-size", 2)
    assert first.exit_code == 0, first.output
    assert "rank 0 of 2 (flags): 3 of 5 shards" in first.stdout
    assert "share done: 3 shards written (0 already complete)" in first.stdout
    assert "2 shards of other processes are still missing" in first.stdout
    assert not (tmp_path / "features" / "photos.h5").exists()
    last = run("--images", folder, *SMALL, "--rank", 1, "--world-size", 2)
    assert last.exit_code == 0, last.output
    assert re.search(r"done: features/photos\.h5: 10 images, 2 shards written", last.stdout)
    assert len(FeatureStore(tmp_path / "features" / "photos.h5")) == 10


def test_rank_and_world_size_are_read_from_the_environment(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch
) -> None:
    no_launcher.setenv("SLURM_ARRAY_TASK_ID", "2")
    no_launcher.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    result = run("--images", photos(10), *SMALL)
    assert "rank 2 of 3 (Slurm array; " in result.stdout
    assert "): 1 of 5 shards" in result.stdout


def test_only_the_process_that_completes_the_store_exits_with_status_3(
    fake: Any, photos: Any, no_launcher: Any
) -> None:
    folder = photos(10, invalid={0: "text"})
    first = run("--images", folder, *SMALL, "--rank", 0, "--world-size", 2)
    assert first.exit_code == 0, "torchrun would kill the others for anything else"
    assert "invalid images: 1" in first.stdout
    last = run("--images", folder, *SMALL, "--rank", 1, "--world-size", 2)
    assert last.exit_code == 3
    assert "invalid images: 1" in last.stdout, "of the whole store, not of its share"


def test_a_process_without_shards_succeeds(fake: Any, photos: Any, no_launcher: Any) -> None:
    result = run("--images", photos(2), *SMALL, "--rank", 3, "--world-size", 4)
    assert result.exit_code == 0, result.output
    assert "0 of 1 shard" in result.stdout
    assert fake.built == 0


def test_only_one_process_per_machine_prints_the_configuration(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    for rank in (0, 1):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            no_launcher.setenv(name, str(value))
        result = run("--images", folder, *SMALL)
        assert result.exit_code == 0, result.output
        assert ("configuration" in result.stdout) == (rank == 0)
        assert f"rank {rank} of 2 (torchrun)" in result.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--rank", 2, "--world-size", 2), "--rank 2"),
        (("--world-size", 2), "--rank"),
        (("--devices", "none"), "--devices"),
        (("--devices", 0), "--devices"),
        (("--devices", 2, "--device", "cuda:1"), "cuda:1"),
        (("--partition", "gpu"), "--partition: only with --submit"),
        (("--gpus-per-task", 1, "--wait"), "--gpus-per-task, --wait: only with --submit"),
        (("--submit", "slurm"), "--num-jobs"),
        (("--submit", "slurm", "--num-jobs", 0), "--num-jobs"),
        (("--submit", "slurm", "--num-jobs", 2, "--rank", 1), "--rank"),
        (("--submit", "pbs", "--num-jobs", 2), "pbs"),
    ],
)
def test_contradicting_flags_about_processes_are_usage_errors(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path, flags: tuple[object, ...], expected: str
) -> None:
    error = fails(2, "--images", photos(4), *SMALL, *flags)
    assert expected in error
    assert not (tmp_path / "features" / "photos.h5").exists()


def test_devices_divides_the_work_and_reports_the_whole_store(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real processes run in test_processes.py and test_slurm.py; here each is a call of the command."""

    class InProcess:
        def __init__(self, command: list[str], share: Share, workers: int, threads: int | None) -> None:
            assert command[2:] == [*(str(word) for word in given), "--brief"]
            assert threads is not None, "on a CPU they divide the cores"
            parts = [share.subdivide(i, workers, "") for i in range(workers)]
            self.statuses = [run(*command[2:], "--rank", p.rank, "--world-size", p.world_size).exit_code for p in parts]

        def running(self) -> bool:
            return False

        def wait(self) -> list[int]:
            return self.statuses

    no_launcher.setattr("gridcap.extract.cluster.launch.LocalProcesses", InProcess)
    folder = photos(10, invalid={3: "text"})
    # In the order in which the command declares them.
    given = (
        "--images",
        folder,
        "--weights",
        "random",
        "--precision",
        "float32",
        "--shard-size",
        2,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--max-invalid",
        "50%",
    )
    result = run(*given, "--devices", 3)
    assert result.exit_code == 3, result.output
    assert "10 images, 5 shards written (0 already complete)" in result.stdout
    assert "invalid images: 1" in result.stdout
    again = run(*given, "--devices", 3)
    assert "nothing to do" in again.stdout
