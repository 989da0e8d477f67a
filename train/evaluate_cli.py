"""evaluate-decoder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gridcap.common.command import flag, pipeline_command, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import GridcapError, UserError
from gridcap.common.files import check_writable
from gridcap.common.store.provenance import check_same_features
from gridcap.common.store.reader import FeatureStore

if TYPE_CHECKING:
    from gridcap.train.evaluate import Evaluation

EXAMPLES = """
evaluate-decoder --checkpoint runs/mine --features features/test.h5
evaluate-decoder --checkpoint runs/mine --features test.h5 --annotations captions_test.json --beam-size 5
evaluate-decoder --checkpoint runs/mine --features features/test.h5 --report report.html      (a page to look at)
evaluate-decoder --checkpoint runs/a --checkpoint runs/b --features features/test.h5     (both decode together)
evaluate-decoder --checkpoint runs/mine --features features/test.h5 --decoding sample --top-p 0.9 --seed 1
"""


def _training_captions(config: PipelineConfig) -> tuple[list[str] | None, str]:
    """The captions that a run was trained on, or None and why not: those of the images in its feature store."""
    from gridcap.train.data.inputs import join_captions

    path = config.train.features or config.data.features_dir / "train.h5"
    try:
        with FeatureStore(path) as store:
            data = join_captions(store, config.train.annotations, [config], "train", "--annotations").data
    except (GridcapError, OSError) as error:
        return None, f"needs the training captions: {error}"
    return [text for captions in data.captions for text in captions], ""


@pipeline_command("evaluate-decoder", EXAMPLES)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder of a run or of a checkpoint; given several times, their predictions are averaged.",
)
@click.option("--features", type=click.Path(path_type=Path), required=True, help="Feature store to evaluate on.")
@click.option("--annotations", type=click.Path(path_type=Path), help="Its captions  [default: those of its split]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSON file for the result  [default: <run>/evaluation/<features>.<search>.json]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write a page with the images, their captions and scores, and where the decoder looked: .html, in one file.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Image folder, for the report  [default: that of the store's split]",
)
@flag("--decoding", "caption.decoding")
@flag("--beam-size", "caption.beam_size")
@flag("--length-penalty", "caption.length_penalty")
@flag("--block-trigrams", "caption.block_trigrams")
@flag("--mbr", "caption.mbr")
@flag("--temperature", "caption.temperature")
@flag("--top-k", "caption.top_k")
@flag("--top-p", "caption.top_p")
@flag("--max-length", "caption.max_length")
@flag("--batch-size", "caption.batch_size")
@flag("--device", "train.device")
@flag("--seed", "seed")
def evaluate_decoder(
    config: PipelineConfig,
    dry_run: bool,
    checkpoints: tuple[Path, ...],
    features: Path,
    annotations: Path | None,
    output: Path | None,
    report: Path | None,
    images: Path | None,
) -> None:
    """Caption a feature store and score the captions with the field's metrics.

    Writes a JSON file with the metrics and every caption, and beside it a CSV file with the scores of every image
    and the captions in COCO's results format; with --report a page that shows it all. Exit status: 0 done,
    1 failure, 2 wrong use.
    """
    from gridcap.common.report.page import check_is_html
    from gridcap.train.data.inputs import captions_for, warn_if_random
    from gridcap.train.engine.checkpoint import find_checkpoint, run_folder
    from gridcap.train.ensemble import load_ensemble
    from gridcap.train.evaluate import NOVEL, evaluate, write_evaluation
    from gridcap.train.report import find_images, write_evaluation_report

    if report is not None:
        check_is_html(report)
    if images is not None and report is None:
        raise UserError("--images is for --report", "give --report report.html too, or leave --images out")
    click.echo("configuration")
    show_config(config, "caption")
    loaded = load_ensemble(checkpoints)
    store = FeatureStore(features)
    data = captions_for(store, annotations, [config, loaded.config], "test", "--annotations")
    warn_if_random(store)
    check_same_features(loaded.provenance, store.provenance, f"{loaded.path} was trained on", f"{features} holds")
    photos = None if report is None else find_images(store, images, [config, loaded.config])
    folders = [find_checkpoint(path) for path in checkpoints]
    together = f".ensemble-of-{len(folders)}" if len(folders) > 1 else ""
    name = f"{features.stem}{together}.{_short(config)}.json"
    output = output or run_folder(checkpoints[0]) / "evaluation" / name
    what = ", ".join(map(str, folders))
    if dry_run:
        also = "" if report is None else f" and {report}"
        click.echo(f"dry run: would evaluate {what} on {len(data)} images into {output}{also}")
        return
    check_writable(output, report)
    training, why = _training_captions(loaded.config)
    result = evaluate(
        loaded, data, config.caption, config.train.device, training, config.seed, keep_looks=report is not None
    )
    if training is None:
        result.scores.left_out[NOVEL] = why
    made_by = {
        "checkpoints": [str(folder) for folder in folders],
        "features": str(features),
        "search": config.caption.model_dump(mode="json"),
        "seed": config.seed,
    }
    written = write_evaluation(result, output, made_by)
    click.echo(f"{what} on {len(data)} images, {_search(config)}, tokens by {result.scores.tokenizer}")
    _show(result)
    if report is not None and photos is not None:
        facts = {
            "checkpoint": what,
            "features": f"{features}: {len(data)} images",
            "search": _search(config),
            "tokens": result.scores.tokenizer,
        }
        curves = run_folder(checkpoints[0]) / "curves.png"
        write_evaluation_report(report, result, loaded, store, photos, facts, curves, config.seed)
        written.append(report)
    click.echo(f"done: {', '.join(map(str, written))}")


def _short(config: PipelineConfig) -> str:
    """The search in a file's name, so that one evaluation does not take another's place."""
    caption = config.caption
    consensus = "-consensus" if caption.mbr else ""
    return f"beam-{caption.beam_size}{consensus}" if caption.decoding == "beam" else f"sample-{config.seed}"


def _search(config: PipelineConfig) -> str:
    """How the captions were decoded, in words."""
    caption = config.caption
    if caption.decoding == "beam":
        more = ", no trigram twice" if caption.block_trigrams else ""
        more += ", by consensus" if caption.mbr else ""
        return f"beam {caption.beam_size}, length penalty {caption.length_penalty:g}{more}"
    limits = "".join(f", {name} {v}" for name in ("top_k", "top_p") if (v := getattr(caption, name)) is not None)
    return f"sampled at temperature {caption.temperature:g}{limits}, seed {config.seed}"


def _show(result: Evaluation) -> None:
    """Metrics, then what the captions are like, then what was left out and why."""
    for name, value in result.scores.values.items():
        click.echo(f"  {name:<17} {value:8.4f}")
    found = result.language
    lines = {
        "words used": f"{found['words_used']:8} of {found['vocabulary_words']} in the vocabulary",
        "distinct captions": f"{found['distinct_captions']:8.1%} of the captions",
        "novel captions": f"{found['novel_captions']:8.1%} are no training caption"
        if "novel_captions" in found
        else "",
        "mean length": f"{found['mean_length']:8.2f} words; of the references {found['mean_reference_length']:.2f}",
    }
    click.echo("")
    for name, text in lines.items():
        if text:
            click.echo(f"  {name:<17} {text}")
    empty = sum(not text for text in result.captions.values())
    counts = Counter(result.captions.values())
    most = max(counts.values())
    if empty:
        click.secho(f"  WARNING: {empty} captions are empty: train longer, or raise --length-penalty", fg="yellow")
    if most > max(1, 0.3 * counts.total()):
        click.secho(f"  WARNING: {most} of {counts.total()} captions are one and the same", fg="yellow")
    if result.scores.left_out:
        click.echo("")
    for name, why in result.scores.left_out.items():
        click.echo(f"  {name.replace('_', ' '):<17} left out: {why}")
