"""train-decoder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gridcap.common.command import flag, pipeline_command, reload_config, show_config
from gridcap.common.config import PipelineConfig, TrainConfig, recipe_names
from gridcap.common.errors import CheckpointError, ConfigError, MismatchError, UserError
from gridcap.common.store.reader import FeatureStore

if TYPE_CHECKING:
    from gridcap.train.engine.log import Row

EXAMPLES = f"""
train-decoder --features features/train.h5                 (captions and validation from pipeline.yaml)
train-decoder --recipe top-down --features feats.h5 --annotations train.json --output runs/mine
train-decoder --features feats.h5 --annotations train.json --val-features val.h5 --val-annotations val.json
train-decoder --init-from runs/mine --scst                 (self-critical training, into runs/mine-scst)
train-decoder --output runs/mine --resume                  (go on after an interruption)
torchrun --nproc-per-node 4 --no-python train-decoder ...  (four GPUs; --batch-size is that of all together)
Recipes: {", ".join(name for name in recipe_names() if name != "scst")}
"""


def _recipe(values: dict[str, Any]) -> str | None:
    """The recipe of the command line; --scst is the one named so."""
    if values["scst"] and values["recipe"] is not None:
        raise ConfigError(
            "--scst is a recipe itself, and --recipe gives another",
            "the decoder comes from --init-from; put `objective: scst` into a recipe of your own to change the rest",
        )
    if values["recipe"] == "scst":
        raise ConfigError("--recipe scst: self-critical training has a flag of its own", "say --scst")
    return "scst" if values["scst"] else values["recipe"]


def _check_beginning_of_another() -> None:
    """Who goes on from a decoder cannot choose another one, nor other words."""
    parameters = click.get_current_context().params
    fixed = ("train.decoder", "gridcap.train.data.vocabulary", "train.max_length")
    named = [text for text in parameters["sets"] if text.startswith(fixed)]
    if parameters["decoder"] is not None:
        named.append("--decoder")
    if parameters["init_from"] is not None and named:
        raise ConfigError(
            f"--init-from brings its decoder, vocabulary and longest caption, and the command line names another: "
            f"{named[0]}",
            "leave one of the two out",
        )


@pipeline_command("train-decoder", EXAMPLES, own_recipe=_recipe)
@flag("--features", "train.features")
@flag("--annotations", "train.annotations")
@flag("--val-features", "train.val_features")
@flag("--val-annotations", "train.val_annotations")
@flag("--output", "train.output")
@click.option(
    "--recipe", help="A known decoder and how it is trained, by name, or a YAML file with a train section of your own."
)
@click.option("--scst", is_flag=True, help="Self-critical training: reward whole captions. Needs --init-from.")
@flag("--init-from", "train.init_from")
@flag("--decoder", "train.decoder.family")
@flag("--epochs", "train.epochs")
@flag("--batch-size", "train.batch_size")
@flag("--grad-accum-steps", "train.grad_accum_steps")
@flag("--learning-rate", "train.learning_rate")
@flag("--shuffle", "train.shuffle")
@flag("--patience", "train.patience")
@flag("--checkpoint-steps", "train.checkpoint_steps")
@flag("--checkpoint-minutes", "train.checkpoint_minutes")
@flag("--precision", "train.precision")
@flag("--device", "train.device")
@flag("--seed", "seed")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output, with the run's own settings.")
def train_decoder(config: PipelineConfig, dry_run: bool, resume: bool, recipe: str | None, scst: bool) -> None:
    """Train a decoder on a feature store.

    Each epoch ends with the loss, perplexity and CIDEr on the validation store, if there is one, and with a
    checkpoint; the best by CIDEr and the last are kept. Exit status: 0 done, 1 failure, 2 wrong use.
    """
    from gridcap.train.engine.distributed import find_ranks

    _check_beginning_of_another()
    with contextlib.ExitStack() as stack:
        if not find_ranks().first:  # the first of several processes speaks for all, but for errors, which end the block
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        _train(_placed(config), recipe, dry_run, resume)


def _placed(config: PipelineConfig) -> PipelineConfig:
    """What goes on from a run goes beside it, unless the command line says where."""
    from gridcap.train.engine.checkpoint import run_folder

    parameters, source = click.get_current_context().params, config.train.init_from
    if source is None or parameters["output"] is not None:
        return config
    if any(text.startswith("train.output=") for text in parameters["sets"]):
        return config
    run = run_folder(source)
    run = run if run.name else run.resolve()
    suffix = "scst" if config.train.objective == "scst" else "more"
    return _with_train(config, output=run.with_name(f"{run.name}-{suffix}"))


def _with_train(config: PipelineConfig, **changes: Any) -> PipelineConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _train(config: PipelineConfig, recipe: str | None, dry_run: bool, resume: bool) -> None:
    from gridcap.train.data.inputs import captions_for, warn_if_random

    if resume:
        saved = config.train.output / "config.yaml"
        if not saved.is_file():
            raise CheckpointError(
                f"{config.train.output}: holds no run to go on with", "check --output, or leave out --resume"
            )
        config = reload_config(saved)
    elif config.train.init_from is not None:
        config = _with_decoder_of(config, config.train.init_from, recipe)
    settings = config.train
    click.echo("configuration")
    show_config(config, "train")
    store = FeatureStore(settings.features or config.data.features_dir / "train.h5")
    train = captions_for(store, settings.annotations, [config], "train", "--annotations")
    val = None
    sibling = store.split.replace("train", "val") if "train" in store.split else "val"
    val_path = settings.val_features or config.data.features_dir / f"{sibling}.h5"
    if settings.val_features is not None or val_path.exists():
        val = captions_for(FeatureStore(val_path), settings.val_annotations, [config], "val", "--val-annotations")
    elif settings.val_annotations is not None:
        raise UserError("--val-annotations is given without --val-features", "give both, or neither")
    else:
        if settings.patience is not None:
            raise UserError("--patience watches validation CIDEr, and there is no validation", "give --val-features")
        click.echo("no validation store: the last checkpoint will count as the best (give --val-features)")
    if val is not None and (shared := len(train.images() & val.images())):
        raise MismatchError(
            f"{shared} images are both in {store.path} and in {val.store.path}",
            "validate on images that are not trained on: give another --val-features",
        )
    warn_if_random(store)
    from gridcap.train.engine.loop import check_beginning, fit

    check_beginning(settings)
    if dry_run:
        click.echo(
            f"dry run: would train {settings.decoder.family} for {settings.epochs} epochs into {settings.output}"
        )
        return

    history = fit(config, train, val, resume)
    click.echo(_summary(config, history))


def _with_decoder_of(config: PipelineConfig, source: Path, recipe: str | None) -> PipelineConfig:
    """Who goes on from a decoder trains that decoder, with its vocabulary and its longest caption."""
    from gridcap.train.engine.checkpoint import load_checkpoint

    then = load_checkpoint(source).config.train
    if recipe is not None and config.train.decoder not in (TrainConfig().decoder, then.decoder):
        raise ConfigError(
            f"--init-from {source} brings its decoder, and --recipe {recipe} names another",
            "leave one of the two out; a recipe without a decoder says how to go on",
        )
    return _with_train(config, decoder=then.decoder, vocabulary=then.vocabulary, max_length=then.max_length)


def _summary(config: PipelineConfig, history: list[Row]) -> str:
    from gridcap.train.engine.history import best_row

    settings, best, last = config.train, best_row(history), history[-1]
    lines = [f"done: {settings.output}: {last['epoch']} epochs, best is epoch {best['epoch']}"]
    if last["epoch"] < settings.epochs:
        lines[0] += f" (stopped: no higher validation CIDEr for {settings.patience} epochs)"
    if "val_cider" in best:
        lines[0] += f", validation CIDEr {best['val_cider']:.3f}, perplexity {best['val_perplexity']:.2f}"
        if history[0]["epoch"] == 0 and best["epoch"] == 0 and last["epoch"]:
            lines.append(f"no epoch was better than the decoder it began with, {settings.init_from}; that one is kept")
            lines.append(
                f"what may help: --set train.scst.temperature={settings.scst.temperature / 2:g}, "
                f"or --learning-rate {settings.learning_rate / 4:g}"
            )
    lines.append(f"curves: {settings.output / 'curves.png'}")
    return "\n".join(lines)
