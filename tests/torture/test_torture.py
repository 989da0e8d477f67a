"""A small share of `make torture`, and that it would say so if something were not survived."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.torture.__main__ import main, run_part
from tests.torture.captions import change
from tests.torture.case import damaged
from tests.torture.images import mutated
from tests.torture.worker import PARTS, find

CASES = {
    "kill-extraction": 5,
    "kill-training": 2,
    "disk": 3,
    "bits": 15,
    "images": 100,
    "captions": 40,
    "soak": 3,
    "hostile": 15,
    "mismatch": 20,
    "fuzz": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_everything_is_survived(name: str, tmp_path: Path) -> None:
    if missing := find(name).missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {missing}")
    state = run_part(name, CASES[name], 1, tmp_path)
    assert state["failures"] == []
    assert state["done"] == sum(state["outcomes"].values()) == CASES[name]


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_the_table_counts_it(tmp_path: Path) -> None:
    first = run_part("images", 20, 0, tmp_path)
    assert run_part("images", 20, 0, tmp_path) == first
    whole = CliRunner().invoke(main, ["--only", "images", "--quick", "--output", str(tmp_path)])
    assert whole.exit_code == 0, whole.output
    assert f"| {find('images').fault} | {find('images').quick} | 0 |" in whole.output
    together = run_part("images", 20, 0, tmp_path)
    assert sum(together["outcomes"].values()) == find("images").quick


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure_of_the_case_it_was_at(tmp_path: Path) -> None:
    (tmp_path / "captions").write_text("a file where the part wants a folder")
    state = run_part("captions", 2, 0, tmp_path)
    assert [failure["case"] for failure in state["failures"]] == [0, 1]
    assert "the process ended with 1" in state["failures"][0]["failure"]


def test_a_failure_is_said_and_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"done": 1, "failures": [{"case": 0, "failure": "lost"}], "outcomes": {}, "seconds": 0.0}
    monkeypatch.setattr("tests.torture.__main__.run_part", lambda *_: state)
    result = CliRunner().invoke(main, ["--only", "captions", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAILED: captions, case 0 of seed 0: lost" in result.output


def test_damage_is_one_bit_or_a_missing_end() -> None:
    rng, content = np.random.default_rng(0), bytes(range(200))
    for _ in range(50):
        flipped = damaged(content, rng, cut=False)
        assert sum((a ^ b).bit_count() for a, b in zip(content, flipped, strict=True)) == 1
        cut = damaged(content, rng, cut=True)
        assert len(cut) < len(content)
        assert content.startswith(cut)


def test_a_case_is_the_same_whenever_it_is_run() -> None:
    content = bytes(range(256)) * 4
    first, again = (mutated(content, content[::-1], np.random.default_rng([0, 3, 17])) for _ in range(2))
    assert first == again
    trees = [change({"images": [{"id": n} for n in range(5)]}, np.random.default_rng(5)) for _ in range(2)]
    assert repr(trees[0]) == repr(trees[1])
