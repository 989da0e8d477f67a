"""Attention maps are drawn at the right place, for any number of tokens, in every format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gridcap.caption.attention_maps import AttentionPanels, plot_attention, upsample


def one_hot_attention(*cells: tuple[int, int], rows: int = 8, columns: int = 8) -> np.ndarray:
    """Return attention weights with all mass on one cell per token."""
    attention = np.zeros((len(cells), rows, columns), np.float32)
    for step, (row, column) in enumerate(cells):
        attention[step, row, column] = 1
    return attention


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def panels(tokens: int, cell: tuple[int, int] = (2, 5), image: np.ndarray | None = None) -> AttentionPanels:
    """Return an image with `tokens` tokens that all attend to one cell."""
    names = [f"token{i}" for i in range(tokens)]
    return AttentionPanels(photo() if image is None else image, names, one_hot_attention(*[cell] * tokens), "title")


def draw(path: Path, *items: AttentionPanels) -> np.ndarray:
    """Write a figure and return its pixels."""
    plot_attention(items, path)
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []
    with Image.open(path) as figure:
        return np.asarray(figure.convert("RGB")).astype(int)


@pytest.mark.parametrize("tokens", [1, 25])
def test_any_number_of_tokens_is_drawn(tmp_path: Path, tokens: int) -> None:
    figure = draw(tmp_path / "a.png", panels(tokens))
    assert min(figure.shape[:2]) > 100
    assert figure.std() > 5, "not an empty page"


def test_more_tokens_need_more_rows_of_panels(tmp_path: Path) -> None:
    heights = [draw(tmp_path / "a.png", panels(tokens)).shape[0] for tokens in (1, 7, 8, 16)]
    assert heights[0] == heights[1] < heights[2] < heights[3], "eight panels per row, the image included"


def test_empty_caption_shows_only_the_image(tmp_path: Path) -> None:
    assert draw(tmp_path / "a.png", panels(0)).std() > 5


def test_blocks_of_several_images_are_stacked(tmp_path: Path) -> None:
    one = draw(tmp_path / "a.png", panels(3))
    several = draw(tmp_path / "b.png", panels(3), panels(12), panels(1))
    assert several.shape[0] > 2.5 * one.shape[0]


def test_bright_region_is_at_the_attended_cell(tmp_path: Path) -> None:
    """Figures that differ only in the attended cell differ in exactly one panel, at these two cells."""
    black = np.zeros((80, 80, 3), np.uint8)
    first = draw(tmp_path / "a.png", panels(1, (0, 7), black))
    second = draw(tmp_path / "b.png", panels(1, (7, 0), black))
    difference = (first - second).sum(-1)
    rows, columns = difference.nonzero()
    panel = difference[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert 0.8 < panel.shape[0] / panel.shape[1] < 1.25, "a square panel for a square image"
    height, width = panel.shape
    assert panel[: height // 4, -width // 4 :].mean() > 50
    assert panel[-height // 4 :, : width // 4].mean() < -50
    assert abs(panel[: height // 4, : width // 4]).mean() < 20


def test_every_token_has_its_own_panel(tmp_path: Path) -> None:
    black = np.zeros((80, 80, 3), np.uint8)
    cells = [(1, 1), (6, 6), (1, 6)]
    before = draw(tmp_path / "a.png", AttentionPanels(black, ["a", "b", "c"], one_hot_attention(*cells)))
    cells[1] = (6, 1)
    after = draw(tmp_path / "b.png", AttentionPanels(black, ["a", "b", "c"], one_hot_attention(*cells)))
    columns = abs(before - after).sum((0, 2)).nonzero()[0]
    width = before.shape[1]
    assert width * 0.4 < columns.min()
    assert columns.max() < width * 0.8, "only the third of four panels changed"


def test_tall_figures_have_a_lower_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than 65,535 rows cannot be written."""
    monkeypatch.setattr("gridcap.caption.attention_maps.MAX_HEIGHT", 300)
    assert 250 <= draw(tmp_path / "a.png", panels(30)).shape[0] <= 300


@pytest.mark.parametrize(
    ("name", "magic"),
    [("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG"), ("a.jpg", b"\xff\xd8"), ("a.jpeg", b"\xff\xd8")],
)
def test_suffix_selects_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    plot_attention([panels(3)], tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(magic)


@pytest.mark.parametrize("title", ["$_$.jpg: a ring", "50% of $5 ^ $6 {x}", r"a\b.jpg", "", "two\nlines"])
def test_titles_are_not_parsed_as_formulas(tmp_path: Path, title: str) -> None:
    plot_attention([dataclasses.replace(panels(1), title=title)], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_long_titles_are_wrapped_and_the_figure_grows(tmp_path: Path) -> None:
    short, long = tmp_path / "short.png", tmp_path / "long.png"
    plot_attention([panels(2)], short)
    plot_attention([dataclasses.replace(panels(2), title="a caption that repeats " * 9)], long)
    assert Image.open(long).width == Image.open(short).width
    assert Image.open(long).height > Image.open(short).height


def test_output_is_deterministic(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", panels(4))
    draw(tmp_path / "b.png", panels(4))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        plot_attention([panels(1)], tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_item_21_characters_without_a_font_give_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridcap.caption.attention_maps._fonts", lambda: ["DejaVu Sans"])
    with pytest.warns(UserWarning, match="Noto Sans CJK") as caught:
        plot_attention([dataclasses.replace(panels(2), tokens=["一只", "狗"], title="一只狗")], tmp_path / "a.png")
    assert len(caught) == 1


# ----------------------------------------------------------------------------------------------------------- upsample


def test_upsampled_attention_has_the_image_size_and_its_peak_at_the_cell() -> None:
    (weights,) = one_hot_attention((1, 6))
    upsampled = upsample(weights, 160, 320)
    assert upsampled.shape == (160, 320)
    row, column = np.unravel_index(upsampled.argmax(), upsampled.shape)
    assert (row * 8 // 160, column * 8 // 320) == (1, 6)
    assert 0.9 <= upsampled.max() <= 1
    assert upsampled.min() >= 0
    assert upsampled[80:].max() < 0.1


def test_uniform_attention_stays_uniform() -> None:
    np.testing.assert_allclose(upsample(np.full((8, 8), 1 / 64, np.float32), 40, 40), 1, atol=1e-5)


def test_zero_attention_stays_zero() -> None:
    assert (upsample(np.zeros((8, 8), np.float32), 40, 40) == 0).all()
