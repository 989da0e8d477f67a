"""The installed program, killed, interrupted, and rerun."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gridcap.common.scenes import all_scenes, render
from tests.extract.store_helpers import (
    contents,
    shards_in,
    times,
)

PROGRAM = Path(sys.executable).parent / "extract-features"
TIMEOUT = 300  # seconds until a test fails; nothing is measured


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small photos, one of which is truncated."""
    folder = tmp_path_factory.mktemp("scenes")
    for i in range(24):
        render(all_scenes()[i * 10], np.random.default_rng(i), 96).save(folder / f"{i:02}.jpg")
    (folder / "13.jpg").write_bytes((folder / "13.jpg").read_bytes()[:200])
    return folder


def command(scenes: Path, output: Path) -> list[str]:
    options = ["--weights", "random", "--shard-size", "8", "--batch-size", "8", "--device", "cpu"]
    return [str(PROGRAM), "--images", str(scenes), "--split", "scenes", "--output", str(output), *options]


def run_to_end(scenes: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(scenes, output), *more], cwd=output.parent.parent, capture_output=True, text=True, timeout=TIMEOUT
    )


@contextlib.contextmanager
def running_until(shard: str, scenes: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Start an extraction and yield its process as soon as a shard exists."""
    process = subprocess.Popen(
        command(scenes, output),
        cwd=output.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests that were themselves started in the background have inherited a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (output.with_suffix("") / shard).exists():
            assert process.poll() is None, f"ended before it wrote {shard}: {process.communicate()[0]}"
            assert time.monotonic() < deadline, f"never wrote {shard}"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_that_is_killed_interrupted_and_rerun_produces_identical_files(scenes: Path, tmp_path: Path) -> None:
    """Identical to those of an uninterrupted run. One test, since each start of the program takes ten seconds."""
    reference = tmp_path / "reference" / "features" / "scenes.h5"
    interrupted = tmp_path / "interrupted" / "features" / "scenes.h5"
    for output in (reference, interrupted):
        output.parent.parent.mkdir()
    uninterrupted = run_to_end(scenes, reference)
    assert uninterrupted.returncode == 3, uninterrupted.stderr
    assert "random weights" in uninterrupted.stderr
    assert "truncated" in uninterrupted.stdout
    expected = contents(reference.parent)
    assert set(expected) == {
        "scenes.h5",
        "scenes/plan.json",
        "scenes/config.yaml",
        *(f"scenes/0000{s}.h5" for s in range(3)),
        *(name for name in expected if name.startswith("scenes/images-")),
    }

    with running_until("00000.h5", scenes, interrupted) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not interrupted.exists()
    assert "00002.h5" not in shards_in(interrupted.with_suffix(""))
    stamps = times(interrupted.parent)

    with running_until("00001.h5", scenes, interrupted) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 130, output
    assert "interrupted" in output
    assert "rerun the command" in output
    assert "Traceback" not in output
    own = [p for p in interrupted.parent.rglob(".*.tmp") if f"-{process.pid}-" in p.name]
    assert not own, "an interrupted run removes its temporary files"
    assert not interrupted.exists()

    again = run_to_end(scenes, interrupted)
    assert again.returncode == 3, again.stderr
    assert contents(interrupted.parent) == expected
    assert times(interrupted.parent)["scenes/00000.h5"] == stamps["scenes/00000.h5"], (
        "a complete shard is not written again"
    )
    stamps = times(interrupted.parent)

    third = run_to_end(scenes, interrupted, "--allow-invalid")
    assert third.returncode == 0, third.stderr
    assert "nothing to do" in third.stdout
    assert times(interrupted.parent) == stamps
