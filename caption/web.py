"""The page: a photo in, captions out, and where the decoders looked. Made with Gradio.

Gradio asks its makers' servers for versions, fonts and analytics unless it is told not to; here it is, before it is
imported.
"""

from __future__ import annotations

import html
import math
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})

import gradio as gr
from PIL import Image

from gridcap.caption.captioner import Caption, Captioner
from gridcap.common.config import CaptionConfig
from gridcap.common.image import FORMATS, InvalidImageError
from gridcap.common.report.page import ReportImage, describe_encoder, render_image

MOST_BYTES = 20 << 20
MOST_PIXELS = 50_000_000
_WAITING = 20  # people in the queue; the next is asked to come again
_FONTS = ["system-ui", "sans-serif"]
_HEIGHT = 540  # pixels of the frame with image and caption


def make_page(captioners: Sequence[Captioner], names: Sequence[str], defaults: CaptionConfig) -> Any:
    """The page, not yet served.

    Args:
        captioners: one a column.
        names: of them, shown above.
        defaults: of the search.

    Returns:
        gradio.Blocks.
    """
    turn = threading.Lock()  # the encoders share the processor

    def answer(path: str | None, search: str, beams: int, length: int, temperature: float, seed: int) -> list[str]:
        if not path:
            return [""] * len(captioners)
        try:
            _check(Path(path))
            changes: dict[str, Any] = {"decoding": search, "beam_size": int(beams), "max_length": int(length)}
            changes["temperature"] = temperature if search == "sample" else 1.0
            settings = defaults.model_copy(update=changes)
            with turn:
                found = [captioner.alternatives(Path(path), settings, int(seed)) for captioner in captioners]
        except (InvalidImageError, _RefusedError) as error:
            raise gr.Error(f"This file cannot be captioned: {error}.", print_exception=False) from None
        return [_shown(captions) for captions in found]

    with gr.Blocks(title="Gridcap", analytics_enabled=False) as page:
        gr.Markdown("# Gridcap\nDrop a photo, choose one, or paste one.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], elem_id="photo", buttons=[])
                photo.preprocess = _path  # type: ignore[method-assign]  # the file as it came: opening and judging it is ours
                with gr.Accordion("Settings", open=False):
                    search = gr.Radio(
                        [("likeliest (beam search)", "beam"), ("drawn by chance", "sample")],
                        value=defaults.decoding,
                        label="Captions",
                        elem_id="search",
                    )
                    beams = gr.Slider(1, 10, max(3, defaults.beam_size), step=1, label="How many (beam size)")
                    length = gr.Slider(1, 40, defaults.max_length, step=1, label="Longest caption, in words")
                    temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature (by chance: lower is bolder)")
                    seed = gr.Number(0, label="Seed (by chance)", precision=0)
            columns = []
            for captioner, name in zip(captioners, names, strict=True):
                with gr.Column(scale=2, min_width=320):
                    gr.Markdown(_about(captioner, name))
                    columns.append(gr.HTML(label=name))
        inputs = [photo, search, beams, length, temperature, seed]
        for changed in (photo.change, search.change, beams.release, length.release, temperature.release, seed.submit):
            changed(answer, inputs, columns, show_progress="minimal", api_visibility="private")
    return page


def serve(page: Any, host: str, port: int) -> str:
    """Serve the page, in threads; gives its address.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=1, max_size=_WAITING, api_open=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MOST_BYTES,
            theme=theme,
            show_error=True,
            quiet=True,
            footer_links=[],
            inbrowser=False,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            mcp_server=False,
        )
    return str(url)


def _path(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


class _RefusedError(Exception):
    """A file that is not tried; the message says why."""


def _check(path: Path) -> None:
    if path.stat().st_size > MOST_BYTES:
        raise _RefusedError(f"it is larger than {MOST_BYTES >> 20} MB")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # whatever is wrong with it, `load_rgb` says it better
        return
    if width * height > MOST_PIXELS:
        raise _RefusedError(f"it has {width} x {height} pixels, and {MOST_PIXELS // 1_000_000} million are the most")


def _about(captioner: Captioner, name: str) -> str:
    settings = captioner.checkpoint.config.train.decoder
    return f"**{name}**: {settings.family}; {describe_encoder(captioner.provenance)}"


def _shown(captions: Sequence[Caption]) -> str:
    """The best caption with its looks, and the others with their probabilities."""
    best = captions[0]
    assert best.image is not None
    frame = render_image(ReportImage("", best.image, best.text, best.tokens, best.attention))
    lines = [(html.escape(one.text) or "(no word)", _percent(one.log_prob)) for one in captions]
    rows = "".join(f"<tr><td>{text}</td><td style='text-align:right'>{share}</td></tr>" for text, share in lines)
    return (
        f'<iframe title="image, caption and looks" sandbox="allow-scripts" srcdoc="{html.escape(frame, quote=True)}" '
        f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        f"<table class='alternatives' style='width:100%'><thead><tr><th style='text-align:left'>caption</th>"
        f"<th style='text-align:right'>probability</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _percent(log_prob: float) -> str:
    """exp(log_prob), readable however small."""
    value = 100 * math.exp(log_prob)
    return f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"
