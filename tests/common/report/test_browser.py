"""The report in a browser: hover, tap, keyboard, search, sort, narrow screens, dark mode."""

import numpy as np
import pytest
from PIL import Image

from gridcap.common.report.images import ReportImage
from gridcap.common.report.page import write_report

CAPTIONS = ["a red dog runs", "two dogs in the snow", "a man on a red bike", "a <b>bold</b> cat"]
SCORES = [0.5, 1.5, 0.1, 0.9]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Four images; the attention of token i is in cell i of a 4 x 4 grid."""
    path = tmp_path_factory.mktemp("report") / "r.html"
    images = []
    for number, (caption, score) in enumerate(zip(CAPTIONS, SCORES, strict=True)):
        tokens = caption.split()
        attention = np.zeros((len(tokens), 16), np.float32)
        attention[range(len(tokens)), range(len(tokens))] = 1
        picture = np.asarray(Image.new("RGB", (320, 240), (40 * number, 90, 200)))
        references = [f"reference {number}", "zebra" if number == 2 else "horse"]
        images.append(
            ReportImage(
                f"{9 - number}.jpg", picture, caption, tokens, attention.reshape(-1, 4, 4), references, {"CIDEr": score}
            )
        )
    write_report(path, "A run", {"decoder": "attention"}, {"CIDEr": 0.75}, images)
    return path


@pytest.fixture
def page(browser, report):
    """page(**options) opens the report; script errors and network requests fail the test."""
    contexts, problems = [], []

    def make(width=1200, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        opened = context.new_page()
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        opened.on(
            "request", lambda sent: None if sent.url.startswith(("file:", "data:")) else problems.append(sent.url)
        )
        opened.goto(report.as_uri())
        return opened

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def captions(opened):
    """Return the displayed captions; `innerText` is empty until `content-visibility` has laid out a card."""
    return [" ".join(text.split()) for text in opened.locator(".caption").all_text_contents()]


def peak(opened, card):
    """Return the row and column of the 4 x 4 grid where the attention map peaks; None if it is hidden."""
    return (
        opened.locator("article")
        .nth(card)
        .evaluate(
            """(article) => {
          if (!article.querySelector(".photo").classList.contains("has-map")) return null;
          const canvas = article.querySelector("canvas"), context = canvas.getContext("2d");
          const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
          let best = 0;
          for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 1] > pixels[best + 1]) best = i;
          const at = best / 4;
          const [row, column] = [Math.floor(at / canvas.width), at % canvas.width];
          return [Math.floor((4 * row) / canvas.height), Math.floor((4 * column) / canvas.width)];
        }"""
        )
    )


def token(opened, card, number):
    return opened.locator("article").nth(card).locator(".token").nth(number)


def test_title_metrics_captions_and_scores_are_displayed(page):
    opened = page()
    assert opened.title() == "A run"
    assert "0.750" in opened.locator("table").inner_text()
    assert captions(opened) == CAPTIONS
    opened.locator("article").nth(1).get_by_text("CIDEr 1.50").wait_for()
    assert opened.locator("#count").inner_text() == "4 of 4 images"
    image = opened.locator("article img").first
    assert image.get_attribute("alt") == f"9.jpg: {CAPTIONS[0]}"
    assert image.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 320


def test_hovering_over_a_token_displays_its_attention_map(page):
    opened = page()
    assert peak(opened, 1) is None
    for number in (0, 3, 4):
        token(opened, 1, number).hover()
        assert peak(opened, 1) == [number // 4, number % 4]
    opened.locator("article").nth(1).get_by_text("100% peak attention weight").wait_for()
    opened.mouse.move(0, 0)
    assert peak(opened, 1) is None


def test_a_tap_pins_the_attention_map_until_the_next_tap(page):
    opened = page(width=375, height=740, has_touch=True, is_mobile=True)
    token(opened, 0, 2).tap()
    assert peak(opened, 0) == [0, 2]
    assert token(opened, 0, 2).get_attribute("aria-pressed") == "true"
    token(opened, 0, 2).tap()
    assert peak(opened, 0) is None


def test_attention_maps_are_accessible_by_keyboard(page):
    opened = page()
    opened.locator("#show").focus()
    opened.keyboard.press("Tab")  # one tab stop per caption
    assert peak(opened, 0) == [0, 0]
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert peak(opened, 0) == [0, 2]
    opened.keyboard.press("End")
    assert peak(opened, 0) == [0, 3]
    opened.keyboard.press("Escape")
    assert peak(opened, 0) is None
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("Tab")  # the references
    assert peak(opened, 0) is None
    opened.keyboard.press("Tab")
    assert peak(opened, 1) == [0, 0]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("best", [1, 3, 0, 2]), ("worst", [2, 0, 3, 1]), ("name", [3, 2, 1, 0]), ("order", [0, 1, 2, 3])],
)
def test_sort_orders(page, order, expected):
    opened = page()
    opened.select_option("#sort", "best")
    opened.select_option("#sort", order)
    assert captions(opened) == [CAPTIONS[i] for i in expected]


@pytest.mark.parametrize(
    ("query", "expected"),
    [("RED", [0, 2]), ("zebra", [2]), ("8.jpg", [1]), ("<b>", [3]), ("nothing like it", []), ("", [0, 1, 2, 3])],
)
def test_search_covers_captions_references_and_names(page, query, expected):
    opened = page()
    opened.fill("#search", "something")
    opened.fill("#search", query)
    opened.get_by_text(f"{len(expected)} of 4 images").wait_for()
    assert captions(opened) == [CAPTIONS[i] for i in expected]


def test_show_selects_the_worst_or_random_images(page):
    opened = page()
    opened.select_option("#show", "worst")
    assert captions(opened) == [CAPTIONS[i] for i in (2, 0, 3, 1)]
    opened.select_option("#show", "random")
    assert sorted(captions(opened)) == sorted(CAPTIONS)


def test_a_phone_does_not_scroll_horizontally(page):
    opened = page(width=320, height=640, is_mobile=True, has_touch=True)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 320


CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(text).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0.5) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const ratios = [];
  const all = "h1, dt, dd, th, td, label, input, select, output, .hint, .token, .name, summary, li, mark";
  for (const element of document.querySelectorAll(all)) {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    ratios.push([element.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return ratios;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_meets_wcag_aa(page, scheme):
    opened = page(color_scheme=scheme)
    opened.fill("#search", "dog")
    opened.locator("mark").first.wait_for()
    token(opened, 0, 1).click()
    ratios = opened.evaluate(CONTRAST)
    assert len(ratios) > 20
    assert [(tag, round(ratio, 2)) for tag, ratio in ratios if ratio < 4.5] == []
