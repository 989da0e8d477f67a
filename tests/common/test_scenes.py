"""Rendered scenes are a pure function of the seed, and their captions describe them."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from gridcap.common.scenes import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    SYNONYMS,
    TEMPLATES,
    Scene,
    all_scenes,
    calibration_batch,
    describe,
    parse,
    render,
)

SCENES = all_scenes()


def draw(scene: Scene, seed: int = 0, side: int = 48) -> np.ndarray:
    return np.asarray(render(scene, np.random.default_rng(seed), side))


def test_there_are_240_distinct_scenes() -> None:
    assert len(set(SCENES)) == len(SCENES) == 2 * 6 * 4 * 5


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_depend_only_on_the_seed(shape: str) -> None:
    scene = Scene("large", "red", shape, "top left")
    image = draw(scene, 1)
    assert (image.shape, image.dtype) == ((48, 48, 3), np.uint8)
    np.testing.assert_array_equal(draw(scene, 1), image)
    assert not np.array_equal(draw(scene, 2), image)


def test_pixels_are_identical_on_every_machine() -> None:
    """Random encoders calibrate on these pixels, so their features depend on them."""
    digest = hashlib.sha256(calibration_batch(8, 32).tobytes()).hexdigest()
    assert digest == "5dac23710a2fe41eba1be85a2c81c41c4b7e97419578fbb9191808affec93b07"


@pytest.mark.parametrize("attribute", ["size", "color", "shape", "place"])
def test_scenes_that_differ_in_one_attribute_look_different(attribute: str) -> None:
    """With the same noise, only the attribute differs."""
    scene = Scene("small", "red", "square", "center")
    values = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}[attribute]
    images = [draw(dataclasses.replace(scene, **{attribute: value})) for value in values]
    for i, one in enumerate(images):
        for two in images[:i]:
            assert (np.abs(one.astype(int) - two).max(2) > 50).mean() > 0.005


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("color", COLORS)
def test_the_object_has_the_right_color_and_position(color: str, place: str) -> None:
    image = draw(Scene("large", color, "square", place))
    x, y = (round(part * 48) for part in PLACES[place])
    assert np.abs(image[y, x].astype(int) - COLORS[color]).max() <= 8


def test_every_caption_of_every_scene_parses_to_that_scene() -> None:
    for number, scene in enumerate(SCENES):
        captions = describe(scene, np.random.default_rng(number))
        assert len(set(captions)) == len(TEMPLATES) == 5
        for caption in captions:
            assert parse(caption) == dataclasses.asdict(scene), caption


def test_captions_depend_on_the_seed_and_use_every_synonym() -> None:
    scene = Scene("small", "red", "ring", "center")
    assert describe(scene, np.random.default_rng(1)) == describe(scene, np.random.default_rng(1))
    words = {
        w for seed in range(20) for caption in describe(scene, np.random.default_rng(seed)) for w in caption.split()
    }
    assert set(SYNONYMS["small"]) | set(SYNONYMS["center"]) <= words


def test_no_word_belongs_to_two_attribute_values() -> None:
    names = [*SIZES, *COLORS, *SHAPES, *PLACES]
    words = [word for name in names for word in SYNONYMS.get(name, (name,))]
    assert len(words) == len(set(words))


RIGHT = {"size": "small", "color": "red", "shape": "ring", "place": "top left"}


@pytest.mark.parametrize(
    ("caption", "unclear"),
    [
        ("a small red ring in the top left corner", ()),
        ("A tiny RED ring, top left", ()),
        ("a red ring in the top left corner", ("size",)),
        ("a small ring in the top left corner", ("color",)),
        ("a small red thing in the top left corner", ("shape",)),
        ("a small red ring", ("place",)),
        ("a small red ring in the top corner", ("place",)),
        ("", ("size", "color", "shape", "place")),
        ("a small big red ring in the top left corner", ("size",)),
        ("a small red and blue ring in the top left corner", ("color",)),
        ("a small red ring and a square in the top left corner", ("shape",)),
        ("a small red ring in the top left corner in the middle", ("place",)),
        ("a small little red red ring in the top left corner", ()),
        ("a smallish reddish ringed bottom", ("size", "color", "shape", "place")),
    ],
)
def test_parse_returns_none_for_missing_or_contradictory_attributes(caption: str, unclear: tuple[str, ...]) -> None:
    assert parse(caption) == {name: None if name in unclear else value for name, value in RIGHT.items()}


@pytest.mark.parametrize("count", [1, 7, 16, 240])
def test_the_calibration_batch_is_fixed_and_diverse(count: int) -> None:
    batch = calibration_batch(count, 16)
    assert (batch.shape, batch.dtype) == ((count, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(calibration_batch(count, 16), batch)
    assert len({image.tobytes() for image in batch}) == count
