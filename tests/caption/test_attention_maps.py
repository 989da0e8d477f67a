"""Attention pictures show the right place, for any number of words, in every format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gridcap.caption.attention_maps import enlarge, plot_attention
from gridcap.caption.captioner import Caption


def looking_at(*cells: tuple[int, int], rows: int = 8, columns: int = 8) -> np.ndarray:
    """Attention wholly on one cell for each word."""
    attention = np.zeros((len(cells), rows, columns), np.float32)
    for word, (row, column) in enumerate(cells):
        attention[word, row, column] = 1
    return attention


def caption(words: int, cell: tuple[int, int] = (2, 5)) -> Caption:
    named = [f"word{i}" for i in range(words)]
    return Caption(" ".join(named), named, -1.0, looking_at(*[cell] * words))


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def draw(path: Path, *captions: Caption, image: np.ndarray | None = None) -> np.ndarray:
    """Draw one block a caption; the picture's pixels."""
    images = [photo() if image is None else image] * len(captions)
    plot_attention(images, captions, [f"title {i}" for i in range(len(captions))], path)
    assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("words", [1, 25])
def test_any_number_of_words_is_drawn(tmp_path: Path, words: int) -> None:
    picture = draw(tmp_path / "a.png", caption(words))
    assert min(picture.shape[:2]) > 100
    assert picture.std() > 5, "not an empty page"


def test_more_words_take_more_rows_of_panels(tmp_path: Path) -> None:
    heights = [draw(tmp_path / "a.png", caption(words)).shape[0] for words in (1, 7, 8, 16)]
    assert heights[0] == heights[1] < heights[2] < heights[3], "eight panels in a row, the photo among them"


def test_a_caption_without_words_is_the_photo_alone(tmp_path: Path) -> None:
    assert draw(tmp_path / "a.png", caption(0)).std() > 5


def test_several_photos_with_captions_of_different_lengths_stand_below_each_other(tmp_path: Path) -> None:
    one = draw(tmp_path / "a.png", caption(3))
    several = draw(tmp_path / "b.png", caption(3), caption(12), caption(1))
    assert several.shape[0] > 2.5 * one.shape[0]


def test_the_bright_place_is_where_the_decoder_looked(tmp_path: Path) -> None:
    """Pictures that differ only in the cell differ in just one panel, and there at the two cells."""
    black = np.zeros((80, 80, 3), np.uint8)
    first = draw(tmp_path / "a.png", caption(1, (0, 7)), image=black)
    second = draw(tmp_path / "b.png", caption(1, (7, 0)), image=black)
    brighter = (first - second).sum(-1)
    rows, columns = brighter.nonzero()
    panel = brighter[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert 0.8 < panel.shape[0] / panel.shape[1] < 1.25, "a square panel for a square photo"
    height, width = panel.shape
    assert panel[: height // 4, -width // 4 :].mean() > 50
    assert panel[-height // 4 :, : width // 4].mean() < -50
    assert abs(panel[: height // 4, : width // 4]).mean() < 20


def test_every_word_has_its_own_panel(tmp_path: Path) -> None:
    black = np.zeros((80, 80, 3), np.uint8)
    cells = [(1, 1), (6, 6), (1, 6)]
    before = draw(tmp_path / "a.png", Caption("a b c", ["a", "b", "c"], -1, looking_at(*cells)), image=black)
    cells[1] = (6, 1)
    after = draw(tmp_path / "b.png", Caption("a b c", ["a", "b", "c"], -1, looking_at(*cells)), image=black)
    columns = abs(before - after).sum((0, 2)).nonzero()[0]
    width = before.shape[1]
    assert width * 0.4 < columns.min()
    assert columns.max() < width * 0.8, "only the third of four panels changed"


@pytest.mark.parametrize(("name", "magic"), [("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG")])
def test_the_suffix_chooses_the_format(tmp_path: Path, name: str, magic: bytes) -> None:
    plot_attention([photo()], [caption(3)], ["title"], tmp_path / "new" / name)
    assert (tmp_path / "new" / name).read_bytes().startswith(magic)


@pytest.mark.parametrize("title", ["$_$.jpg: a ring", "50% of $5 ^ $6 {x}", r"a\b.jpg", "", "two\nlines"])
def test_any_title_is_drawn_as_it_is(tmp_path: Path, title: str) -> None:
    """File names and captions are no formulas."""
    plot_attention([photo()], [caption(1)], [title], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_the_same_input_gives_the_same_picture(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", caption(4))
    draw(tmp_path / "b.png", caption(4))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_caption_without_attention_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without attention"):
        plot_attention([photo()], [Caption("a", ["a"], -1.0, None)], ["t"], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- enlarge


def test_enlarged_attention_has_the_photos_size_and_its_peak_at_the_cell() -> None:
    (weights,) = looking_at((1, 6))
    large = enlarge(weights, 160, 320)
    assert large.shape == (160, 320)
    row, column = np.unravel_index(large.argmax(), large.shape)
    assert (row * 8 // 160, column * 8 // 320) == (1, 6)
    assert 0.9 <= large.max() <= 1
    assert large.min() >= 0
    assert large[80:].max() < 0.1


def test_even_attention_is_even() -> None:
    large = enlarge(np.full((8, 8), 1 / 64, np.float32), 40, 40)
    np.testing.assert_allclose(large, 1, atol=1e-5)


def test_attention_of_zero_everywhere_stays_zero() -> None:
    assert (enlarge(np.zeros((8, 8), np.float32), 40, 40) == 0).all()
