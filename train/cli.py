"""train-decoder and evaluate-decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.annotations import captions_alone, load_split
from common.command import flag, pipeline_command, reload_config, show_config
from common.config import PipelineConfig
from common.errors import MismatchError, UserError
from common.store import FeatureStore, check_same_features

if TYPE_CHECKING:
    from train.stream import CaptionedImages

TRAIN_EXAMPLES = """
train-decoder --features features/train.h5                 (captions and validation from pipeline.yaml)
train-decoder --features feats.h5 --annotations captions_train.json --output runs/mine
train-decoder --features feats.h5 --annotations train.json --val-features val.h5 --val-annotations val.json
train-decoder --decoder lstm --output runs/lstm --epochs 30
train-decoder --output runs/mine --resume                  (go on after an interruption)
"""
EVALUATE_EXAMPLES = """
evaluate-decoder --checkpoint runs/mine --features features/test.h5
evaluate-decoder --checkpoint runs/mine --features test.h5 --annotations captions_test.json --beam-size 5
"""


def _captions_for(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> CaptionedImages:
    """Join a store with its captions: those given, else those of its split (or of its role) in the configuration."""
    from train.stream import CaptionedImages

    if annotations is not None:
        name, split = store.split or role, captions_alone(annotations)
        config = configs[0]
    else:
        known = (
            (name, config.data.splits[name], config)
            for name in (store.split, role)
            for config in configs
            if name in config.data.splits and config.data.splits[name].annotations is not None
        )
        found = next(known, None)
        if found is None:
            raise UserError(
                f"{store.path}: no captions known for its split {store.split!r}",
                f"give {option} FILE, or write data.splits.{store.split or role}.annotations into pipeline.yaml",
            )
        name, split, config = found
    whole = split.model_copy(update={"limit": None, "skip": 0})  # the store already is the subset
    loaded = load_split(whole, name, config.seed, config.data.max_bad)
    source = split.annotations or split.images
    for line in loaded.problems.lines():
        click.echo(f"note: {source}: {line}", err=True)
    data = CaptionedImages.join(store, loaded.records, source)
    left_out = "".join(f", {n} images {why}" for why, n in data.left_out.items())
    click.echo(f"{store.path}: {len(data)} images, {sum(map(len, data.captions))} captions from {source}{left_out}")
    return data


def _warn_if_random(store: FeatureStore) -> None:
    if store.provenance.get("weights", {}).get("random"):
        click.secho(
            f"WARNING: {store.path} was made with random encoder weights: fine for a demo, not for real captions.",
            fg="yellow", err=True,
        )  # fmt: skip


@pipeline_command("train-decoder", TRAIN_EXAMPLES)
@flag("--features", "train.features")
@flag("--annotations", "train.annotations")
@flag("--val-features", "train.val_features")
@flag("--val-annotations", "train.val_annotations")
@flag("--output", "train.output")
@flag("--decoder", "train.decoder.family")
@flag("--epochs", "train.epochs")
@flag("--batch-size", "train.batch_size")
@flag("--learning-rate", "train.learning_rate")
@flag("--precision", "train.precision")
@flag("--device", "train.device")
@flag("--seed", "seed")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output, with the run's own settings.")
def train_decoder(config: PipelineConfig, dry_run: bool, resume: bool) -> None:
    """Train a decoder on a feature store.

    Each epoch ends with the loss, perplexity and CIDEr on the validation store, if there is one, and with a
    checkpoint; the best by CIDEr and the last are kept. Exit status: 0 done, 1 failure, 2 wrong use.
    """
    if resume and (saved := config.train.output / "config.yaml").is_file():
        config = reload_config(saved)
    settings = config.train
    click.echo("configuration")
    show_config(config, "train")
    store = FeatureStore(settings.features or config.data.features / "train.h5")
    train = _captions_for(store, settings.annotations, [config], "train", "--annotations")
    val = None
    sibling = store.split.replace("train", "val") if "train" in store.split else "val"
    val_path = settings.val_features or config.data.features / f"{sibling}.h5"
    if settings.val_features is not None or val_path.exists():
        val = _captions_for(FeatureStore(val_path), settings.val_annotations, [config], "val", "--val-annotations")
    elif settings.val_annotations is not None:
        raise UserError("--val-annotations is given without --val-features", "give both, or neither")
    else:
        click.echo("no validation store: the last checkpoint will count as the best (give --val-features)")
    if val is not None and (shared := len(train.images() & val.images())):
        raise MismatchError(
            f"{shared} images are both in {store.path} and in {val.store.path}",
            "validate on images that are not trained on: give another --val-features",
        )
    _warn_if_random(store)
    if dry_run:
        click.echo(
            f"dry run: would train {settings.decoder.family} for {settings.epochs} epochs into {settings.output}"
        )
        return

    from train.loop import best_epoch, fit

    done = fit(config, train, val, resume)
    best = done[best_epoch(done) - 1]
    scores = ""
    if "val_cider" in best:
        scores = f", validation CIDEr {best['val_cider']:.3f}, perplexity {best['val_perplexity']:.2f}"
    click.echo(f"done: {settings.output}: {len(done)} epochs, best is epoch {best['epoch']}{scores}")


@pipeline_command("evaluate-decoder", EVALUATE_EXAMPLES)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), required=True, help="Folder of a run or of a checkpoint."
)
@click.option("--features", type=click.Path(path_type=Path), required=True, help="Feature store to evaluate on.")
@click.option("--annotations", type=click.Path(path_type=Path), help="Its captions  [default: those of its split]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSON file for the result  [default: <run>/evaluation/<features>.json]",
)
@flag("--beam-size", "caption.beam_size")
@flag("--max-length", "caption.max_length")
@flag("--batch-size", "caption.batch_size")
@flag("--device", "train.device")
def evaluate_decoder(
    config: PipelineConfig,
    dry_run: bool,
    checkpoint: Path,
    features: Path,
    annotations: Path | None,
    output: Path | None,
) -> None:
    """Caption a feature store and score the captions with the field's metrics.

    Writes a JSON file with the metrics and every caption, and beside it the captions in COCO's results format.
    Exit status: 0 done, 1 failure, 2 wrong use.
    """
    from train.checkpoint import load_checkpoint, run_folder
    from train.evaluate import evaluate, write_evaluation

    click.echo("configuration")
    show_config(config, "caption")
    loaded = load_checkpoint(checkpoint)
    store = FeatureStore(features)
    data = _captions_for(store, annotations, [config, loaded.config], "test", "--annotations")
    _warn_if_random(store)
    check_same_features(loaded.provenance, store.provenance, f"{loaded.path} was trained on", f"{features} holds")
    output = output or run_folder(checkpoint) / "evaluation" / f"{features.stem}.json"
    if dry_run:
        click.echo(f"dry run: would evaluate {loaded.path} on {len(data)} images into {output}")
        return
    result = evaluate(loaded, data, config.caption, config.train.device)
    results = write_evaluation(result, output)
    click.echo(
        f"{loaded.path} on {len(data)} images, beam {config.caption.beam_size}, tokens by {result.scores.tokenizer}"
    )
    for name, value in result.scores.values.items():
        click.echo(f"  {name:<11} {value:8.4f}")
    for name, why in result.scores.left_out.items():
        click.echo(f"  {name:<11} left out: {why}")
    click.echo(f"done: {output}, {results}")
