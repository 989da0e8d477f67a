"""The job script, run by bash with a fake scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gridcap.common.errors import EXIT_FAILURE
from gridcap.extract.cluster.job_script import GRACE, SlurmRequest, job_script

UNUSUAL = ["two words", "it's", 'a "quote"', "$HOME `date` \\", "100%", "*", "", "ünïcode", "--flag=x y"]


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_script_requests_only_the_given_resources(tmp_path: Path) -> None:
    plain = job_script(["x"], SlurmRequest(8), tmp_path / "train", tmp_path)
    assert lines(plain, "#SBATCH") == [
        "#SBATCH --job-name=gridcap-train",
        "#SBATCH --array=0-7",
        "#SBATCH --ntasks=1",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=B:USR2@{GRACE}",
        f"#SBATCH --output={tmp_path}/train.slurm/%A_%a.log",
    ]
    assert "OMP_NUM_THREADS" not in plain
    request = SlurmRequest(2, partition="gpu", time="2:00:00", gpus_per_task=1, cpus_per_task=6, mem="16G")
    full = job_script(["x"], request, tmp_path / "train", tmp_path)
    for option in ("--partition=gpu", "--time=2:00:00", "--gpus-per-task=1", "--cpus-per-task=6", "--mem=16G"):
        assert f"#SBATCH {option}" in full.splitlines()
    assert "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-6}" in full


def test_sbatch_directives_precede_the_first_command(tmp_path: Path) -> None:
    script = job_script(["x"], SlurmRequest(1), tmp_path / "s", tmp_path).splitlines()
    assert script[0] == "#!/usr/bin/env bash"
    last = max(i for i, line in enumerate(script) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in script[:last])


def test_the_log_path_is_quoted(tmp_path: Path) -> None:
    script = job_script(["x"], SlurmRequest(1), tmp_path / 'a "b" 50% c' / "s", tmp_path)
    (output,) = lines(script, "#SBATCH --output")
    assert output.endswith('/a \\"b\\" 50%% c/s.slurm/%A_%a.log"'), "a single % would start a Slurm filename pattern"


def run_script(script: str, folder: Path, task: int = 0, signals: tuple[signal.Signals, ...] = ()) -> tuple[int, str]:
    """Run a job script as Slurm does; return its exit status and its output."""
    (folder / "job.sh").write_text(script)
    environ = {**os.environ, "SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": str(task)}
    process = subprocess.Popen(
        ["bash", folder / "job.sh"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = ""
    if signals:
        while "ready" not in output:
            output += (line := process.stdout.readline())
            assert line, output
        for number in signals:
            process.send_signal(number)
    output += process.communicate(timeout=60)[0]
    return process.returncode, output


def worker(body: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, sys, time\n{body}"]


def shard(number: int) -> str:
    return f"pathlib.Path('s', '{number:05}.h5').touch()"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Create a store in which each of two tasks has written one shard, and a temporary file."""
    folder = tmp_path / "s"
    folder.mkdir()
    for name in ("00000.h5", "00001.h5", ".00002.h5.host-1-abc.tmp", "plan.json"):
        (folder / name).touch()
    return folder


def test_arguments_and_working_directory_are_preserved(tmp_path: Path, store: Path) -> None:
    cwd = tmp_path / "it's here"
    cwd.mkdir()
    command = worker("print(ascii((sys.argv[1:], os.getcwd())))")
    status, output = run_script(job_script([*command, *UNUSUAL], SlurmRequest(1), store, cwd), tmp_path)
    assert status == 0, output
    assert ascii((UNUSUAL, str(cwd))) in output


def test_rank_variables_of_the_submitting_shell_are_ignored(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch passes on its whole environment, including that of an interactive srun."""
    for name, value in {"SLURM_STEP_ID": 0, "SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 4, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    body = "from gridcap.extract.cluster.share import find_share; print(find_share(os.environ, None, None))"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    status, output = run_script(job_script(worker(body), SlurmRequest(2), store, tmp_path), tmp_path, task=1)
    assert status == 0, output
    assert "rank 1 of 2 (Slurm array" in output


def test_a_working_directory_missing_on_the_node_is_a_failure(tmp_path: Path, store: Path) -> None:
    script = job_script(worker("print('ran')"), SlurmRequest(1), store, tmp_path / "elsewhere")
    status, output = run_script(script, tmp_path)
    assert status == EXIT_FAILURE
    assert "elsewhere" in output
    assert "ran" not in output.splitlines()


NOT_PREEMPTED = "[[ $1 == show ]] && echo 'PreemptTime=None' || echo scontrol \"$@\""
PREEMPTED = "[[ $1 == show ]] && echo 'PreemptTime=2026-01-01T00:00:00' || echo scontrol \"$@\""
FORGOTTEN = "[[ $1 == show ]] && echo 'JobState=COMPLETING' || exit 1"  # Slurm has requeued the job already
REQUEUED = "scontrol requeue 70_1"


@pytest.mark.parametrize(
    ("body", "slurm", "status", "requeued"),
    [
        ("sys.exit(0)", NOT_PREEMPTED, 0, False),
        ("sys.exit(1)", NOT_PREEMPTED, 1, False),
        ("sys.exit(3)", NOT_PREEMPTED, 3, False),
        ("sys.exit(1)", PREEMPTED, 1, False),  # it failed by itself
        (f"{shard(3)}; sys.exit(140)", NOT_PREEMPTED, 140, True),
        ("sys.exit(140)", NOT_PREEMPTED, 1, False),  # no progress: it would fail again
        (f"{shard(2)}; sys.exit(140)", NOT_PREEMPTED, 1, False),  # the shard belongs to another task
        ("pathlib.Path('s', '.00003.h5.host-2-abc.tmp').touch(); sys.exit(140)", NOT_PREEMPTED, 1, False),
        ("sys.exit(140)", PREEMPTED, 140, True),
        ("sys.exit(143)", PREEMPTED, 143, True),  # preempted with SIGTERM only
        ("sys.exit(143)", NOT_PREEMPTED, 143, False),  # scancel
        ("sys.exit(143)", FORGOTTEN, 143, False),
        ("os.kill(os.getpid(), signal.SIGKILL)", NOT_PREEMPTED, 137, False),
    ],
)
def test_a_job_is_requeued_only_if_it_makes_progress(
    tmp_path: Path,
    store: Path,
    fake_command: Callable[[str, str], None],
    body: str,
    slurm: str,
    status: int,
    requeued: bool,
) -> None:
    fake_command("scontrol", slurm)
    exit_status, output = run_script(job_script(worker(body), SlurmRequest(2), store, tmp_path), tmp_path, task=1)
    assert exit_status == status, output
    assert (REQUEUED in output) == requeued, output
    if status == 1 and "140" in body:
        assert "no shard was completed within the time limit" in output
        assert "--time" in output


def test_the_warning_signal_is_forwarded_once(
    tmp_path: Path, store: Path, fake_command: Callable[[str, str], None]
) -> None:
    fake_command("scontrol", PREEMPTED)
    body = """
received = []
signal.signal(signal.SIGUSR2, lambda number, frame: received.append(number))
print("ready", flush=True)
while not received:
    time.sleep(0.01)
time.sleep(0.5)
print("received", received, flush=True)
sys.exit(140)
"""
    status, output = run_script(
        job_script(worker(body), SlurmRequest(2), store, tmp_path), tmp_path, 1, (signal.SIGUSR2,)
    )
    assert status == 140, output
    assert f"received [{signal.SIGUSR2.value}]" in output
    assert REQUEUED in output


def test_the_shell_survives_sigterm_until_the_worker_exits(
    tmp_path: Path, store: Path, fake_command: Callable[[str, str], None]
) -> None:
    """Slurm sends SIGTERM to all processes, including the worker."""
    fake_command("scontrol", NOT_PREEMPTED)
    body = "print('ready', flush=True); time.sleep(0.7); print('finished'); sys.exit(143)"
    script = job_script(worker(body), SlurmRequest(2), store, tmp_path)
    status, output = run_script(script, tmp_path, 1, (signal.SIGTERM, signal.SIGTERM))
    assert status == 143
    assert "finished" in output
