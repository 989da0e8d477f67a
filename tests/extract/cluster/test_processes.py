"""Several processes on one machine (`--devices`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gridcap.common.scenes import all_scenes, render
from gridcap.extract.cluster.processes import LocalProcesses
from gridcap.extract.cluster.share import WHOLE, Share

PRINT_ARGUMENTS = (
    "import os, sys; print(sys.argv[1:], os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE'], "
    "os.environ.get('OMP_NUM_THREADS'))"
)


def test_processes_divide_the_share_and_the_cores(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processes = LocalProcesses([sys.executable, "-c", PRINT_ARGUMENTS], Share(1, 3), 2, threads=5)
    assert processes.wait() == [0, 0]
    lines = sorted(line for line in capfd.readouterr().out.splitlines() if line)
    assert lines == [
        "[1] ['--rank', '1', '--world-size', '6'] 0 2 5",
        "[4] ['--rank', '4', '--world-size', '6'] 1 2 5",
    ]


def test_omp_num_threads_from_the_environment_is_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    LocalProcesses([sys.executable, "-c", PRINT_ARGUMENTS], WHOLE, 1, threads=5).wait()
    assert capfd.readouterr().out.rstrip().endswith(" 7")


def test_a_failed_process_does_not_stop_the_others() -> None:
    """Rank 0 fails immediately; the others finish later and keep their statuses."""
    program = "import sys, time; i = int(sys.argv[2]); time.sleep(0.3 * i); sys.exit([2, 0, 3][i])"
    assert LocalProcesses([sys.executable, "-c", program], WHOLE, 3, None).wait() == [2, 0, 3]


def test_stop_forwards_the_signal_and_waits(tmp_path: Path) -> None:
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
        processes = LocalProcesses([sys.executable, "-c", program], WHOLE, 2, None)
    finally:
        os.chdir(before)
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert processes.running()
        time.sleep(0.01)
    processes.stop(signal.SIGUSR2)
    assert not processes.running()
    assert len(list(tmp_path.glob("*.stopped"))) == 2
    assert processes.wait() == [140, 140]


def test_a_failed_start_stops_the_started_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = subprocess.Popen

    def start(*args: Any, **keywords: Any) -> Any:
        if len(started) == 1:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(real(*args, **keywords))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="Resource temporarily"):
        LocalProcesses([sys.executable, "-c", "import time; time.sleep(600)"], WHOLE, 2, None)
    assert started[0].poll() == -signal.SIGTERM


def test_each_process_runs_in_its_own_session(capfd: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C in the terminal signals our process group only, so the processes receive it once, through `stop`."""
    program = "import os; print(os.getsid(0) == os.getpid())"
    LocalProcesses([sys.executable, "-c", program], WHOLE, 1, None).wait()
    assert capfd.readouterr().out.strip() == "[0] True"


PROGRAM = Path(sys.executable).parent / "extract-features"
TIMEOUT = 300  # seconds until the test fails; no timing is measured


@pytest.mark.slow
def test_an_interrupted_devices_run_resumes_to_the_store_of_a_single_process(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        render(all_scenes()[i * 10], np.random.default_rng(i), 64).save(images / f"{i:02}.png")
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ["OMP_NUM_THREADS"] = "1"

    def command(name: str, *more: str) -> list[str]:
        options = "--split s --encoder resnet50 --weights random --precision float32 --shard-size 2 --batch-size 2"
        arguments = ["--images", str(images), "--output", str(tmp_path / name / "s.h5"), "--device", "cpu"]
        return [str(PROGRAM), *arguments, *options.split(), *more]

    def finish(name: str, *more: str) -> dict[str, bytes]:
        done = subprocess.run(
            command(name, *more), env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
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
        # Tests started in the background inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not list((tmp_path / "two").rglob("[0-9]*.h5")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "[0] rank 0 of 2" in output
    assert "[1] rank 1 of 2" in output
    assert not (tmp_path / "two" / "s.h5").exists()
    assert not list((tmp_path / "two").rglob(".*.tmp")), "both processes must stop cleanly before the command exits"
    assert finish("two", "--devices", "2") == finish("one")
