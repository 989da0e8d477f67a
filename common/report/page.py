"""The report: one HTML file with images, their captions, scores, and where the decoder looked at each word.

The file asks for nothing from outside (and its Content-Security-Policy forbids it): thumbnails, attention and
script are inside. Images are written one by one, so that memory holds one at a time.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from gridcap.common.errors import UserError
from gridcap.common.files import replacing

LONGEST = 320  # pixels of a thumbnail's longer side
_QUALITY = 70
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class ReportImage:
    """An image of the report.

    Attributes:
        name: shown under it.
        picture: uint8 (H, W, 3), showing just what the grid covers; or why there is none.
        caption: the generated one.
        words: of it, as the decoder wrote them.
        attention: (words, rows, columns), each summing to 1; None for a decoder without attention.
        references: captions by people.
        scores: metric -> score of this caption; the first is shown and sorted by.
    """

    name: str
    picture: np.ndarray | str
    caption: str
    words: Sequence[str]
    attention: np.ndarray | None = None
    references: Sequence[str] = ()
    scores: Mapping[str, float] | None = None


def check_is_html(path: Path) -> None:
    """Raises UserError if a report would go into a file of another kind."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {path}: must end in .html", f"use --report {path}.html")


def describe_encoder(provenance: Mapping[str, Any]) -> str:
    """Which encoder the features come from, in words; random weights loudly."""
    weights = provenance.get("weights", {})
    loud = " (RANDOM weights: they know nothing of photos)" if weights.get("random") else ""
    return f"{provenance['encoder']}, weights {weights.get('name', 'unknown')}{loud}"


def render_image(image: ReportImage) -> str:
    """The report of one image without heading and search, as HTML: to be shown inside another page."""
    before, after = _page({"title": html.escape(image.name)})
    line = io.StringIO()
    _write_image(line, 0, image)
    return before.replace("<body>", '<body class="bare">') + line.getvalue() + after


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    images: Iterable[ReportImage],
    curves: Path | None = None,
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file.
        title: its heading.
        facts: of the run, shown as they are: "decoder" -> "attention, att2in", ...
        metrics: of all images together, shown with three decimals.
        images: in the order of the data set.
        curves: a PNG file of the training curves, shown if it is there.
    """
    head = {
        "title": html.escape(title),
        "facts": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()),
        "metrics": "".join(f"<tr><th scope=row>{html.escape(k)}</th><td>{v:.3f}</td></tr>" for k, v in metrics.items()),
        "curves": _curves(curves),
    }
    before, after = _page(head)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before)
        for number, image in enumerate(images):
            _write_image(file, number, image)
        file.write(after)


def _page(head: Mapping[str, str]) -> tuple[str, str]:
    """The template before and after the images; places that `head` does not name stay empty."""
    before, _, after = _TEMPLATE.read_text(encoding="utf-8").partition("{{images}}")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: head.get(place[1], ""), before), after


def _curves(path: Path | None) -> str:
    if path is None or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    picture = f'<img class="curves" alt="loss and CIDEr over the epochs" src="data:image/png;base64,{data}">'
    return f"<details><summary>training curves</summary>{picture}</details>"


def _write_image(file: IO[str], number: int, image: ReportImage) -> None:
    """A line of JSON, in a form in which no text can end the script it stands in."""
    scores = image.scores or {}
    entry = {
        "name": image.name,
        "caption": image.caption,
        "words": [*image.words],
        "references": [*image.references],
        "scores": {name: round(float(value), 4) for name, value in scores.items()},
        "size": [LONGEST, LONGEST] if isinstance(image.picture, str) else [*image.picture.shape[1::-1]],
        "missing": image.picture if isinstance(image.picture, str) else "",
        "jpeg": "" if isinstance(image.picture, str) else _jpeg(image.picture),
        **_looks(image.attention),
    }
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    file.write(("," if number else "") + "\n" + text)


def _jpeg(picture: np.ndarray) -> str:
    thumbnail = Image.fromarray(picture)
    thumbnail.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "jpeg", quality=_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _looks(attention: np.ndarray | None) -> dict[str, object]:
    """Attention in 8 bits a cell, relative to each word's strongest cell, whose share stands beside."""
    if attention is None or not attention.size:
        return {"grid": None}
    top = attention.reshape(len(attention), -1).max(1)
    levels = (attention / np.maximum(top, 1e-12)[:, None, None] * 255).round().astype(np.uint8)
    return {
        "grid": [*attention.shape[1:]],
        "tops": [round(float(value), 4) for value in top],
        "looks": base64.b64encode(levels.tobytes()).decode(),
    }
