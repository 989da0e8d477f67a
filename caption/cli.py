"""caption-images: captions for photos that the model never saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from gridcap.caption.options import warn_if_random, weights_option
from gridcap.common.captions.folder import list_images
from gridcap.common.command import flag, pipeline_command, show_config
from gridcap.common.config import CaptionConfig, PipelineConfig
from gridcap.common.errors import EXIT_INVALID, UserError
from gridcap.common.files import check_writable, write_json

if TYPE_CHECKING:
    from gridcap.caption.captioner import Caption, Captioner

EXAMPLES = """
caption-images --checkpoint runs/mine photo.jpg
caption-images --checkpoint runs/mine holiday/ --output captions.json
caption-images --checkpoint runs/mine photo.jpg --attention looked.png --beam-size 5
caption-images --checkpoint runs/mine holiday/ --report report.html        (a page: hover a word to see the look)
caption-images --checkpoint runs/a --checkpoint runs/b photo.jpg --block-trigrams
caption-images --checkpoint runs/mine photo.jpg --decoding sample --top-p 0.9 --seed 1
"""
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
_MOST_PANELS = 40  # images in one attention picture


@pipeline_command("caption-images", EXAMPLES)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder of a run or of a checkpoint. Several decode together: give it again.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the captions to this JSON file too.")
@click.option(
    "--attention",
    type=click.Path(path_type=Path),
    help="Draw where the decoder looked, word by word: .png, .pdf or .svg.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write a page with the images, their captions, and where the decoder looked: .html, in one file.",
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
@flag("--device", "extract.device")
def main(
    config: PipelineConfig,
    dry_run: bool,
    images: tuple[Path, ...],
    checkpoints: tuple[Path, ...],
    output: Path | None,
    attention: Path | None,
    report: Path | None,
    weights: Path | None,
) -> None:
    """Caption photos: files, or folders of them.

    Prints a line an image: path, tab, caption. An image that cannot be read is named and left out. Exit status:
    0 all captioned, 3 some images could not be read, 1 failure, 2 wrong use.
    """
    paths = _expand(images, config.data.follow_links)
    if attention is not None and attention.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--attention {attention}: must end in .png, .pdf or .svg", f"use --attention {attention}.png")
    if attention is not None and len(paths) > _MOST_PANELS:
        raise UserError(
            f"--attention: {len(paths)} images are too many for one picture", f"give at most {_MOST_PANELS}"
        )
    from gridcap.common.report.page import check_is_html

    if report is not None:
        check_is_html(report)
    from gridcap.caption.captioner import Captioner
    from gridcap.train.engine.checkpoint import find_checkpoint

    if dry_run:
        click.echo("configuration")
        show_config(config, "caption")
        found_at = ", ".join(str(find_checkpoint(path)) for path in checkpoints)
        click.echo(f"dry run: would caption {len(paths)} images with {found_at}")
        return

    check_writable(output, attention, report)
    captioner = Captioner.load(*checkpoints, device=config.extract.device, weights=weights)
    if attention is not None and not captioner.has_attention:
        raise UserError(
            f"--attention: the decoder of {captioner.checkpoint.path} has no attention",
            "train one with attention: --recipe soft-attention, top-down, transformer, ...",
        )
    warn_if_random([captioner])
    if captioner.foreign_pixels:
        click.echo(
            "note: the decoder was trained on images decoded by nvJPEG, and these go through Pillow: their pixels "
            "differ a little",
            err=True,
        )
    found, bad = _caption_all(captioner, paths, config.caption, config.seed)
    if output is not None:
        write_json(output, [{"file_name": str(p), "caption": c.text, "log_prob": c.log_prob} for p, c in found.items()])
        click.echo(f"captions: {output}", err=True)
    if attention is not None and found:
        _draw(captioner, found, attention)
    if report is not None and found:
        _report(captioner, found, config.caption, report)
    if bad:
        sys.exit(EXIT_INVALID)


def _expand(images: tuple[Path, ...], follow_links: bool) -> list[Path]:
    """Replace folders by their images. Report files in them that are not images."""
    paths: list[Path] = []
    for image in images:
        if image.is_dir():
            listed = list_images(image, follow_links=follow_links)
            paths += [image / record.file_name for record in listed.records]
            for line in listed.problems.lines():
                click.echo(f"note: {image}: {line}", err=True)
        elif image.is_file():
            paths.append(image)
        else:
            raise UserError(f"{image}: no such file or folder", "check the path")
    return list(dict.fromkeys(paths))


def _caption_all(
    captioner: Captioner, paths: list[Path], search: CaptionConfig, seed: int
) -> tuple[dict[Path, Caption], dict[Path, str]]:
    """Caption in batches; print each caption as it comes."""
    import torch

    from gridcap.common.image import InvalidImageError

    generator = torch.Generator().manual_seed(seed)
    found: dict[Path, Caption] = {}
    bad: dict[Path, str] = {}
    for start in range(0, len(paths), search.batch_size):
        squares: dict[Path, np.ndarray] = {}
        for path in paths[start : start + search.batch_size]:
            try:
                squares[path] = captioner.square(path)
            except InvalidImageError as error:
                bad[path] = str(error)
                click.echo(f"{path}: left out: {error}", err=True)
        if squares:
            captions = captioner.caption_squares(np.stack(list(squares.values())), search, generator)
            for path, caption in zip(squares, captions, strict=True):
                found[path] = caption
                click.echo(f"{path}\t{caption.text}")
    return found, bad


def _draw(captioner: Captioner, found: dict[Path, Caption], path: Path) -> None:
    from gridcap.caption.attention_maps import plot_attention

    views = [captioner.view(image) for image in found]
    titles = [f"{image.name}: {caption.text}" for image, caption in found.items()]
    plot_attention(views, list(found.values()), titles, path)
    click.echo(f"attention: {path}", err=True)


def _report(captioner: Captioner, found: dict[Path, Caption], search: CaptionConfig, path: Path) -> None:
    from gridcap.common.report.page import LONGEST, ReportImage, describe_encoder, write_report

    facts = {
        "checkpoint": str(captioner.checkpoint.path),
        "encoder": describe_encoder(captioner.provenance),
        "search": f"beam {search.beam_size}" if search.decoding == "beam" else "sampled",
    }
    shown = (
        ReportImage(str(image), captioner.view(image, LONGEST), caption.text, caption.tokens, caption.attention)
        for image, caption in found.items()
    )
    write_report(path, f"{len(found)} captions", facts, {}, shown)
    click.echo(f"report: {path}", err=True)
