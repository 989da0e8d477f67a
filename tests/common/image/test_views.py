"""Views: names, pixels, and reproducibility."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gridcap.common.image.resize as resize
import gridcap.common.image.views as views_package
from gridcap.common.config import load_config
from gridcap.common.errors import ConfigError
from gridcap.common.image import load_image, load_views
from gridcap.common.image.views import expand_views, register_view, registry, select_view
from gridcap.common.image.views.random_crop import MIN_AREA, MIN_SHARE

FIVE = tuple(f"five-crop-{number}" for number in range(1, 6))


@pytest.mark.parametrize(
    ("names", "expanded"),
    [
        (["original", "hflip"], ("original", "hflip")),
        (["five-crop"], FIVE),
        (["five-crop:2", "five-crop-5"], (FIVE[0], FIVE[1], FIVE[4])),
        (["random-crop:3"], ("random-crop-1", "random-crop-2", "random-crop-3")),
        (["random-crop-17"], ("random-crop-17",)),
    ],
)
def test_numbered_views_are_expanded(names: list[str], expanded: tuple[str, ...]) -> None:
    assert expand_views(names) == expanded
    assert expand_views(expanded) == expanded


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("original,hflop", "unknown view 'hflop'; did you mean hflip?"),
        ("original,five-crops", "did you mean five-crop?"),
        ("original,x", "(views: five-crop, hflip, original, random-crop)"),
        ("original,random-crop", "view random-crop needs a number of views, such as random-crop:4"),
        ("original,random-crop:101", "at most 100 views per store"),
        ("original,five-crop-6", "view five-crop has 5 views: five-crop-1 to five-crop-5"),
        ("original,five-crop:6", "view five-crop has 5 views"),
        ("original,hflip-1", "view hflip has no number"),
        ("original,hflip:2", "view hflip has no number"),
        ("original,", "unknown view ''"),
        ("hflip", "must start with original"),
        ("original,five-crop,five-crop-2", "no view twice"),
    ],
)
def test_a_wrong_view_is_a_configuration_error(views: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"extract.views": views})
    assert message in str(caught.value)
    assert "extract.views" in str(caught.value)


def test_crops_need_pillow() -> None:
    flags = {"extract.views": "original,hflip", "extract.jpeg_decoder": "nvjpeg"}
    assert load_config(None, flags).extract.views == ("original", "hflip")
    with pytest.raises(ConfigError, match="view five-crop-1 requires jpeg_decoder: pillow"):
        load_config(None, {**flags, "extract.views": "original,five-crop"})


def test_hflip_mirrors_arrays_and_tensors() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    hflip = select_view("hflip").of_square
    assert hflip is not None
    np.testing.assert_array_equal(hflip(images), images[:, :, ::-1])
    np.testing.assert_array_equal(hflip(torch.from_numpy(images)).numpy(), images[:, :, ::-1])


def test_five_crops_are_the_corners_and_the_center() -> None:
    image = Image.fromarray(np.arange(80 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3))
    pixels = np.asarray(image)
    boxes = [(0, 0), (0, 10), (5, 0), (5, 10), (2, 5)]  # top, left; crops of 35 x 70
    for name, (top, left) in zip(FIVE, boxes, strict=True):
        crop = np.asarray(select_view(name).apply(image, "a.jpg"))
        np.testing.assert_array_equal(crop, pixels[top : top + 35, left : left + 70], name)


def test_random_crops_depend_on_the_file_name_and_the_number_only() -> None:
    """The pixels of a store must not depend on the machine, so these values never change."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))

    def box(number: int, name: str) -> tuple[int, ...]:
        crop = np.asarray(select_view(f"random-crop-{number}").apply(image, name))
        return (*map(int, crop[0, 0, :2]), crop.shape[1], crop.shape[0])

    boxes = [box(number, name) for number in (1, 2, 3) for name in ("a.jpg", "b/café.jpg")]
    assert boxes == [box(number, name) for number in (1, 2, 3) for name in ("a.jpg", "b/café.jpg")]
    assert len(set(boxes)) == 6
    assert boxes[0] == (26, 0, 169, 100)  # left, top, width, height
    for _, _, width, height in [box(number, "c.jpg") for number in range(1, 60)]:
        assert width >= 200 * MIN_SHARE - 1
        assert height >= 100 * MIN_SHARE - 1
        assert width * height >= 0.85 * MIN_AREA * 200 * 100  # clipped at the sides of the image


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2)])
def test_views_of_tiny_images(size: tuple[int, int]) -> None:
    for name in (*FIVE, "random-crop-1"):
        assert min(select_view(name).apply(Image.new("RGB", size), "a").size) >= 1


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_views_are_made_from_one_decoded_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize_mode: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).resize((1792, 1280)).save(tmp_path / "a.jpg")
    sizes, real = [], resize.load_rgb

    def load_rgb(path: Path, min_side: int | None) -> Image.Image:
        image = real(path, min_side)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(resize, "load_rgb", load_rgb)
    views = [select_view("five-crop-1"), select_view("five-crop-5")]
    squares = load_views(tmp_path / "a.jpg", 64, resize_mode, True, views, "a.jpg")
    assert sizes == [(224, 160)], "at least 2 x 64 / 0.875 pixels"
    assert squares.shape == (3, 64, 64, 3)
    original = load_image(tmp_path / "a.jpg", 64, resize_mode)
    assert abs(squares[0].astype(int) - original).mean() < 0.5
    assert abs(squares[1].astype(int) - squares[2]).mean() > 1
    full = load_views(tmp_path / "a.jpg", 64, resize_mode, False, views, "a.jpg")
    assert sizes[-1] == (1792, 1280)
    assert abs(full.astype(int) - squares).mean() < 1.5


@pytest.fixture
def registered() -> Iterator[None]:
    """Remove the views that a test registers."""
    select_view("original")  # loads the modules
    before = dict(registry._views)
    yield
    registry._views.clear()
    registry._views.update(before)
    select_view.cache_clear()


def test_the_module_in_the_documentation_adds_a_view(
    registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@register_view" in block)
    (tmp_path / "grayscale.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(views_package, "__path__", [*views_package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gridcap.common.image.views.grayscale", raising=False)
    registry._load_modules.cache_clear()
    assert load_config(None, {"extract.views": "original,grayscale"}).extract.views == ("original", "grayscale")
    view = select_view("grayscale").apply(Image.new("RGB", (2, 2), (255, 0, 0)), "a.jpg")
    assert view.getpixel((0, 0)) == (76, 76, 76)


def test_a_registered_function_is_a_view(registered: None, tmp_path: Path, quarters: Any) -> None:
    @register_view("gray")
    def gray(image: Image.Image, number: int, rng: random.Random) -> Image.Image:
        return image.convert("L")

    quarters().save(tmp_path / "a.png")
    views = [select_view(name) for name in load_config(None, {"extract.views": "original,gray"}).extract.views[1:]]
    squares = load_views(tmp_path / "a.png", 16, "stretch", True, views, "a.png")
    assert (squares[1] == squares[1][..., :1]).all()
    assert (squares[0] != squares[1]).any()
    with pytest.raises(ValueError, match="registered twice"):
        register_view("gray")(gray)
    for name in ("Gray", "gray-2", "a b", ""):
        with pytest.raises(ValueError, match="lowercase words"):
            register_view(name)(gray)
