"""Paths that do not exist are one kind of error in all commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from gridcap.cli import main

EXTRACT = ("extract", "--images", "photos", "--output", "x.h5")
EVALUATE = ("evaluate", "--checkpoint", "runs/x", "--features", "x.h5", "--report", "r.html")


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "--images", "nowhere"),
        ("extract", "--split", "train", "--config", "nowhere.yaml"),
        (*EXTRACT, "--annotations", "nowhere.json", "--weights", "random"),
        (*EXTRACT, "--weights", "nowhere.pth"),
        ("import", "nowhere", "--output", "x.h5"),
        ("import", "photos", "--annotations", "nowhere.json", "--output", "x.h5"),
        ("inspect", "nowhere.h5"),
        ("inspect", "x.h5", "--plot", "x.png", "--images", "nowhere"),
        ("verify", "nowhere.h5"),
        ("verify", "x.h5", "--annotations", "nowhere.json"),
        ("train", "--features", "nowhere.h5", "--annotations", "x.json"),
        ("train", "--init-from", "runs/nowhere", "--features", "x.h5"),
        ("train", "--resume", "--output", "runs/nowhere"),
        ("evaluate", "--checkpoint", "runs/nowhere", "--features", "x.h5"),
        (*EVALUATE, "--images", "nowhere"),
        ("caption", "--checkpoint", "runs/nowhere", "photos"),
        ("caption", "--checkpoint", "runs/x", "nowhere.jpg"),
        ("serve", "--checkpoint", "runs/nowhere", "--dry-run"),
    ],
    ids=" ".join,
)
def test_item_13_a_path_that_does_not_exist_exits_with_1_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (8, 8)).save("photos/a.png")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "nowhere" in result.stderr.partition("what to do")[0]
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
