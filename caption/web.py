"""The web page: upload a photo, get its captions and attention maps. Built with Gradio."""

from __future__ import annotations

import html
import math
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Gradio contacts external servers (version check, fonts, analytics) unless disabled before it is imported.
os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})

import gradio as gr

from gridcap.caption.captioner import Captioner
from gridcap.caption.result import Caption
from gridcap.common.config import CaptionConfig
from gridcap.common.errors import InvalidImageError
from gridcap.common.image import open_image
from gridcap.common.report.images import ReportImage
from gridcap.common.report.page import describe_encoder, render_image

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
MAX_QUEUE = 20  # waiting requests; further ones are rejected
FRAME_HEIGHT = 540  # pixels
# Ranges of the sliders, extended if the initial values are larger.
MAX_BEAM_SIZE = 10
MAX_LENGTH = 40
FONTS = ["system-ui", "sans-serif"]


@dataclass(frozen=True)
class _Controls:
    """The inputs of the page."""

    photo: Any
    decoding: Any
    beam_size: Any
    max_length: Any
    temperature: Any
    seed: Any

    @property
    def inputs(self) -> list[Any]:
        """Components in the order of the arguments of the event handler."""
        return [self.photo, self.decoding, self.beam_size, self.max_length, self.temperature, self.seed]

    @property
    def events(self) -> list[Any]:
        """Events that generate new captions."""
        return [
            self.photo.change,
            self.decoding.change,
            self.beam_size.release,
            self.max_length.release,
            self.temperature.release,
            self.seed.submit,
        ]


class _UploadError(Exception):
    """An uploaded file exceeds a limit; the message states which."""


def make_page(captioners: Sequence[Captioner], names: Sequence[str], defaults: CaptionConfig, seed: int = 0) -> Any:
    """Build the page without serving it.

    Args:
        captioners: one per column.
        names: column headings.
        defaults: initial decoding options.
        seed: initial seed of sampling.

    Returns:
        gradio.Blocks.
    """
    lock = threading.Lock()  # one request at a time: the models share the device

    def respond(
        path: str | None, decoding: str, beam_size: int, max_length: int, temperature: float, seed: int
    ) -> list[str]:
        if not path:
            return [""] * len(captioners)
        settings = defaults.model_copy(
            update={
                "decoding": decoding,
                "beam_size": int(beam_size),
                "max_length": int(max_length),
                "temperature": temperature if decoding == "sample" else 1.0,
            }
        )
        try:
            _check_limits(Path(path))
            with lock:
                results = [captioner.alternatives(Path(path), settings, int(seed)) for captioner in captioners]
        except InvalidImageError as error:  # without the temporary name of the upload
            raise gr.Error(f"This file cannot be captioned: {error.reason}.", print_exception=False) from None
        except _UploadError as error:
            raise gr.Error(f"This file cannot be captioned: {error}.", print_exception=False) from None
        return [_render_captions(captions) for captions in results]

    with gr.Blocks(title="Gridcap", analytics_enabled=False) as page:
        gr.Markdown("# Gridcap\nUpload, drop, or paste a photo.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _make_controls(defaults, seed)
            columns = []
            for captioner, name in zip(captioners, names, strict=True):
                with gr.Column(scale=2, min_width=320):
                    gr.Markdown(_describe_captioner(captioner, name))
                    columns.append(gr.HTML(label=name))
        for event in controls.events:
            event(respond, controls.inputs, columns, show_progress="minimal", api_visibility="private")
    return page


def serve(page: Any, host: str, port: int) -> str:
    """Serve the page in background threads and return its URL.

    Raises:
        OSError: the address cannot be used.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=1, max_size=MAX_QUEUE, api_open=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=MAX_BYTES,
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


def _make_controls(defaults: CaptionConfig, seed: int) -> _Controls:
    photo = gr.Image(label="Photo", sources=["upload", "clipboard"], elem_id="photo", buttons=[])
    # Keep the uploaded file as it is: Gradio would decode it and report invalid images in its own way.
    photo.preprocess = _uploaded_path  # type: ignore[method-assign]
    with gr.Accordion("Settings", open=False):
        return _Controls(
            photo=photo,
            decoding=gr.Radio(
                [("Beam search", "beam"), ("Sampling", "sample")],
                value=defaults.decoding,
                label="Decoding",
                elem_id="decoding",
            ),
            beam_size=gr.Slider(
                1,
                max(MAX_BEAM_SIZE, defaults.beam_size),
                defaults.beam_size,
                step=1,
                label="Beam size, or number of samples",
            ),
            max_length=gr.Slider(
                1,
                max(MAX_LENGTH, defaults.max_length),
                defaults.max_length,
                step=1,
                label="Maximum length in tokens",
            ),
            temperature=gr.Slider(
                min(0.1, defaults.temperature),
                max(2.0, defaults.temperature),
                defaults.temperature,
                step=0.1,
                label="Sampling temperature",
                info="<1 sharpens the distribution, >1 flattens it",
            ),
            seed=gr.Number(seed, label="Sampling seed", precision=0),
        )


def _uploaded_path(payload: Any) -> str | None:
    return None if payload is None else str(payload.path)


def _check_limits(path: Path) -> None:
    """Raise _UploadError if the file has too many bytes or pixels."""
    if path.stat().st_size > MAX_BYTES:
        raise _UploadError(f"it is larger than {MAX_BYTES >> 20} MB")
    try:
        with path.open("rb") as file, open_image(file) as image:
            width, height = image.size
    except Exception:  # `load_image` reports invalid images with the reason
        return
    if width * height > MAX_PIXELS:
        raise _UploadError(f"it has {width} x {height} pixels; the maximum is {MAX_PIXELS // 1_000_000} million pixels")


def _describe_captioner(captioner: Captioner, name: str) -> str:
    decoder = captioner.checkpoint.config.train.decoder
    return f"**{name}**: {decoder.family}; {describe_encoder(captioner.provenance)}"


def _render_captions(captions: Sequence[Caption]) -> str:
    """Return HTML with the best caption, its attention maps, and the probabilities of all captions."""
    best = captions[0]
    assert best.image is not None
    frame = render_image(ReportImage("", best.image, best.text, best.tokens, best.attention))
    cells = [
        (html.escape(caption.text) or "(empty caption)", _format_percent(caption.log_prob)) for caption in captions
    ]
    rows = "".join(f"<tr><td>{text}</td><td style='text-align:right'>{percent}</td></tr>" for text, percent in cells)
    return (
        f'<iframe title="image, caption, and attention maps" sandbox="allow-scripts" '
        f'srcdoc="{html.escape(frame, quote=True)}" style="width:100%;height:{FRAME_HEIGHT}px;border:0"></iframe>'
        f"<table class='alternatives' style='width:100%'><thead><tr><th style='text-align:left'>caption</th>"
        f"<th style='text-align:right'>probability</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _format_percent(log_prob: float) -> str:
    """Format exp(log_prob) as a percentage with at least one significant digit."""
    value = 100 * math.exp(log_prob)
    return f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"
