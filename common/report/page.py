"""The HTML report: one self-contained file with images, captions, scores, and attention maps.

The file makes no network requests, and its Content-Security-Policy forbids them. Images are written one by one, so
memory holds one at a time.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gridcap.common.errors import UserError
from gridcap.common.files import replacing
from gridcap.common.report.images import ReportImage, to_json

TEMPLATE = Path(__file__).with_name("report.html")


def check_is_html(path: Path) -> None:
    """Check the extension of a report.

    Raises:
        UserError: not .html or .htm.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {path}: must end in .html", f"use --report {path.with_suffix('.html')}")


def describe_encoder(provenance: Mapping[str, Any]) -> str:
    """Return the encoder and weights of a provenance as text, with a warning for random weights."""
    weights = provenance.get("weights", {})
    warning = " (RANDOM weights: the features carry no information about photos)" if weights.get("random") else ""
    return f"{provenance['encoder']}, weights {weights.get('name', 'unknown')}{warning}"


def render_image(image: ReportImage) -> str:
    """Return the report of one image as HTML, without header and search, for embedding in another page."""
    before, after = _render_template({"title": html.escape(image.name)})
    return before.replace("<body>", '<body class="bare">') + "\n" + to_json(image) + after


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    images: Iterable[ReportImage],
    curves: Path | None = None,
) -> None:
    """Write a report atomically.

    Args:
        path: the HTML file.
        title: heading.
        facts: properties of the run, such as "decoder" -> "attention, att2in".
        metrics: scores over all images, displayed with three decimals.
        images: images in data set order.
        curves: PNG file with the training curves; omitted if it does not exist.
    """
    header = {
        "title": html.escape(title),
        "facts": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()),
        "metrics": "".join(f"<tr><th scope=row>{html.escape(k)}</th><td>{v:.3f}</td></tr>" for k, v in metrics.items()),
        "curves": _render_curves(curves),
    }
    before, after = _render_template(header)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(before)
        for number, image in enumerate(images):
            file.write(("," if number else "") + "\n" + to_json(image))
        file.write(after)


def _render_template(header: Mapping[str, str]) -> tuple[str, str]:
    """Return the template before and after the images. Placeholders that `header` does not name become empty."""
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition("{{images}}")
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: header.get(placeholder[1], ""), before), after


def _render_curves(path: Path | None) -> str:
    if path is None or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img class="curves" alt="training loss and CIDEr per epoch" src="data:image/png;base64,{data}">'
    return f"<details><summary>Training curves</summary>{image}</details>"
