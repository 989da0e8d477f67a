"""extract-features --submit slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.extract.cli_helpers import SMALL, fails, files, run

SUBMIT = ("--submit", "slurm", "--num-jobs", 3)


@pytest.fixture
def slurm(tmp_path: Path, no_launcher: pytest.MonkeyPatch) -> Path:
    """Put fake sbatch and squeue on the PATH; return the file to which sbatch copies the script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\nshift\ncp \"$1\" '{tmp_path}/submitted'\necho 42\n")
    (folder / "squeue").write_text("#!/bin/sh\necho 'Invalid job id specified' >&2\nexit 1\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    no_launcher.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "submitted"


def test_a_dry_submission_prints_the_job_script_and_writes_nothing(
    fake: Any, photos: Any, slurm: Path, tmp_path: Path
) -> None:
    folder = photos(10)
    before = files(tmp_path)
    result = run("--images", folder, *SMALL, *SUBMIT, "--time", "1:00:00", "--partition", "main", "--dry-run")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == before
    script = result.stdout[result.stdout.index("#!/usr/bin/env bash") :]
    for line in (
        "#SBATCH --array=0-2",
        "#SBATCH --time=1:00:00",
        "#SBATCH --partition=main",
        f"cd {tmp_path} || exit 1",
    ):
        assert line in script.splitlines()
    assert sys.executable in script
    words = [line.strip() for line in script[script.index("command=(") : script.index("\n)\n")].splitlines()[2:]]
    assert words == [
        f"--images {folder}",
        "--weights random",
        "--shard-size 2",
        "--batch-size 2",
        "--precision float32",
    ], "the given flags without those of the submission"


def test_submitting_saves_the_plan_and_prints_how_to_watch_and_cancel(
    fake: Any, photos: Any, slurm: Path, tmp_path: Path
) -> None:
    result = run("--images", photos(10), *SMALL, *SUBMIT)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "features" / "photos" / "plan.json").exists(), "so that all jobs use the same plan"
    assert slurm.read_text() == (tmp_path / "features" / "photos.slurm" / "job.sh").read_text()
    for text in ("job 42", "squeue --jobs=42", "scancel 42"):
        assert text in result.stdout
    assert fake.built == 0


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ((), "float32"),
        (("--gpus-per-task", 1), "bfloat16"),
        (("--precision", "bfloat16"), "bfloat16"),
        (("--gpus-per-task", 1, "--precision", "float16"), "float16"),
    ],
)
def test_the_precision_of_jobs_is_resolved_at_submission(
    fake: Any, photos: Any, slurm: Path, flags: tuple[object, ...], precision: str
) -> None:
    """Independent of this machine, which does not run the jobs."""
    result = run("--images", photos(10), "--weights", "random", "--shard-size", 2, *SUBMIT, *flags)
    assert result.exit_code == 0, result.output
    assert f"  --precision {precision}\n" in slurm.read_text()
    assert json.loads(Path("features/photos/plan.json").read_text())["provenance"]["precision"] == precision


def test_a_task_uses_all_its_gpus(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(10)
    for flags, devices in (((), "auto"), (("--devices", 2), "2")):
        result = run("--images", folder, *SMALL, *SUBMIT, "--gpus-per-task", 4, *flags)
        assert result.exit_code == 0, result.output
        assert f"  --devices {devices}\n" in slurm.read_text()


def test_at_most_one_job_per_shard_is_submitted(fake: Any, photos: Any, slurm: Path) -> None:
    result = run("--images", photos(4), *SMALL, *SUBMIT)
    assert "2 shards need only 2 jobs" in result.stderr
    assert "#SBATCH --array=0-1\n" in slurm.read_text()


def test_a_complete_store_is_not_submitted(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(10, invalid={1: "text"})
    assert run("--images", folder, *SMALL).exit_code == 3
    result = run("--images", folder, *SMALL, *SUBMIT, "--wait")
    assert "nothing to do" in result.stdout
    assert result.exit_code == 3
    assert not slurm.exists()


def test_a_different_plan_on_disk_is_an_error_before_anything_is_submitted(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL).exit_code == 0
    error = fails(1, "--images", folder, "--weights", "random:1", "--precision", "float32", *SUBMIT)
    assert "planned differently" in error
    assert not slurm.exists()


def test_jobs_that_ended_before_the_store_was_complete_are_a_failure(fake: Any, photos: Any, slurm: Path) -> None:
    error = fails(1, "--images", photos(10), *SMALL, *SUBMIT, "--wait")
    assert "5 of 5 shards are missing" in error
    assert "photos.slurm/42_*.log" in error


def test_ctrl_c_stops_waiting_but_not_the_jobs(
    fake: Any, photos: Any, slurm: Path, no_launcher: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    no_launcher.setattr("gridcap.extract.cluster.slurm.follow", interrupt)
    result = run("--images", photos(10), *SMALL, *SUBMIT, "--wait")
    assert result.exit_code == 130
    assert "the jobs continue" in result.stderr
    assert "scancel 42" in result.stderr


def test_submitting_without_slurm_is_an_error(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_launcher.setenv("PATH", str(tmp_path))
    assert "sbatch" in fails(2, "--images", photos(10), *SMALL, *SUBMIT)
