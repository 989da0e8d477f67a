"""The evaluate-decoder command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gridcap.common.command import Uses, flag, pipeline_command, reject_ignored_by_sampling, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import GridcapError, PathError, UserError
from gridcap.common.files import check_writable
from gridcap.common.store.provenance import check_same_features
from gridcap.common.store.reader import FeatureStore
from gridcap.common.text import plural

if TYPE_CHECKING:
    from gridcap.train.data.captioned import CaptionedImages
    from gridcap.train.evaluation import Evaluation

EXAMPLES = """
evaluate-decoder --checkpoint runs/mine --features features/test.h5
evaluate-decoder --checkpoint runs/mine --features test.h5 --annotations captions_test.json --beam-size 5
evaluate-decoder --checkpoint runs/mine --features features/test.h5 --report report.html      (HTML report)
evaluate-decoder --checkpoint runs/a --checkpoint runs/b --features features/test.h5     (ensemble)
evaluate-decoder --checkpoint runs/mine --features features/test.h5 --decoding sample --top-p 0.9 --seed 1
"""


@dataclass(frozen=True)
class _Paths:
    """Path options of the command.

    Attributes:
        checkpoints: folders of runs or checkpoints.
        features: feature store.
        annotations: captions file, or None for that of the store's split.
        output: JSON file, or None for the default in the run's folder.
        report: HTML file, or None.
        images: image folder for the report, or None for that of the store's split.
        split: part of the training store to evaluate on, or None.
    """

    checkpoints: tuple[Path, ...]
    features: Path
    annotations: Path | None
    output: Path | None
    report: Path | None
    images: Path | None
    split: str | None


SPLITS = ("train", "val", "test")
USES = Uses(("caption", "data", "train.device", "seed"), "caption.top_k=10")


@pipeline_command("evaluate-decoder", EXAMPLES, uses=USES)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="folder of a run or of a checkpoint; repeat the option to decode with an ensemble",
)
@click.option("--features", type=click.Path(path_type=Path), required=True, help="feature store to evaluate on")
@click.option(
    "--annotations", type=click.Path(path_type=Path), help="captions file  [default: that of the store's split]"
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSON file for the results  [default: <run>/evaluation/<features>.<decoding>.json]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="HTML file for a report with images, captions, scores, and attention maps",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="image folder for the report  [default: that of the store's split]",
)
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    help="evaluate on this part of the store that the run was trained on with --val-fraction or --test-fraction",
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
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
@flag("--device", "train.device")
@flag("--seed", "seed")
def evaluate_decoder(config: PipelineConfig, dry_run: bool, **paths: Path | None) -> None:
    """Caption a feature store and compute the COCO metrics.

    Writes the metrics and all captions to a JSON file, the scores per image to a CSV file next to it, and the captions
    in COCO's results format; with --report, also an HTML report. Exit status: 0 success, 1 failure, 2 usage error.
    """
    reject_ignored_by_sampling(config.caption.decoding)
    _evaluate(config, dry_run, _Paths(**paths))  # type: ignore[arg-type]


def _evaluate(config: PipelineConfig, dry_run: bool, paths: _Paths) -> None:
    from gridcap.train.data.inputs import captions_for, warn_if_random
    from gridcap.train.engine.checkpoint import find_checkpoint, run_folder
    from gridcap.train.ensemble import load_ensemble
    from gridcap.train.evaluate import EvaluationOptions, evaluate
    from gridcap.train.evaluation import evaluation_files, write_evaluation
    from gridcap.train.metrics.statistics import NOVEL_CAPTIONS
    from gridcap.train.report import ReportContext, find_images, write_evaluation_report

    _check_paths(paths)
    show_config(config, "caption", full=dry_run)
    loaded = load_ensemble(paths.checkpoints)
    store = FeatureStore(paths.features)
    configs = [config, loaded.config]
    data = captions_for(store, paths.annotations, configs, "test", "--annotations")
    data = _select_split(data, paths, run_folder(paths.checkpoints[0]))
    warn_if_random(store)
    trained, contains = f"{loaded.path} was trained on", f"{paths.features} contains"
    check_same_features(loaded.provenance, store.provenance, trained, contains)
    images = None if paths.report is None else find_images(store, paths.images, configs)
    folders = [find_checkpoint(path) for path in paths.checkpoints]
    run = run_folder(paths.checkpoints[0])
    output = paths.output or run / "evaluation" / _default_name(config, paths)
    subject = ", ".join(map(str, folders))
    if dry_run:
        report = "" if paths.report is None else f" and {paths.report}"
        click.echo(f"dry run: would evaluate {subject} on {plural(len(data), 'image')} into {output}{report}")
        return
    check_writable(*evaluation_files(output), paths.report)
    training, reason = _training_captions(loaded.config)
    options = EvaluationOptions(config.train.device, config.seed, training, keep_attention=paths.report is not None)
    result = evaluate(loaded, data, config.caption, options)
    if training is None:
        result.scores.unavailable[NOVEL_CAPTIONS] = reason
    settings = {
        "checkpoints": [str(folder) for folder in folders],
        "features": str(paths.features),
        "annotations": None if paths.annotations is None else str(paths.annotations),
        "split": paths.split,
        "decoding": config.caption.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "device": config.train.device,
        "seed": config.seed,
    }
    written = write_evaluation(result, output, settings)
    decoding, tokenizer = _describe_decoding(config), result.scores.tokenizer
    click.echo(f"{subject} on {plural(len(data), 'image')}, {decoding}, tokenizer: {tokenizer}")
    _print_results(result)
    if paths.report is not None and images is not None:
        facts = {
            "checkpoint": subject,
            "features": f"{paths.features}: {plural(len(data), 'image')}",
            "decoding": decoding,
            "tokenizer": tokenizer,
        }
        context = ReportContext(images, facts, run / "curves.png", config.seed)
        write_evaluation_report(paths.report, result, loaded, store, context)
        written.append(paths.report)
    click.echo(f"done: {', '.join(map(str, written))}")


def _select_split(data: CaptionedImages, paths: _Paths, run: Path) -> CaptionedImages:
    """Return the images of --split; without it, all images, none of which may be a training image.

    Raises:
        UserError: the run did not split its data, or the store contains its training images.
        MismatchError: the store contains no images of the split.
    """
    from gridcap.train.data.assignment import read_assignment, select_split

    assignment = read_assignment(run)
    if assignment is None:
        if paths.split is not None:
            raise UserError(
                f"--split {paths.split}: {run} was trained without --val-fraction and --test-fraction",
                "omit --split, and pass the feature store of the split",
            )
        return data
    if paths.split is not None:
        selected = select_split(data, assignment, paths.split, run)
        click.echo(f"--split {paths.split}: {plural(len(selected), 'image')}")
        return selected
    if any(assignment.get(name) == "train" for name in data.file_names()):
        raise UserError(f"{paths.features}: contains training images of {run}", "pass --split test or --split val")
    return data


def _check_paths(paths: _Paths) -> None:
    from gridcap.common.report.page import check_is_html

    if paths.report is not None:
        check_is_html(paths.report)
    if paths.images is not None and paths.report is None:
        raise UserError("--images requires --report", "add --report report.html, or omit --images")
    if paths.images is not None and not paths.images.is_dir():
        problem = "not a folder" if paths.images.exists() else "no such folder"
        raise PathError(f"--images {paths.images}: {problem}", "pass the folder that the features were extracted from")
    if paths.output is not None and paths.output.suffix != ".json":
        raise UserError(f"--output {paths.output}: must end in .json", f"use --output {paths.output / 'test.json'}")


def _training_captions(config: PipelineConfig) -> tuple[list[str] | None, str]:
    """Return the captions that a run was trained on, or None and the reason why they are not available."""
    from gridcap.train.data.assignment import read_assignment, select_split
    from gridcap.train.data.inputs import join_captions

    path = config.train.features or config.data.features_dir / "train.h5"
    try:
        with FeatureStore(path) as store:
            data = join_captions(store, config.train.annotations, [config], "train", "--annotations").data
            if assignment := read_assignment(config.train.output):
                data = select_split(data, assignment, "train", config.train.output)
    except (GridcapError, OSError) as error:
        return None, f"requires the training captions: {error}"
    return [text for captions in data.captions for text in captions], ""


def _default_name(config: PipelineConfig, paths: _Paths) -> str:
    """Return a file name that identifies the features, the ensemble, and the decoding method."""
    caption, count = config.caption, len(paths.checkpoints)
    mbr = "-mbr" if caption.mbr else ""
    decoding = f"beam-{caption.beam_size}{mbr}" if caption.decoding == "beam" else f"sample-{config.seed}"
    stem = paths.features.stem if paths.split is None else f"{paths.features.stem}-{paths.split}"
    return f"{stem}{f'.ensemble-of-{count}' if count > 1 else ''}.{decoding}.json"


def _describe_decoding(config: PipelineConfig) -> str:
    caption = config.caption
    if caption.decoding == "beam":
        more = ", no repeated trigrams" if caption.block_trigrams else ""
        more += ", MBR reranking" if caption.mbr else ""
        return f"beam {caption.beam_size}, length penalty {caption.length_penalty:g}{more}"
    limits = "".join(f", {name} {v}" for name in ("top_k", "top_p") if (v := getattr(caption, name)) is not None)
    return f"sampled at temperature {caption.temperature:g}{limits}, seed {config.seed}"


def _print_results(result: Evaluation) -> None:
    """Print the metrics, the caption statistics, warnings, and the metrics that are not available."""
    from gridcap.train.metrics.bootstrap import LEVEL, RESAMPLES

    if result.scores.intervals:
        click.echo(f"  brackets: {LEVEL:.0%} confidence intervals, {RESAMPLES} bootstrap resamples of the images")
    for name, value in result.scores.values.items():
        interval = result.scores.intervals.get(name)
        ends = "" if interval is None else f"   [{interval[0]:.4f}, {interval[1]:.4f}]"
        click.echo(f"  {name:<17} {value:8.4f}{ends}")
    statistics, unit = result.statistics, result.scores.unit
    novel = statistics.get("novel_captions")
    size = statistics.get("vocabulary_words")
    of_vocabulary = "" if size is None else f" of {size} in the vocabulary"
    mean, reference = statistics["mean_length"], statistics["mean_reference_length"]
    lines = {
        f"distinct {unit}s": f"{statistics['distinct_words']:8}{of_vocabulary}",
        "distinct captions": f"{statistics['distinct_captions']:8.1%} of the captions",
        "novel captions": "" if novel is None else f"{novel:8.1%} not among the training captions",
        "mean length": f"{mean:8.2f} {unit}s; references: {reference:.2f}",
    }
    click.echo("")
    for name, text in lines.items():
        if text:
            click.echo(f"  {name:<17} {text}")
    _print_warnings(result)
    if result.scores.unavailable:
        click.echo("")
    for name, reason in result.scores.unavailable.items():
        click.echo(f"  {name.replace('_', ' '):<17} not available: {reason}")


def _print_warnings(result: Evaluation) -> None:
    from gridcap.train.engine.health import MAX_DUPLICATE_SHARE

    counts = Counter(result.captions.values())
    empty = counts[""]
    if len(result.captions) == 1:
        reason = "every document frequency is 1 of 1, so every n-gram has the weight log 1"
        click.secho(f"  WARNING: the CIDEr of a single image is 0 by construction: {reason}", fg="yellow")
    if empty:
        count = plural(empty, "empty caption")
        click.secho(f"  WARNING: {count}: train longer, or raise --length-penalty", fg="yellow")
    identical = max(counts.values())
    if identical > max(1, MAX_DUPLICATE_SHARE * counts.total()):
        count = f"all {identical}" if identical == counts.total() else f"{identical} of {counts.total()}"
        click.secho(f"  WARNING: {count} captions are identical", fg="yellow")
