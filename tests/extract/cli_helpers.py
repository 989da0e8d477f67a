"""Helpers for tests of the extract-features command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click.testing

from gridcap.common.command import PipelineCommand
from gridcap.extract.cli import main


def run(*arguments: object, command: PipelineCommand = main) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(command, [str(a) for a in arguments])
    assert "internal error" not in result.output, result.output
    return result


RANDOM = ("--weights", "random", "--precision", "float32")


SMALL = (*RANDOM, "--shard-size", 2, "--batch-size", 2)


def coco(path: Path, images: dict[int, str]) -> Path:
    """A captions file of these images."""
    annotations = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in images]
    path.write_text(
        json.dumps({"images": [{"id": i, "file_name": n} for i, n in images.items()], "annotations": annotations})
    )
    return path


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def fails(status: int, *arguments: object) -> str:
    """Run a command that must fail without a traceback; return its error output."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    if "Usage:" not in result.stderr:
        assert re.search(r"^error: .+\n  what to do: .+$", result.stderr, re.M), result.stderr
    return result.stderr
