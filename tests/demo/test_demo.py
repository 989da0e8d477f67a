"""The demo counts rightly, destroys nothing, and what it shows is worth showing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import pytest
import yaml
from PIL import Image

import demo.__main__ as program
from demo.__main__ import accuracies, main
from demo.shapes import split_scenes
from gridcap.common.captions.read import read_captions
from gridcap.common.config import load_config
from gridcap.common.scenes import COLORS, PLACES, SHAPES, SIZES, Scene, parse
from gridcap.common.store.reader import FeatureStore

ROOT = Path(__file__).parents[2]

SCENES = {
    1: Scene("small", "red", "ring", "top left"),
    2: Scene("large", "blue", "square", "center"),
    3: Scene("small", "green", "cross", "bottom right"),
    4: Scene("large", "white", "triangle", "top right"),
}


def test_accuracies_count_each_attribute_and_all_four_together() -> None:
    captions = {
        1: "a tiny red ring in the top left corner",  # all right, in other words
        2: "a large blue ring in the middle",  # another shape
        3: "there is a big green square in the bottom left corner of the picture",  # only the color
        4: "",  # nothing
    }
    assert accuracies(captions, SCENES) == {"size": 0.5, "color": 0.75, "shape": 0.25, "place": 0.5, "all right": 0.25}


def test_a_caption_that_names_two_colours_is_not_right_about_either() -> None:
    found = accuracies({1: "a small red blue ring in the top left corner"}, SCENES)
    assert found == {"size": 1, "color": 0, "shape": 1, "place": 1, "all right": 0}


def test_accuracies_go_by_image_id_and_not_by_order() -> None:
    captions = {i: f"a {s.size} {s.color} {s.shape} in the {s.place}" for i, s in SCENES.items()}
    assert set(accuracies(dict(reversed(captions.items())), SCENES).values()) == {1.0}


def test_chance_is_one_over_the_number_of_values() -> None:
    assert {
        "size": 1 / len(SIZES),
        "color": 1 / len(COLORS),
        "shape": 1 / len(SHAPES),
        "place": 1 / len(PLACES),
    } == program.CHANCE


@pytest.mark.parametrize("name", ["pipeline.yaml", "thesis.tex"])
def test_a_folder_that_is_no_demos_is_never_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """pipeline.yaml is in every project, this repository's own root among them."""

    def stop(*_: object, **__: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(program, "write_shapes", stop)
    precious = tmp_path / "project" / name
    precious.parent.mkdir()
    precious.write_text("years of work")
    click.testing.CliRunner().invoke(main, ["--output", str(precious.parent)])
    assert precious.read_text() == "years of work"


def test_a_demo_that_was_stopped_while_drawing_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path, *_: object) -> None:
        (folder / "train").mkdir(parents=True)
        raise SystemExit(130)

    monkeypatch.setattr(program, "write_shapes", stop)
    for _ in range(2):
        result = click.testing.CliRunner().invoke(main, ["--output", str(tmp_path / "demo")])
        assert result.exit_code == 130, result.output


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="five minutes: run make demo")
def test_the_demo_meets_its_bars(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--output", str(output)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    captions, references = {}, {}
    for name in ("decoder", "blind"):
        entries = json.loads((output / name / "evaluation" / "test.beam-3.json").read_text())["captions"]
        captions[name] = {e["image_id"]: e["caption"] for e in entries}
        references[name] = {e["image_id"]: e["references"] for e in entries}
    loaded = read_captions(output / "shapes" / "captions_test.json", "test")
    scenes = {r.image_id: Scene(**parse(r.captions[0])) for r in loaded.records}  # type: ignore[arg-type]
    assert len(scenes) == 160
    for name in ("decoder", "blind"):
        assert set(captions[name]) == set(scenes), "every test image has its caption"
        assert all(len(r) == 5 for r in references[name].values())
    assert not set(scenes.values()) & set(split_scenes(0)["train"]), "none of these was trained on"

    seen, blind = accuracies(captions["decoder"], scenes), accuracies(captions["blind"], scenes)
    assert seen["place"] >= 0.98, seen
    assert seen["color"] >= 0.90, seen
    assert seen["all right"] >= 0.60, seen
    assert blind["all right"] <= 0.05, blind
    for name, chance in program.CHANCE.items():
        assert blind[name] <= chance + 0.15, (name, blind)

    with Image.open(output / "attention.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 10

    for split, count in program.IMAGES.items():
        with FeatureStore(output / "features" / f"{split}.h5") as store:
            assert len(store) == count
            assert store.valid.all()
    config = load_config(output / "pipeline.yaml")
    assert set(config.data.splits) == set(program.IMAGES)
    assert yaml.safe_load((output / "decoder" / "config.yaml").read_text())["extract"]["weights"] == "random"
    for text in ("all right", "chance", "BLEU-4", "CIDEr", "validation perplexity", "reference:", "random weights"):
        assert text in done.stdout, text
