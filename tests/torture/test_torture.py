"""A subset of `make torture`, and its reporting of failures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tests.torture.__main__ as program
from tests.torture.__main__ import main, run_part
from tests.torture.captions import mutate_tree
from tests.torture.case import corrupt
from tests.torture.images import mutate_bytes
from tests.torture.worker import PARTS, load_part

CASES = {
    "kill-extraction": 5,
    "kill-training": 2,
    "full-disk": 3,
    "corruption": 15,
    "images": 100,
    "captions": 40,
    "soak": 3,
    "malicious": 15,
    "mismatch": 20,
    "fuzz": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_all_faults_are_handled(name: str, tmp_path: Path) -> None:
    if missing := load_part(name).missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"requires {missing}")
    state = run_part(name, CASES[name], 1, tmp_path)
    assert state["failures"] == []
    assert state["done"] == sum(state["outcomes"].values()) == CASES[name]


@pytest.mark.slow
def test_finished_cases_are_not_repeated(tmp_path: Path) -> None:
    first = run_part("images", 20, 0, tmp_path)
    assert run_part("images", 20, 0, tmp_path) == first
    result = CliRunner().invoke(main, ["--only", "images", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"| {load_part('images').fault} | {load_part('images').quick} | 0 |" in result.output
    total = run_part("images", 20, 0, tmp_path)
    assert sum(total["outcomes"].values()) == load_part("images").quick


@pytest.mark.slow
def test_finished_cases_are_kept_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some parts take many minutes."""
    read_line, lines = program._read_line, iter(range(3))

    def interrupted(stream: Any, seconds: float) -> bytes | None:
        if next(lines, None) is None:
            raise KeyboardInterrupt
        return read_line(stream, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(program, "_read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_part("captions", 6, 0, tmp_path)
    state = json.loads((tmp_path / "captions-0.json").read_text())
    assert state["done"] == sum(state["outcomes"].values()) == 3
    resumed = run_part("captions", 6, 0, tmp_path)
    (tmp_path / "uninterrupted").mkdir()
    assert resumed["outcomes"] == run_part("captions", 6, 0, tmp_path / "uninterrupted")["outcomes"]


@pytest.mark.slow
def test_crash_is_a_failure_of_the_current_case(tmp_path: Path) -> None:
    (tmp_path / "captions").write_text("a file where a folder is expected")
    state = run_part("captions", 2, 0, tmp_path)
    assert [failure["case"] for failure in state["failures"]] == [0, 1]
    assert "the process exited with status 1" in state["failures"][0]["failure"]


def test_failure_is_reported_and_sets_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"done": 1, "failures": [{"case": 0, "failure": "lost"}], "outcomes": {}, "seconds": 0.0}
    monkeypatch.setattr("tests.torture.__main__.run_part", lambda *_: state)
    result = CliRunner().invoke(main, ["--only", "captions", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAILED: captions, case 0 of seed 0: lost" in result.output


def test_corrupt_flips_one_bit_or_truncates() -> None:
    rng, content = np.random.default_rng(0), bytes(range(200))
    for _ in range(50):
        flipped = corrupt(content, rng, truncate=False)
        assert sum((a ^ b).bit_count() for a, b in zip(content, flipped, strict=True)) == 1
        truncated = corrupt(content, rng, truncate=True)
        assert len(truncated) < len(content)
        assert content.startswith(truncated)


def test_cases_are_deterministic() -> None:
    content = bytes(range(256)) * 4
    first, again = (mutate_bytes(content, content[::-1], np.random.default_rng([0, 3, 17])) for _ in range(2))
    assert first == again
    trees = [mutate_tree({"images": [{"id": n} for n in range(5)]}, np.random.default_rng(5)) for _ in range(2)]
    assert repr(trees[0]) == repr(trees[1])
