"""The shapes dataset: splits are disjoint, and every caption describes its image correctly."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.shapes import ShapesSplit, split_scenes, write_shapes
from gridcap.common.captions.read import read_captions
from gridcap.common.scenes import COLORS, PLACES, SHAPES, SIZES, all_scenes, parse

COUNTS = {"train": 12, "val": 5, "test": 7}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShapesSplit]:
    return write_shapes(tmp_path_factory.mktemp("shapes"), COUNTS)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_combination_is_in_exactly_one_split(seed: int) -> None:
    splits = split_scenes(seed)
    assert set(splits) == {"train", "val", "test"}
    for one, other in itertools.combinations(splits.values(), 2):
        assert not set(one) & set(other)
    assigned = [scene for scenes in splits.values() for scene in scenes]
    assert sorted(assigned) == sorted(all_scenes())
    assert len(assigned) == 240


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_every_split_covers_all_attribute_values(name: str) -> None:
    """With the seed of the demo; a missing value could not be learned or tested."""
    scenes = split_scenes(0)[name]
    for attribute, values in {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}.items():
        assert {getattr(scene, attribute) for scene in scenes} == set(values), attribute


def test_splits_are_a_function_of_the_seed() -> None:
    assert split_scenes(3) == split_scenes(3)
    assert split_scenes(3) != split_scenes(4)


def test_written_scenes_belong_to_their_split(written: dict[str, ShapesSplit]) -> None:
    splits = split_scenes(0)
    for name, split in written.items():
        assert len(split.scenes) == COUNTS[name]
        assert set(split.scenes.values()) <= set(splits[name])
        assert len(set(split.scenes.values())) == COUNTS[name], "a combination repeats only after all others were used"


def test_captions_files_are_valid_coco_files(written: dict[str, ShapesSplit]) -> None:
    for name, split in written.items():
        loaded = read_captions(split.annotations, name)
        assert loaded.problems.counts == {}
        assert [r.image_id for r in loaded.records] == list(split.scenes)
        assert sorted(r.file_name for r in loaded.records) == sorted(p.name for p in split.images.iterdir())


def test_image_ids_are_unique_across_splits(written: dict[str, ShapesSplit]) -> None:
    ids = [image_id for split in written.values() for image_id in split.scenes]
    assert len(set(ids)) == sum(COUNTS.values())


def test_every_image_has_five_distinct_correct_captions(written: dict[str, ShapesSplit]) -> None:
    for name, split in written.items():
        for record in read_captions(split.annotations, name).records:
            assert len(record.captions) == len(set(record.captions)) == 5
            for caption in record.captions:
                assert parse(caption) == asdict(split.scenes[record.image_id]), caption


def test_image_format_and_size_match_the_captions_file(written: dict[str, ShapesSplit]) -> None:
    for split in written.values():
        for entry in json.loads(split.annotations.read_text())["images"]:
            with Image.open(split.images / entry["file_name"]) as image:
                assert image.format == "JPEG"
                assert image.size == (entry["width"], entry["height"])


def test_object_has_the_stated_color_and_place(written: dict[str, ShapesSplit]) -> None:
    for split in written.values():
        for record in read_captions(split.annotations).records:
            scene = split.scenes[record.image_id]
            pixels = np.asarray(Image.open(split.images / record.file_name)).astype(int)
            object_mask = abs(pixels - COLORS[scene.color]).sum(-1) < 60
            rows, columns = object_mask.nonzero()
            x, y = columns.mean() / pixels.shape[1], rows.mean() / pixels.shape[0]
            nearest = min(PLACES, key=lambda place: abs(PLACES[place][0] - x) + abs(PLACES[place][1] - y))
            assert nearest == scene.place, (scene, x, y)


def test_repeated_combinations_are_rendered_differently(tmp_path: Path) -> None:
    split = write_shapes(tmp_path, {"train": 0, "val": 41, "test": 0})["val"]
    same = [i for i, scene in split.scenes.items() if scene == split.scenes[200_000]]
    assert len(same) > 1
    assert len({(split.images / f"scene_{i}.jpg").read_bytes() for i in same}) == len(same)


def test_files_are_a_function_of_the_seed(tmp_path: Path) -> None:
    def contents(folder: str, seed: int) -> dict[str, bytes]:
        write_shapes(tmp_path / folder, {"train": 3, "val": 2, "test": 2}, seed)
        root = tmp_path / folder
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    first = contents("one", 7)
    assert len(first) == 7 + 3
    assert contents("two", 7) == first
    other = contents("three", 8)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_size_of_one_split_does_not_affect_the_others(tmp_path: Path) -> None:
    few = write_shapes(tmp_path / "few", {"train": 2, "val": 2, "test": 2})
    many = write_shapes(tmp_path / "many", {"train": 4, "val": 2, "test": 2})
    for a, b in ((few["test"], many["test"]), (few["val"], many["val"])):
        assert a.annotations.read_bytes() == b.annotations.read_bytes()
        for path in a.images.iterdir():
            assert path.read_bytes() == (b.images / path.name).read_bytes()
