"""inspect-features, as it is typed; verify-features and import-features are tested beside what they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click.testing
import pytest

from gridcap.extract.store_cli import inspect_features


def run(*arguments: object) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(inspect_features, [str(a) for a in arguments])
    assert "defect in gridcap" not in result.output, result.output
    return result


def test_everything_at_a_glance(fake: Any, photos: Any, extracted: Any, tmp_path: Path) -> None:
    folder = photos(7, bad={2: "text"})
    job, _ = extracted(folder, extract__views="original,hflip", extract__shard_size=3)
    result = run(job.output, "--plot", tmp_path / "grids.png", "--images", folder)
    assert result.exit_code == 0, result.output
    for part in (
        "7 images, 3 shards",
        "2 x 2 x 3",
        "float16",
        "views: original, hflip",
        "inception_v3 Mixed_7c",
        "RANDOM",
        "rejects        1 of 7",
        "1  not an image",
        "6 images looked at",
        "uint8 would cost",
        "drawn: 6 images",
    ):
        assert part in result.output
    assert (tmp_path / "grids.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nothing.h5",), "no such file"),
        (("notes.txt",), "not a readable HDF5 file"),
        (("notes.txt", "--plot", "x.doc"), "--plot x.doc"),
        (("notes.txt", "--images", "."), "only with --plot"),
        (("notes.txt", "--plot", "x.png", "--images", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_what_is_no_store_or_no_sense_is_said_in_two_lines(
    tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output
    assert "what to do:" in result.output
