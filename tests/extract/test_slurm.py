"""Extraction on a real Slurm of one node: killed, preempted, out of time, and the same bytes in the end.

Nothing here looks at a clock but to give up: the node has as many cores as this machine, and others use them too.
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
PATIENCE = 300  # seconds until a test gives up; nothing is measured


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 small pictures, in a folder whose name a careless script would break."""
    folder = tmp_path_factory.mktemp("data") / "my pictures, 100% 'mine'"
    folder.mkdir()
    for i in range(16):
        render(all_scenes()[i * 10], np.random.default_rng(i), 64).save(folder / f"{i:02}.png")
    return folder


def command(images: Path, output: Path) -> list[str]:
    options = "--split scenes --encoder resnet50 --weights random --precision float32 --device cpu"
    sizes = "--shard-size 2 --batch-size 2"
    return [str(PROGRAM), "--images", str(images), "--output", str(output), *options.split(), *sizes.split()]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=PATIENCE)


def contents(output: Path) -> dict[str, bytes]:
    """The bytes of the index and of everything beside the shards."""
    paths = [output, *output.with_suffix("").rglob("*")]
    return {str(p.relative_to(output.parent)): p.read_bytes() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes that nobody disturbs."""
    output = tmp_path_factory.mktemp("calm") / "scenes.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        done = run(*command(images, output))
    assert done.returncode == 0, done.stderr
    return contents(output)


def shards_of(output: Path) -> set[int]:
    return {int(path.stem) for path in output.with_suffix("").rglob("[0-9]*.h5")}


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}\n{run('squeue').stdout}"
        time.sleep(0.2)


def submitted(images: Path, output: Path, workers: int, *more: object) -> str:
    """Submit; the number of the job."""
    done = run(*command(images, output), "--submit", "slurm", "--num-jobs", workers, *more)
    assert done.returncode == 0, done.stderr
    return re.search(r"submitted: job (\d+)", done.stdout)[1]


@contextlib.contextmanager
def waiting_for(images: Path, output: Path, workers: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Submit, and wait in a process beside this one."""
    words = [*command(images, output), "--submit", "slurm", "--num-jobs", str(workers), "--wait", *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def current_job() -> str:
    """The number of the only job in the queue."""
    (job,) = set(run("squeue", "--noheader", "--format=%F").stdout.split())
    return job


def nothing_left(job: str) -> bool:
    return not run("squeue", "--noheader", f"--jobs={job}").stdout.strip()


def logs(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.with_suffix(".slurm").glob("*.log")))


class Worker:
    """The extract-features process of a task."""

    def __init__(self, job: str, task: int) -> None:
        wanted = {f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}"}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                programs = {Path(word).name for word in (process / "cmdline").read_text().split("\0")}
                if PROGRAM.name in programs and wanted <= set((process / "environ").read_text().split("\0")):
                    found.append(int(process.name))
        (self._process,) = found

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process, number)


def assert_same(output: Path, calm: dict[str, bytes]) -> None:
    """The store is what the calm run made: every byte, and no temporary file."""
    mine = contents(output)
    assert sorted(mine) == sorted(calm), logs(output)
    assert [name for name in calm if mine[name] != calm[name]] == []


@contextlib.contextmanager
def cleared() -> Iterator[None]:
    """Leave no job behind for the next test."""
    try:
        yield
    finally:
        run("scancel", "--user=root")
        until(lambda: not run("squeue", "--noheader").stdout.strip(), "an empty queue")


def test_an_array_of_four_makes_the_same_bytes_and_waiting_sees_the_end(
    slurm: None, images: Path, calm: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "a 'folder' of 100%" / "scenes.h5"
    output.parent.mkdir()
    with cleared():
        done = run(*command(images, output), "--submit", "slurm", "--num-jobs", 4, "--wait")
        assert done.returncode == 0, done.stdout + done.stderr + logs(output)
        assert re.search(r"done: .*16 images in 8 shards \(8 made now, 0 were there\)", done.stdout)
        assert_same(output, calm)
        said = logs(output)
        for worker in range(4):
            assert f"worker {worker} of 4 (Slurm array): 2 of 8 shards are mine" in said


def test_a_preempted_job_is_requeued_once_and_makes_the_same_bytes(
    slurm: None, images: Path, calm: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with cleared():
        job = submitted(images, output, 1)
        until(lambda: shards_of(output), "a first shard")
        worker = Worker(job, 0)
        worker.send_signal(signal.SIGSTOP)  # so that it is in the middle when the warning comes
        high = run("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
        until(lambda: "warned by Slurm" in logs(output), "the warning")
        worker.send_signal(signal.SIGCONT)
        until(lambda: "requeued: task 0" in logs(output), "the requeue")
        assert not output.exists()
        until(lambda: nothing_left(high.stdout.strip()), "the end of the other job")
        until(lambda: nothing_left(job), "the end of the job")
        assert_same(output, calm)
        said = logs(output)
        assert said.count("requeued: task 0") == 1
        assert "interrupted: nothing is broken" in said, "it was warned, not just killed"


def test_a_job_that_reaches_its_time_limit_is_requeued_and_makes_the_same_bytes(
    slurm: None, images: Path, calm: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with cleared():
        job = submitted(images, output, 1, "--time", "60")
        until(lambda: shards_of(output), "a first shard")
        worker = Worker(job, 0)
        worker.send_signal(signal.SIGSTOP)
        run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        until(lambda: "warned by Slurm" in logs(output), "the warning")
        worker.send_signal(signal.SIGCONT)
        until(lambda: "requeued: task 0" in logs(output), "the requeue")
        until(lambda: run("scontrol", "update", f"JobId={job}", "TimeLimit=60").returncode == 0, "a longer limit")
        until(lambda: nothing_left(job), "the end of the job")
        assert_same(output, calm)
        assert logs(output).count("requeued: task 0") == 1


def test_a_time_limit_too_short_for_a_single_shard_is_said_and_ends_the_matter(
    slurm: None, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with cleared(), waiting_for(images, output, 1, "--time", "1", "--shard-size", "16") as waiting:
        until(
            lambda: "plan: 16 images" in logs(output) or "warned by Slurm" in logs(output), "the worker or the warning"
        )
        with contextlib.suppress(ValueError, ProcessLookupError):  # on a busy machine the warning may come first
            worker = Worker(current_job(), 0)
            worker.send_signal(signal.SIGSTOP)  # so that it does not finish before the warning comes
            until(lambda: "warned by Slurm" in logs(output), "the warning")
            worker.send_signal(signal.SIGCONT)
        said, errors = waiting.communicate(timeout=PATIENCE)
        assert waiting.returncode == 1, said + errors
        assert "1 of 1 shards are missing: task 0 FAILED" in errors
        assert "not one shard was finished within the time limit" in logs(output)
        assert "requeued:" not in logs(output)
        assert not output.exists()


def test_after_scancel_of_one_task_waiting_fails_and_a_rerun_fills_the_holes(
    slurm: None, images: Path, calm: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with cleared(), waiting_for(images, output, 2) as waiting:
        until(lambda: "rank 1 of 2" in logs(output), "the start of task 1")
        run("scancel", f"{current_job()}_1")
        said, errors = waiting.communicate(timeout=PATIENCE)
        assert waiting.returncode == 1, said + errors
        assert "task 0 COMPLETED; task 1 CANCELLED" in errors
        assert "scenes.slurm" in errors, "where the logs are"
        assert not output.exists()
        assert "requeued:" not in logs(output), "who cancels a job does not want it back"
        assert set(range(0, 8, 2)) <= shards_of(output) < set(range(8))
        made = {path: path.stat().st_mtime_ns for path in output.with_suffix("").rglob("[0-9]*.h5")}
        rerun = run(*command(images, output))
        assert rerun.returncode == 0, rerun.stderr
        assert_same(output, calm)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items()), "a sound shard is made once"


def test_two_tasks_with_the_same_shards_at_the_same_time_make_the_same_bytes(
    slurm: None, images: Path, calm: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "scenes.h5"
    with cleared():
        both = run(
            "srun", "--ntasks=2", "--kill-on-bad-exit=0", *command(images, output), "--rank", 0, "--world-size", 1
        )
        assert both.returncode == 0, both.stderr
        assert both.stdout.count("16 images in 8 shards") >= 1
        assert_same(output, calm)
