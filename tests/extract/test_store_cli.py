"""`gridcap inspect`. `gridcap verify` and `gridcap import` are tested with the modules that they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click.testing
import pytest

from gridcap.extract.store_cli import inspect_features


def run(*arguments: object) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(inspect_features, [str(a) for a in arguments])
    assert "internal error" not in result.output, result.output
    return result


def test_inspect_shows_source_statistics_and_plot(fake: Any, photos: Any, extracted: Any, tmp_path: Path) -> None:
    folder = photos(7, invalid={2: "text"})
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
        "invalid        1 of 7 images",
        "1  not an image",
        "sample of 6 images",
        "uint8 would have",
        "plotted 6 images",
    ):
        assert part in result.output
    assert (tmp_path / "grids.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "named", "status"),
    [
        (("nothing.h5",), "no such file", 1),
        (("notes.txt",), "unsupported captions format", 1),
        (("notes.txt", "--invalid"), "for feature stores", 2),
        (("notes.h5", "--split", "val"), "only for captions files", 2),
        (("notes.h5", "--image-column", "x"), "no effect on a feature store", 2),
        (("notes.h5",), "not a readable HDF5 file", 1),
        (("notes.h5", "--plot", "x.doc"), "--plot x.doc", 2),
        (("notes.h5", "--images", "."), "only used with --plot", 2),
        (("notes.h5", "--plot", "x.png", "--images", "nowhere"), "nowhere: no such folder", 1),
        (("notes.h5", "--plot", "x.png", "--images", __file__), "not a folder", 1),
        (("notes.h5", "--plot", "x.png", "--invalid"), "--invalid", 2),
    ],
)
def test_errors_have_a_message_and_a_hint(tmp_path: Path, arguments: tuple[str, ...], named: str, status: int) -> None:
    for name in ("notes.txt", "notes.h5"):
        (tmp_path / name).write_text("hello")
    result = run(*arguments)
    assert result.exit_code == status
    assert named in result.output
    assert "what to do:" in result.output


def test_item_26_names_with_tabs_and_line_breaks_stay_on_one_line(photos: Any, extracted: Any) -> None:
    folder = photos(3, invalid={1: "text"})
    (folder / "0001.png").rename(folder / "0001\ttab\nline.png")
    job, _ = extracted(folder, data__max_invalid="50%")
    result = run(job.output, "--invalid")
    assert result.output.splitlines() == [r"0001\ttab\nline.png" + "\tnot an image"]


def test_inspect_describes_a_captions_file(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("photo,caption,split\na.jpg,a cat,train\nb.jpg,a dog,val\n")
    result = run(tmp_path / "c.csv", "--split", "val", "--image-column", "photo")
    assert result.exit_code == 0, result.output
    assert "image = photo, caption = caption, split = split" in result.output
    assert "val: 1 image, 1 caption" in result.output
