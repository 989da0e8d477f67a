"""Extraction on a real single-node Slurm: cancelled, preempted, and timed-out jobs end in the same bytes.

Timeouts only bound the duration of a failing test, because other processes use the cores of this machine, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gridcap.common.scenes import all_scenes, render

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).parent / "extract-features"
TIMEOUT = 300  # seconds until a test fails; no timing is measured


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create 16 small images in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("data") / "my pictures, 100% 'mine'"
    folder.mkdir()
    for i in range(16):
        render(all_scenes()[i * 10], np.random.default_rng(i), 64).save(folder / f"{i:02}.png")
    return folder


def command(images: Path, output: Path) -> list[str]:
    options = "--split scenes --encoder resnet50 --weights random --precision float32 --device cpu"
    sizes = "--shard-size 2 --batch-size 2"
    return [str(PROGRAM), "--images", str(images), "--output", str(output), *options.split(), *sizes.split()]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, timeout=TIMEOUT)


def contents(output: Path) -> dict[str, bytes]:
    """Return the contents of the index and of all files in the store's folder."""
    paths = [output, *output.with_suffix("").rglob("*")]
    return {str(p.relative_to(output.parent)): p.read_bytes() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the store that one uninterrupted process writes."""
    output = tmp_path_factory.mktemp("reference") / "scenes.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        done = run(*command(images, output))
    assert done.returncode == 0, done.stderr
    return contents(output)


def shards_of(output: Path) -> set[int]:
    return {int(path.stem) for path in output.with_suffix("").rglob("[0-9]*.h5")}


def until(condition: Callable[[], object], event: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {event}\n{run('squeue').stdout}"
        time.sleep(0.2)


def submit(images: Path, output: Path, num_jobs: int, *more: object) -> str:
    """Submit and return the job id."""
    done = run(*command(images, output), "--submit", "slurm", "--num-jobs", num_jobs, *more)
    assert done.returncode == 0, done.stderr
    return re.search(r"submitted: job (\d+)", done.stdout)[1]


@contextlib.contextmanager
def waiting_for(images: Path, output: Path, num_jobs: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Submit with --wait in another process."""
    arguments = [*command(images, output), "--submit", "slurm", "--num-jobs", str(num_jobs), "--wait", *more]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def current_job() -> str:
    """Return the id of the only job in the queue."""
    (job,) = set(run("squeue", "--noheader", "--format=%F").stdout.split())
    return job


def has_left_the_queue(job: str) -> bool:
    return not run("squeue", "--noheader", f"--jobs={job}").stdout.strip()


def logs(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.with_suffix(".slurm").glob("*.log")))


class Worker:
    """The extract-features process of an array task."""

    def __init__(self, job: str, task: int) -> None:
        variables = {f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}"}
        matches = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                programs = {Path(argument).name for argument in (process / "cmdline").read_text().split("\0")}
                if PROGRAM.name in programs and variables <= set((process / "environ").read_text().split("\0")):
                    matches.append(int(process.name))
        (self._process,) = matches

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process, number)


def assert_same(output: Path, reference: dict[str, bytes]) -> None:
    """Assert that the store equals the reference in every byte and has no temporary files."""
    actual = contents(output)
    assert sorted(actual) == sorted(reference), logs(output)
    assert [name for name in reference if actual[name] != reference[name]] == []


@contextlib.contextmanager
def empty_queue() -> Iterator[None]:
    """Cancel all jobs at the end of the block."""
    try:
        yield
    finally:
        run("scancel", "--user=root")
        until(lambda: not run("squeue", "--noheader").stdout.strip(), "an empty queue")


def test_an_array_of_four_writes_the_reference_store(
    slurm: None, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "a 'folder' of 100%" / "scenes.h5"
    output.parent.mkdir()
    with empty_queue():
        done = run(*command(images, output), "--submit", "slurm", "--num-jobs", 4, "--wait")
        assert done.returncode == 0, done.stdout + done.stderr + logs(output)
        assert re.search(r"done: .*16 images", done.stdout)
        assert_same(output, reference)
        output_logs = logs(output)
        for rank in range(4):
            assert f"rank {rank} of 4 (Slurm array" in output_logs


def test_a_preempted_job_is_requeued_once(
    slurm: None, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with empty_queue():
        job = submit(images, output, 1)
        until(lambda: shards_of(output), "a first shard")
        worker = Worker(job, 0)
        worker.send_signal(signal.SIGSTOP)  # the warning must arrive while the worker is running
        high = run("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
        until(lambda: "warning signal from Slurm" in logs(output), "the warning")
        worker.send_signal(signal.SIGCONT)
        until(lambda: "requeued: task 0" in logs(output), "the requeue")
        assert not output.exists()
        until(lambda: has_left_the_queue(high.stdout.strip()), "the end of the other job")
        until(lambda: has_left_the_queue(job), "the end of the job")
        assert_same(output, reference)
        assert logs(output).count("requeued: task 0") == 1
        assert "interrupted" in logs(output), "the worker must be warned, not killed"


def test_a_job_at_its_time_limit_is_requeued(
    slurm: None, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with empty_queue():
        job = submit(images, output, 1, "--time", "60")
        until(lambda: shards_of(output), "a first shard")
        worker = Worker(job, 0)
        worker.send_signal(signal.SIGSTOP)
        run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        until(lambda: "warning signal from Slurm" in logs(output), "the warning")
        worker.send_signal(signal.SIGCONT)
        until(lambda: "requeued: task 0" in logs(output), "the requeue")
        until(lambda: run("scontrol", "update", f"JobId={job}", "TimeLimit=60").returncode == 0, "a longer limit")
        until(lambda: has_left_the_queue(job), "the end of the job")
        assert_same(output, reference)
        assert logs(output).count("requeued: task 0") == 1


def test_a_time_limit_too_short_for_one_shard_is_a_failure(slurm: None, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "scenes.h5"
    with empty_queue(), waiting_for(images, output, 1, "--time", "1", "--shard-size", "16") as waiting:
        until(
            lambda: "plan: 16 images" in logs(output) or "warning signal from Slurm" in logs(output),
            "the worker or the warning",
        )
        with contextlib.suppress(ValueError, ProcessLookupError):  # on a busy machine the warning may arrive first
            worker = Worker(current_job(), 0)
            worker.send_signal(signal.SIGSTOP)  # the worker must not finish before the warning arrives
            until(lambda: "warning signal from Slurm" in logs(output), "the warning")
            worker.send_signal(signal.SIGCONT)
        stdout, stderr = waiting.communicate(timeout=TIMEOUT)
        assert waiting.returncode == 1, stdout + stderr
        assert "1 of 1 shard are missing: task 0 FAILED" in stderr
        assert "no shard was completed within the time limit" in logs(output)
        assert "requeued:" not in logs(output)
        assert not output.exists()


def test_after_scancel_of_one_task_a_rerun_writes_the_missing_shards(
    slurm: None, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with empty_queue(), waiting_for(images, output, 2) as waiting:
        until(lambda: "rank 1 of 2" in logs(output), "the start of task 1")
        run("scancel", f"{current_job()}_1")
        stdout, stderr = waiting.communicate(timeout=TIMEOUT)
        assert waiting.returncode == 1, stdout + stderr
        assert "task 0 COMPLETED; task 1 CANCELLED" in stderr
        assert "scenes.slurm" in stderr, "the error must name the logs"
        assert not output.exists()
        assert "requeued:" not in logs(output), "a canceled job must not be requeued"
        assert set(range(0, 8, 2)) <= shards_of(output) < set(range(8))
        times = {path: path.stat().st_mtime_ns for path in output.with_suffix("").rglob("[0-9]*.h5")}
        rerun = run(*command(images, output))
        assert rerun.returncode == 0, rerun.stderr
        assert_same(output, reference)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in times.items()), (
            "complete shards must not be rewritten"
        )


def test_two_tasks_may_write_the_same_shards_concurrently(
    slurm: None, images: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with empty_queue():
        both = run(
            "srun", "--ntasks=2", "--kill-on-bad-exit=0", *command(images, output), "--rank", 0, "--world-size", 1
        )
        assert both.returncode == 0, both.stderr
        assert both.stdout.count("16 images") >= 1
        assert_same(output, reference)
