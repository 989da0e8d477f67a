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
PATIENCE = 300  # seconds until a test gives up; nothing is measured


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 small photos, one of which is none."""
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
        [*command(scenes, output), *more], cwd=output.parent.parent, capture_output=True, text=True, timeout=PATIENCE
    )


@contextlib.contextmanager
def running_until(shard: str, scenes: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Start an extraction and hand it over as soon as that shard is there."""
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
        deadline = time.monotonic() + PATIENCE
        while not (output.with_suffix("") / shard).exists():
            assert process.poll() is None, f"ended before it made {shard}: {process.communicate()[0]}"
            assert time.monotonic() < deadline, f"never made {shard}"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_then_interrupted_then_started_again_a_run_gives_the_very_same_files(
    scenes: Path, tmp_path: Path
) -> None:
    """As a run that nobody disturbed. All in one test, since every start of the program costs ten seconds."""
    calm = tmp_path / "calm" / "features" / "scenes.h5"
    rough = tmp_path / "rough" / "features" / "scenes.h5"
    for output in (calm, rough):
        output.parent.parent.mkdir()
    undisturbed = run_to_end(scenes, calm)
    assert undisturbed.returncode == 3, undisturbed.stderr
    assert "random weights" in undisturbed.stderr
    assert "truncated" in undisturbed.stdout
    expected = contents(calm.parent)
    assert set(expected) == {
        "scenes.h5",
        "scenes/plan.json",
        "scenes/config.yaml",
        *(f"scenes/0000{s}.h5" for s in range(3)),
        *(name for name in expected if name.startswith("scenes/images-")),
    }

    with running_until("00000.h5", scenes, rough) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not rough.exists()
    assert "00002.h5" not in shards_in(rough.with_suffix(""))
    stamps = times(rough.parent)

    with running_until("00001.h5", scenes, rough) as process:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130, said
    assert "interrupted" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    mine = [p for p in rough.parent.rglob(".*.tmp") if f"-{process.pid}-" in p.name]
    assert not mine, "what was killed before may have left something, the interrupted run may not"
    assert not rough.exists()

    again = run_to_end(scenes, rough)
    assert again.returncode == 3, again.stderr
    assert contents(rough.parent) == expected
    assert times(rough.parent)["scenes/00000.h5"] == stamps["scenes/00000.h5"], "a sound shard is made once"
    stamps = times(rough.parent)

    third = run_to_end(scenes, rough, "--allow-invalid")
    assert third.returncode == 0, third.stderr
    assert "nothing to do" in third.stdout
    assert times(rough.parent) == stamps
