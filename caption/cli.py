"""The `caption-images` command (`gridcap caption`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gridcap.caption.options import show_dry_run, warn_if_random, weights_option
from gridcap.common.captions.images import list_images
from gridcap.common.captions.records import is_utf8
from gridcap.common.command import Uses, flag, pipeline_command, reject_ignored, reject_ignored_by_sampling
from gridcap.common.config import CaptionConfig, PipelineConfig
from gridcap.common.errors import EXIT_INVALID, InvalidImageError, PathError, UserError
from gridcap.common.files import check_writable, write_json
from gridcap.common.resources import PHOTO_BYTES, fit_in_memory
from gridcap.common.sources.registry import ImageFile, ImageSource, find_source, open_source
from gridcap.common.text import escape_line, plural

if TYPE_CHECKING:
    from gridcap.caption.captioner import Captioner
    from gridcap.caption.result import Caption

EXAMPLES = """
caption-images --checkpoint runs/mine photo.jpg
caption-images --checkpoint runs/mine holiday/ --output captions.json         (or holiday.zip, shards/*.tar, s3://...)
caption-images --checkpoint runs/mine photo.jpg --attention attention.png --beam-size 5
caption-images --checkpoint runs/mine holiday/ --report report.html           (interactive attention maps)
caption-images --checkpoint runs/a --checkpoint runs/b photo.jpg              (ensemble)
caption-images --checkpoint runs/mine photo.jpg --decoding sample --top-p 0.9 --seed 1
"""
USES = Uses(("caption", "data.follow_links", "extract.device", "extract.num_workers", "seed"), "caption.max_length=20")
FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
MAX_FIGURE_IMAGES = 40
DEFAULT_WORKERS = 4


@dataclass(frozen=True)
class CaptionRequest:
    """The options of one `caption-images` call that are not configuration keys."""

    images: tuple[Path, ...]
    checkpoints: tuple[Path, ...]
    output: Path | None
    attention: Path | None
    report: Path | None
    weights: Path | None


@pipeline_command("caption-images", EXAMPLES, uses=USES)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="folder of a run or of a checkpoint; repeat the option to decode with an ensemble",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write the captions to")
@click.option(
    "--attention",
    type=click.Path(path_type=Path),
    help="figure to write the attention maps to (.png, .pdf, .svg, or .jpg)",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="HTML file to write a report to: images, captions, and attention maps",
)
@weights_option
@flag("--decoding", "caption.decoding")
@flag("--beam-size", "caption.beam_size")
@flag("--max-length", "caption.max_length")
@flag("--length-penalty", "caption.length_penalty")
@flag("--block-trigrams", "caption.block_trigrams")
@flag("--mbr", "caption.mbr")
@flag("--temperature", "caption.temperature")
@flag("--top-k", "caption.top_k")
@flag("--top-p", "caption.top_p")
@flag("--seed", "seed")
@flag("--batch-size", "caption.batch_size")
@flag("--num-workers", "extract.num_workers")
@flag("--device", "extract.device")
def main(config: PipelineConfig, dry_run: bool, **options: Any) -> None:
    """Caption image files, or all images in folders and archives.

    Prints one line per image: path, tab, caption. Invalid images are reported and skipped. Exit status: 0 all images
    captioned, 1 failure, 2 usage error, 3 some images invalid.
    """
    request = CaptionRequest(**options)
    reject_ignored_by_sampling(config.caption.decoding)
    if config.caption.decoding == "beam":
        reject_ignored(["seed"], "with beam search", "omit it, or pass --decoding sample")
    images = _find_images(request.images, config.data.follow_links)
    _check_outputs(request, len(images))
    if dry_run:
        show_dry_run(config, request.checkpoints, f"caption {plural(len(images), 'image')} with {{}}")
        return
    captioner = _load_captioner(config, request)
    captions: dict[_Image, Caption] = {}
    shows_attention = request.attention is not None or request.report is not None
    for image, caption in _caption_all(captioner, images, config):
        captions[image] = caption if shows_attention else replace(caption, attention=None)  # maps take much memory
        click.echo(f"{escape_line(str(image))}\t{caption.text}")
    _write_outputs(captioner, captions, request, config)
    if len(captions) < len(images):
        sys.exit(EXIT_INVALID)


@dataclass(frozen=True)
class _Image:
    """An image to caption.

    Attributes:
        path: for the output; unique.
        source: the folder or archive that contains it; None for a file on the command line.
        name: its name in the source.
    """

    path: Path
    source: ImageSource | None = None
    name: str = ""

    def __str__(self) -> str:
        return str(self.path)

    def locate(self) -> ImageFile:
        """Return the file; raises InvalidImageError if its name is not allowed."""
        return self.path if self.source is None else self.source.locate(self.name)


def _find_images(arguments: tuple[Path, ...], follow_links: bool) -> list[_Image]:
    """Return the given files and the images in the given folders and archives; report other files in these."""
    images: dict[Path, _Image] = {}
    for argument in arguments:
        if not is_utf8(str(argument)):
            raise UserError(f"{escape_line(str(argument))}: the name is not UTF-8", "rename the file or folder")
        if find_source(argument) is not None:
            source, listed = open_source(argument, follow_links), list_images(argument, follow_links=follow_links)
            for record in listed.records:
                image = _Image(argument / record.file_name, source, record.file_name)
                images.setdefault(image.path, image)
            for line in listed.problems.lines():
                click.echo(f"note: {escape_line(str(argument))}: {line}", err=True)
        elif argument.is_file():
            images.setdefault(argument, _Image(argument))
        else:
            raise PathError(f"{escape_line(str(argument))}: no such file or folder", "check the path")
    return [*images.values()]


def _check_outputs(request: CaptionRequest, count: int) -> None:
    """Raise UserError if a requested output is not possible."""
    from gridcap.common.report.page import check_is_html

    attention = request.attention
    if attention is not None and attention.suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(
            f"--attention {attention}: unsupported figure format (use {', '.join(FIGURE_SUFFIXES)})",
            f"pass --attention {attention.with_suffix('.png')}",
        )
    if attention is not None and count > MAX_FIGURE_IMAGES:
        raise UserError(
            f"--attention: {count} images do not fit into one figure (maximum {MAX_FIGURE_IMAGES})",
            "pass fewer images, or use --report, which has no limit",
        )
    if request.report is not None:
        check_is_html(request.report)


def _load_captioner(config: PipelineConfig, request: CaptionRequest) -> Captioner:
    from gridcap.caption.captioner import Captioner

    check_writable(request.output, request.attention, request.report)
    captioner = Captioner.load(*request.checkpoints, device=config.extract.device, weights=request.weights)
    if request.attention is not None and not captioner.has_attention:
        raise UserError(
            f"--attention: the decoder of {captioner.checkpoint.path} has no attention",
            "train a decoder with attention: --recipe soft-attention, top-down, transformer, ...",
        )
    warn_if_random([captioner])
    if captioner.trained_on_nvjpeg:
        click.echo(
            "note: the training images were decoded by nvJPEG, these images are decoded by Pillow; pixel values may "
            "differ slightly",
            err=True,
        )
    return captioner


def _caption_all(
    captioner: Captioner, images: Sequence[_Image], config: PipelineConfig
) -> Iterator[tuple[_Image, Caption]]:
    """Caption the images in batches; report and skip invalid ones."""
    import torch

    def preprocess(image: _Image) -> np.ndarray | InvalidImageError:
        try:
            return captioner.preprocess(image.locate())
        except InvalidImageError as error:
            return error

    generator, settings = torch.Generator().manual_seed(config.seed), config.caption
    workers = config.extract.num_workers or fit_in_memory(DEFAULT_WORKERS, PHOTO_BYTES)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), settings.batch_size):
            batch = images[start : start + settings.batch_size]
            pixels: dict[_Image, np.ndarray] = {}
            for image, result in zip(batch, pool.map(preprocess, batch), strict=True):
                if isinstance(result, InvalidImageError):
                    _report_invalid(image.path, result)
                else:
                    pixels[image] = result
            if not pixels:
                continue
            captions = captioner.caption_pixels(np.stack([*pixels.values()]), settings, generator)
            for image, caption in zip(pixels, captions, strict=True):
                if isinstance(caption, InvalidImageError):
                    _report_invalid(image.path, caption)
                else:
                    yield image, caption


def _report_invalid(path: Path, error: InvalidImageError) -> None:
    click.echo(f"{escape_line(str(path))}: invalid image, skipped: {error.reason}", err=True)


def _write_outputs(
    captioner: Captioner, captions: dict[_Image, Caption], request: CaptionRequest, config: PipelineConfig
) -> None:
    if request.output is not None:
        entries = [
            {"file_name": str(image), "caption": caption.text, "log_prob": caption.log_prob}
            for image, caption in captions.items()
        ]
        write_json(request.output, {"settings": _settings(request, config), "captions": entries})
        click.echo(f"captions: {request.output}", err=True)
    if not captions and (request.attention or request.report):
        click.echo("note: there is no valid image to show, so no attention maps and no report are written", err=True)
    if request.attention is not None and captions:
        _write_attention(captioner, captions, request.attention)
        click.echo(f"attention maps: {request.attention}", err=True)
    if request.report is not None and captions:
        _write_report(captioner, captions, config.caption, request.report)
        click.echo(f"report: {request.report}", err=True)


def _settings(request: CaptionRequest, config: PipelineConfig) -> dict[str, Any]:
    """Return the settings that determine the captions, as plain values."""
    return {
        "checkpoints": [str(path) for path in request.checkpoints],
        "weights": None if request.weights is None else str(request.weights),
        "decoding": config.caption.model_dump(mode="json"),
        "device": config.extract.device,
        "seed": config.seed,
    }


def _write_attention(captioner: Captioner, captions: dict[_Image, Caption], path: Path) -> None:
    from gridcap.caption.attention_maps import AttentionPanels, plot_attention

    items = []
    for image, caption in captions.items():
        assert caption.attention is not None, "the command checks that the decoder has attention"
        title = f"{image.path.name}: {caption.text}"
        items.append(AttentionPanels(captioner.display_image(image.locate()), caption.tokens, caption.attention, title))
    plot_attention(items, path)


def _write_report(captioner: Captioner, captions: dict[_Image, Caption], settings: CaptionConfig, path: Path) -> None:
    from gridcap.common.report.images import MAX_SIDE, ReportImage
    from gridcap.common.report.page import describe_encoder, write_report

    facts = {
        "checkpoint": str(captioner.checkpoint.path),
        "encoder": describe_encoder(captioner.provenance),
        "decoding": f"beam search, beam size {settings.beam_size}" if settings.decoding == "beam" else "sampling",
    }
    images = (
        ReportImage(
            str(image),
            captioner.display_image(image.locate(), MAX_SIDE),
            caption.text,
            caption.tokens,
            caption.attention,
        )
        for image, caption in captions.items()
    )
    write_report(path, plural(len(captions), "caption"), facts, {}, images)
