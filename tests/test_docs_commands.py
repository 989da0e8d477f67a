"""The commands in the README and the docs run as printed, on a small COCO-like dataset of rendered scenes."""

from __future__ import annotations

import copy
import functools
import importlib
import json
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

import gridcap.extract.encoders.torchvision as encoder_module
from demo.shapes import write_shapes

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/recipes.md",
    "docs/cluster.md",
    "docs/speed.md",
    "docs/captions.md",
)  # in this order: the first page creates the data
OURS = {
    point.name: point.value
    for point in metadata.distribution("gridcap").entry_points
    if point.group == "console_scripts"
}
NOT_RUN = {  # prefix of a command that is not run here -> reason
    "make ": "this test runs inside make; the demo has its own test, and bench takes minutes",
    "gridcap download ": "needs a network; tests/extract/download/ uses a local server",
    "python -m bench": "takes minutes to hours; see tests/bench",
    "bench/gpu.sh": "needs a GPU",
}
WRAPPERS = ("torchrun ", "srun ")  # tests/extract/cluster and tests/train/engine/test_distributed.py run real processes
SHORTER = {"train-decoder": ["--epochs", "1"]}


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.M | re.S)


def commands(block: str) -> list[str]:
    """Return the commands of a code block: continued lines joined, comments and the commands of NOT_RUN removed."""
    joined = re.sub(r"\\\n\s*", "", block).replace(" && ", "\n")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line and not f"{line} ".startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder as `gridcap download` leaves it, and one with a user's own photos; both use random weights."""
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
    with open(mine / "captions.csv", "w") as file:
        file.write("image,caption\n")
        for split in ("train", "val"):
            tree = json.loads(shapes[split].annotations.read_text())
            names = {image["id"]: image["file_name"] for image in tree["images"]}
            file.writelines(f"{names[a['image_id']]},{a['caption']}\n" for a in tree["annotations"])
    shutil.copy(scene, mine / "photo.jpg")
    (mine / "holiday").mkdir()
    for picture in more:
        shutil.copy(picture, mine / "holiday")
    (mine / "pipeline.yaml").write_text("extract: {weights: random}\n")
    shutil.copytree(coco, folder / "fresh")
    return {"coco": coco, "mine": mine, "fresh": folder / "fresh"}


def run(line: str) -> str:
    """Run one of our commands in this process."""
    program, *arguments = shlex.split(line)
    assert program in OURS, f"not a Gridcap command and not in NOT_RUN: {line}"
    module, _, function = OURS[program].partition(":")
    command = getattr(importlib.import_module(module), function)
    done = CliRunner().invoke(command, [*arguments, *SHORTER.get(program, [])], prog_name=program)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture(autouse=True)
def _one_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialize random weights once: it takes seconds."""
    built = functools.cache(encoder_module.build_trunk)
    monkeypatch.setattr(encoder_module, "build_trunk", lambda *arguments: copy.deepcopy(built(*arguments)))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_command_runs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands under torchrun, srun, and --submit are run with --dry-run."""
    ran = []
    for page in PAGES:
        for block in blocks(page, "sh", "bash"):
            if block.startswith("#!"):
                continue  # a Slurm script, parsed in tests/extract/cluster
            monkeypatch.chdir(folders["mine" if "photos/" in block else "coco"])
            for line in commands(block):
                if line.startswith(WRAPPERS) or "--submit" in line:
                    (name,) = [name for name in OURS if f" {name} " in f" {line} "]
                    with monkeypatch.context() as patch:
                        if name == "extract-features":  # a GPU would use another precision than this store
                            patch.chdir(folders["fresh"])
                        run(f"{line[line.index(name) :]} --dry-run")
                else:
                    run(line)
                ran.append(line.partition(" ")[0])
    assert len(ran) > 15
    assert set(ran) >= {"extract-features", "train-decoder", "evaluate-decoder", "caption-images", "torchrun", "srun"}
    assert (folders["coco"] / "attention.png").stat().st_size > 10_000
    assert (folders["coco"] / "runs/top-down-scst").is_dir(), "as the comment in the docs says"
    (line,) = blocks("README.md", "python")
    monkeypatch.chdir(folders["coco"])
    grid = eval(line.partition("#")[0], {"h5py": h5py})
    assert f"{grid.shape} {grid.dtype}" in line


def test_every_page_with_commands_is_tested() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page for page in pages if blocks(page, "sh", "bash")} == set(PAGES)
