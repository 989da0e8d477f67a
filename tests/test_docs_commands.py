"""The commands in README and docs run as they are printed, on a small COCO of rendered scenes."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from click.testing import CliRunner

import gridcap.extract.encoders.grid_encoder as encoder_module
from demo.shapes import write_shapes
from gridcap.extract.encoders.specs import ENCODERS, EncoderSpec

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/recipes.md", "docs/cluster.md", "docs/speed.md")  # in this order: the first makes the data
OURS = {
    point.name: point.value
    for point in metadata.distribution("gridcap").entry_points
    if point.group == "console_scripts"
}
ELSEWHERE = {  # how a line begins that is not run here -> why
    "make ": "this test runs inside one; the demo has a test of its own, and bench takes minutes",
    "download-coco ": "needs a network: tests/extract/test_download.py has a server",
    "python -m bench": "takes minutes to hours: tests/bench",
    "bench/gpu.sh": "needs a GPU",
}
WRAPPERS = ("torchrun ", "srun ")  # real processes stand in extract/test_cluster.py and train/test_ranks.py
SHORTER = {"train-decoder": ["--epochs", "1"]}


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.M | re.S)


def commands(block: str) -> list[str]:
    """The lines of a block, long ones joined, without comments and those of ELSEWHERE."""
    joined = re.sub(r"\\\n\s*", "", block).replace(" && ", "\n")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line and not f"{line} ".startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder as after download-coco, and one with photos of one's own; weights random in both."""
    folder = tmp_path_factory.mktemp("docs")
    shapes = write_shapes(folder / "shapes", {"train": 8, "val": 8, "test": 4})

    coco = folder / "coco"
    (coco / "data/coco/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(shapes[split].images, coco / f"data/coco/{split}2014")
        shutil.copy(shapes[split].annotations, coco / f"data/coco/annotations/captions_{split}2014.json")
    (scene, *more) = sorted(shapes["test"].images.iterdir())
    shutil.copy(scene, coco / "data/coco/val2014/COCO_val2014_000000000042.jpg")
    pipeline = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))
    pipeline["extract"]["weights"] = "random"
    pipeline["data"]["splits"]["val"]["limit"] = 4
    pipeline["data"]["splits"]["test"] |= {"limit": 4, "skip": 4}
    (coco / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))

    mine = folder / "mine"
    shutil.copytree(shapes["train"].images, mine / "photos")
    shutil.copytree(shapes["val"].images, mine / "photos", dirs_exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(shapes[split].annotations, mine / f"captions_{split}.json")
    shutil.copy(scene, mine / "photo.jpg")
    (mine / "holiday").mkdir()
    for picture in more:
        shutil.copy(picture, mine / "holiday")
    (mine / "pipeline.yaml").write_text("extract: {weights: random}\n")
    shutil.copytree(coco, folder / "begun by nobody")
    return {"coco": coco, "mine": mine, "fresh": folder / "begun by nobody"}


def run(line: str) -> str:
    """One of our commands in this process, as the shell would start it."""
    program, *arguments = shlex.split(line)
    assert program in OURS, f"neither a command of ours nor in ELSEWHERE: {line}"
    module, _, function = OURS[program].partition(":")
    command = getattr(importlib.import_module(module), function)
    done = CliRunner().invoke(command, [*arguments, *SHORTER.get(program, [])], prog_name=program)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture(autouse=True)
def _one_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights take seconds to make: once for all commands."""
    built = functools.cache(encoder_module.build_trunk)
    monkeypatch.setattr(encoder_module, "build_trunk", lambda *arguments: copy.deepcopy(built(*arguments)))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_command_runs(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, srun and --submit: what they would start, with --dry-run."""
    ran = []
    for page in PAGES:
        for block in blocks(page, "sh", "bash"):
            if block.startswith("#!"):
                continue  # a script for Slurm: parsed in extract/test_cluster.py
            monkeypatch.chdir(places["mine" if "photos/" in block else "coco"])
            for line in commands(block):
                if line.startswith(WRAPPERS) or "--submit" in line:
                    (name,) = [name for name in OURS if f" {name} " in f" {line} "]
                    with monkeypatch.context() as there:
                        if name == "extract-features":  # on a GPU: in another precision than the store made here
                            there.chdir(places["fresh"])
                        run(f"{line[line.index(name) :]} --dry-run")
                else:
                    run(line)
                ran.append(line.partition(" ")[0])
    assert len(ran) > 15
    assert set(ran) >= {"extract-features", "train-decoder", "evaluate-decoder", "caption-images", "torchrun", "srun"}
    assert (places["coco"] / "looked.png").stat().st_size > 10_000
    assert (places["coco"] / "runs/top-down-scst").is_dir(), "as the comment beside it says"
    (line,) = blocks("README.md", "python")
    monkeypatch.chdir(places["coco"])
    grid = eval(line.partition("#")[0], {"h5py": h5py})
    assert f"{grid.shape} {grid.dtype}" in line


def test_every_page_with_commands_is_among_them() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page for page in pages if blocks(page, "sh", "bash")} == set(PAGES)


def test_the_encoder_that_is_shown_is_one() -> None:
    (code,) = blocks("docs/extending.md", "python")
    shown = eval("{" + code + "}", {"EncoderSpec": EncoderSpec})
    assert shown["resnet50"] == ENCODERS["resnet50"]
