"""Shares: found in every launcher's environment, and always a partition of the shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.errors import UserError
from gridcap.common.scenes import all_scenes, render
from gridcap.extract.cli import main
from gridcap.extract.cluster.share import WHOLE, LocalWorkers, Share, find_share, local_device, local_number


def array(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """The environment of an array's task."""
    values = {"ID": task, "COUNT": count, "MIN": first, "MAX": first + (count - 1) * step, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def step(task: int, tasks: int) -> dict[str, str]:
    """The environment of one task of srun."""
    return {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": str(tasks)}


def torchrun(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}  # as a job without srun sees it


@pytest.mark.parametrize(
    ("environ", "flags", "share"),
    [
        ({}, (None, None), Share(0, 1)),
        ({}, (2, 8), Share(2, 8)),
        (torchrun(3, 4) | array(1, 2), (2, 8), Share(2, 8)),  # the flags go over everything
        (torchrun(3, 4), (None, None), Share(3, 4)),
        (array(2, 8), (None, None), Share(2, 8)),
        (array(7, 3, first=5), (None, None), Share(2, 3)),
        (array(14, 3, first=10, step=4), (None, None), Share(1, 3)),
        (array(1, 2) | BATCH_SCRIPT, (None, None), Share(1, 2)),
        (BATCH_SCRIPT, (None, None), Share(0, 1)),
        (step(3, 4) | {"SLURM_NTASKS": "16"}, (None, None), Share(3, 4)),
        (array(1, 2) | step(3, 4), (None, None), Share(1 + 2 * 3, 8)),
        (array(1, 2) | torchrun(3, 4), (None, None), Share(1 + 2 * 3, 8)),
        (torchrun(3, 8) | step(0, 2), (None, None), Share(3, 8)),  # srun starts torchrun, which numbers over all nodes
        ({"JOB_COMPLETION_INDEX": "2"}, (None, 5), Share(2, 5)),
        (torchrun(1, 2) | {"JOB_COMPLETION_INDEX": "0"}, (None, None), Share(1, 2)),
    ],
)
def test_the_share_is_found_in_the_environment(
    environ: dict[str, str], flags: tuple[int | None, int | None], share: Share
) -> None:
    assert find_share(environ, *flags) == share


@pytest.mark.parametrize(
    ("environ", "flags", "named"),
    [
        ({}, (2, None), "--workers"),
        ({}, (None, 4), "--worker"),
        ({}, (4, 4), "--worker 4"),
        ({}, (-1, 4), "--worker -1"),
        ({}, (0, 0), "--workers 0"),
        (array(0, 4), (None, 4), "--worker"),
        (torchrun(0, 4), (None, 4), "--worker"),
        ({"RANK": "0"}, (None, None), "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, (None, None), "RANK"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, (None, None), "RANK='two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, (None, None), "RANK=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, (None, None), "RANK='-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, (None, None), "RANK=''"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, (None, None), "SLURM_ARRAY_TASK_COUNT"),
        (array(0, 4) | {"SLURM_ARRAY_TASK_ID": "x"}, (None, None), "SLURM_ARRAY_TASK_ID='x'"),
        (array(5, 3), (None, None), "SLURM_ARRAY_TASK_ID=5"),  # --array=0,1,5
        (array(3, 3, step=2), (None, None), "SLURM_ARRAY_TASK_ID=3"),
        (step(0, 2) | {"SLURM_PROCID": "²"}, (None, None), "SLURM_PROCID"),
        ({"JOB_COMPLETION_INDEX": "2"}, (None, None), "JOB_COMPLETION_INDEX"),
        ({"JOB_COMPLETION_INDEX": "5"}, (None, 5), "JOB_COMPLETION_INDEX=5"),
    ],
)
def test_what_makes_no_sense_is_named(
    environ: dict[str, str], flags: tuple[int | None, int | None], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        find_share(environ, *flags)
    assert named in f"{caught.value.message} {caught.value.hint}"


counts = st.integers(1, 12)


def assert_partition(shares: list[Share], shards: int) -> None:
    assert sorted(shard for share in shares for shard in share.of(shards)) == list(range(shards))


@given(tasks=counts, first=st.integers(0, 9), stride=st.integers(1, 5), inner=counts, shards=st.integers(0, 60))
def test_every_launchers_shares_are_a_partition(tasks: int, first: int, stride: int, inner: int, shards: int) -> None:
    numbers = [array(first + stride * i, tasks, first, stride) for i in range(tasks)]
    assert_partition([find_share(n, None, None) for n in numbers], shards)
    for launcher in (torchrun, step):
        assert_partition([find_share(launcher(j, inner), None, None) for j in range(inner)], shards)
        both = [n | launcher(j, inner) for n in numbers for j in range(inner)]
        assert_partition([find_share(environ, None, None) for environ in both], shards)
    pods = [{"JOB_COMPLETION_INDEX": str(i)} for i in range(tasks)]
    assert_partition([find_share(environ, None, tasks) for environ in pods], shards)


@given(parts=st.lists(counts, min_size=1, max_size=6), shards=st.integers(0, 60))
def test_machines_with_different_numbers_of_gpus_may_share_one_store(parts: list[int], shards: int) -> None:
    shares = [
        find_share(array(i, len(parts)) | torchrun(j, n), None, None) for i, n in enumerate(parts) for j in range(n)
    ]
    assert_partition(shares, shards)


def test_a_share_says_where_it_comes_from() -> None:
    assert str(find_share(array(2, 8), None, None)) == "worker 2 of 8 (Slurm array)"
    assert str(find_share(array(0, 2) | step(1, 2), None, None)) == "worker 2 of 4 (Slurm array, Slurm tasks)"
    assert str(find_share({}, 0, 2)) == "worker 0 of 2 (flags)"
    assert "Kubernetes" in str(find_share({"JOB_COMPLETION_INDEX": "0"}, None, 2))
    assert "torchrun" in str(find_share(torchrun(0, 2), None, None))


@pytest.mark.parametrize(
    ("environ", "device", "gpus", "chosen"),
    [
        ({}, "auto", 4, "auto"),
        ({"LOCAL_RANK": "3"}, "auto", 4, "cuda:3"),
        ({"LOCAL_RANK": "5"}, "cuda", 4, "cuda:1"),
        ({"LOCAL_RANK": "3"}, "auto", 1, "auto"),  # Slurm or Kubernetes showed each process its own GPU
        ({"LOCAL_RANK": "3"}, "auto", 0, "auto"),
        ({"LOCAL_RANK": "3"}, "cpu", 4, "cpu"),
        ({"LOCAL_RANK": "3"}, "cuda:0", 4, "cuda:0"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, "auto", 2, "cuda:1"),
        ({"SLURM_LOCALID": "0"}, "auto", 2, "auto"),  # a batch script is alone
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, "auto", 2, "cuda:1"),
    ],
)
def test_each_process_of_a_machine_takes_its_own_gpu(
    environ: dict[str, str], device: str, gpus: int, chosen: str
) -> None:
    assert local_device(environ, device, gpus) == chosen


def test_a_malformed_local_number_is_named() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK='first'"):
        local_number({"LOCAL_RANK": "first"})


# ------------------------------------------------------------------------------------- several processes on one machine

SAY = "import os, sys; print(sys.argv[1:], os.environ['LOCAL_RANK'], os.environ.get('OMP_NUM_THREADS'))"


def test_local_workers_divide_a_share_and_its_cores(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workers = LocalWorkers([sys.executable, "-c", SAY], Share(1, 3), 2, threads=5)
    assert workers.wait() == [0, 0]
    lines = sorted(line for line in capfd.readouterr().out.splitlines() if line)
    assert lines == [
        "[1] ['--worker', '1', '--workers', '6'] 0 5",
        "[4] ['--worker', '4', '--workers', '6'] 1 5",
    ]


def test_the_users_own_number_of_threads_is_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    LocalWorkers([sys.executable, "-c", SAY], WHOLE, 1, threads=5).wait()
    assert capfd.readouterr().out.rstrip().endswith(" 7")


def test_one_failing_worker_neither_stops_the_others_nor_hides_their_status() -> None:
    """Worker 0 fails at once; the others end later, and well."""
    program = "import sys, time; i = int(sys.argv[2]); time.sleep(0.3 * i); sys.exit([2, 0, 3][i])"
    assert LocalWorkers([sys.executable, "-c", program], WHOLE, 3, None).wait() == [2, 0, 3]


def test_stopping_hands_the_signal_on_and_waits_for_the_end(tmp_path: Path) -> None:
    program = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    pathlib.Path(f"{sys.argv[2]}.stopped").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGUSR2, stop)
pathlib.Path(f"{sys.argv[2]}.ready").touch()
while True:
    time.sleep(60)
"""
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        workers = LocalWorkers([sys.executable, "-c", program], WHOLE, 2, None)
    finally:
        os.chdir(before)
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert workers.running()
        time.sleep(0.01)
    workers.stop(signal.SIGUSR2)
    assert not workers.running()
    assert len(list(tmp_path.glob("*.stopped"))) == 2
    assert workers.wait() == [140, 140]


def test_if_one_cannot_be_started_none_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = subprocess.Popen

    def start(*args: Any, **keywords: Any) -> Any:
        if len(started) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(real(*args, **keywords))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="Resource temporarily"):
        LocalWorkers([sys.executable, "-c", "import time; time.sleep(600)"], WHOLE, 2, None)
    assert started[0].poll() == -signal.SIGTERM


def test_a_terminals_control_c_does_not_reach_the_workers_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """They are in sessions of their own: what the terminal sends to our group does not reach them."""
    program = "import os; print(os.getsid(0) == os.getpid())"
    LocalWorkers([sys.executable, "-c", program], WHOLE, 1, None).wait()
    assert capfd.readouterr().out.strip() == "[0] True"


# ------------------------------------------------------------------------------------------------------ docs/cluster.md

DOCS = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.M | re.S)


@pytest.mark.parametrize("script", blocks("bash"))
def test_the_scripts_of_the_documentation_are_bash_and_their_flags_exist(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = re.search(r"extract-features (.*?[^\\])$", script, re.M | re.S)
    assert command, script
    assert set(re.findall(r"--[a-z-]+", command[1])) <= known_flags()


def test_the_kubernetes_job_is_whole_and_agrees_with_itself() -> None:
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program, *flags = container["command"]
    assert program == "extract-features"
    assert {flag.partition("=")[0] for flag in flags} <= known_flags()
    assert job["completionMode"] == "Indexed"
    assert f"--workers={job['completions']}" in flags
    assert pod["restartPolicy"] == "Never", "podFailurePolicy is refused with anything else"
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def known_flags() -> set[str]:
    return {name for parameter in main.params for name in parameter.opts}


# -------------------------------------------------------------------------------------------- the real thing, --devices

PROGRAM = Path(sys.executable).parent / "extract-features"
PATIENCE = 300  # seconds until a test gives up; nothing is measured


@pytest.mark.slow
def test_two_processes_interrupted_then_started_again_make_what_one_makes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        render(all_scenes()[i * 10], np.random.default_rng(i), 64).save(images / f"{i:02}.png")
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ["OMP_NUM_THREADS"] = "1"

    def command(name: str, *more: str) -> list[str]:
        options = "--split s --encoder resnet50 --weights random --precision float32 --shard-size 2 --batch-size 2"
        place = ["--images", str(images), "--output", str(tmp_path / name / "s.h5"), "--device", "cpu"]
        return [str(PROGRAM), *place, *options.split(), *more]

    def finish(name: str, *more: str) -> dict[str, bytes]:
        done = subprocess.run(
            command(name, *more), env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.h5*")}

    process = subprocess.Popen(
        command("two", "--devices", "2"),
        env=environ,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Tests that were themselves started in the background have inherited a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not list((tmp_path / "two").rglob("[0-9]*.h5")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "[0] worker 0 of 2" in said
    assert "[1] worker 1 of 2" in said
    assert not (tmp_path / "two" / "s.h5").exists()
    assert not list((tmp_path / "two").rglob(".*.tmp")), "both processes stopped in order, and before the command did"
    assert finish("two", "--devices", "2") == finish("one")
