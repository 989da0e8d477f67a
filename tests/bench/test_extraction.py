"""The rows of the extraction benchmark, without measuring anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import bench.extraction_gpu as gpu_module
import bench.stages as stages_module
from bench.extraction_gpu import measure_gpu
from bench.stages import measure_stages

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def test_gpu_rows_are_yielded_as_they_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = {
        "forward": [9000.0, 12000.0, 13000.0, 13500.0],
        "nvjpeg": 10000.0,
        "turbo": 6000.0,
        "copying": 50000.0,
        "writing": 9000.0,
        "end_to_end": (5000.0, "bound by decoding"),
    }
    called: list[str] = []

    def call(function: str, *arguments: Any) -> Any:
        name = function.removeprefix("bench.extraction_gpu:")
        assert callable(getattr(gpu_module, name))
        called.append(name)
        return results[name]

    monkeypatch.setattr(gpu_module, "call_in_process", call)
    monkeypatch.setattr(gpu_module, "_make_phone_photos", lambda work: work)
    rows = measure_gpu(tmp_path, tmp_path, "note")
    assert next(rows).name == "forward pass, batch size 64"
    assert called == ["forward"]
    by_name = {row.name: row for row in rows}
    assert len(by_name) == 3 + 4 + 4 + 1
    assert by_name["JPEG files to uint8 shards, turbo"].upper_bound == [6000.0]
    assert by_name["JPEG files to uint8 shards, nvjpeg"].upper_bound == [9000.0]
    assert by_name["JPEG files to uint8 shards, nvjpeg"].missed() == ["minimum", "fraction of upper bound"]
    assert by_name["JPEG files to uint8 shards, turbo"].missed() == []


def test_host_rows_compare_within_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results: dict[str, Any] = {
        "decoders": {"turbo": [400.0], "pillow": [300.0], "torchvision": [390.0]},
        "host_stages": {"read": 0.1, "decode": 2.0},
        "null_pipeline": {"decoding": [350.0], "pipeline": [600.0], "decoding CPU": [2.0], "pipeline CPU": [2.5]},
        "writes": {"plain": [1000.0], "shards": [850.0]},
    }
    monkeypatch.setattr(stages_module, "call_in_process", lambda function, *_: results[function.split(":")[1]])
    monkeypatch.setattr(stages_module, "available_cores", lambda: 2)
    decoding, pipeline, writing = measure_stages(tmp_path, tmp_path, True)
    assert decoding.results()["speedup"] == pytest.approx(4 / 3)
    assert pipeline.results()["fraction of upper bound"] == pytest.approx(600 / 700)
    assert "0.80 of the CPU time; ms of CPU time per image: read 0.100, decode 2.000" in pipeline.note
    assert (pipeline.missed(), writing.missed()) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "folder", "parts"),
    [
        ((), "gpu-results", ["extraction", "tests", "training", "decoding"]),
        (("extraction",), "gpu-results", ["extraction"]),
        (("here", "decoding", "tests"), "here", ["tests", "decoding"]),
    ],
)
def test_gpu_script_runs_the_selected_parts(
    tmp_path: Path, arguments: tuple[str, ...], folder: str, parts: list[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", SCRIPT, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("==")] == parts
    assert f"results: {folder}/results.json" in done.stdout
