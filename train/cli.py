"""The train-decoder command."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from gridcap.common.command import Uses, flag, pipeline_command, reject_ignored, reload_config, show_config
from gridcap.common.config import PipelineConfig, adapt, describe_choice, recipe_names
from gridcap.common.errors import CheckpointError, ConfigError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.text import plural
from gridcap.train.api import reject_validation_settings, scst_output, split_training_data, with_decoder_of, with_scst
from gridcap.train.decoders.registry import DECODER_CONFIGS

if TYPE_CHECKING:
    from gridcap.train.data.captioned import CaptionedImages

EXAMPLES = f"""
train-decoder --features features/train.h5                 (captions and validation from pipeline.yaml)
train-decoder --recipe top-down --features feats.h5 --annotations train.json --output runs/mine
train-decoder --features feats.h5 --annotations train.json --val-features val.h5 --val-annotations val.json
train-decoder --then-scst                                  (cross-entropy, then SCST, which optimizes CIDEr)
train-decoder --init-from runs/mine --scst                 (fine-tune with SCST; writes runs/mine-scst)
train-decoder --output runs/mine --resume                  (continue an interrupted run)
train-decoder --output runs/mine --resume auto             (start or continue, for jobs that may be requeued)
torchrun --nproc-per-node 4 --no-python train-decoder ...  (four GPUs; --batch-size is the total)
Recipes: {", ".join(name for name in recipe_names() if name != "scst")}
"""


def _recipe_name(values: dict[str, Any]) -> str | None:
    """Return the recipe selected on the command line; --scst selects the recipe "scst"."""
    if values["scst"] and values["recipe"] is not None:
        raise ConfigError(
            "--scst and --recipe each select a recipe",
            "omit one of them: --init-from provides the decoder; to change other SCST settings, put `objective: scst` "
            "in your own recipe",
        )
    if values["recipe"] == "scst":
        raise ConfigError("--recipe scst: SCST has its own flag", "pass --scst instead")
    return "scst" if values["scst"] else values["recipe"]


def _check_init_from() -> None:
    """Reject settings that would contradict the decoder of --init-from."""
    parameters = click.get_current_context().params
    fixed = ("train.decoder", "train.tokenizer", "train.vocabulary", "train.max_length")
    conflicts = [text for text in parameters["sets"] if text.startswith(fixed)]
    if parameters["decoder"] is not None:
        conflicts.append("--decoder")
    if parameters["init_from"] is not None and conflicts:
        raise ConfigError(
            "--init-from provides the decoder, the tokenizer, the vocabulary, and max_length, but the command line "
            f"also sets {conflicts[0]}",
            "omit one of the two",
        )


USES = Uses(("train", "data", "seed"), "train.max_grad_norm=1")


@pipeline_command("train-decoder", EXAMPLES, own_recipe=_recipe_name, uses=USES, decoders=DECODER_CONFIGS)
@flag("--features", "train.features")
@flag("--annotations", "train.annotations")
@flag("--val-features", "train.val_features")
@flag("--val-annotations", "train.val_annotations")
@flag("--val-fraction", "train.val_fraction")
@flag("--test-fraction", "train.test_fraction")
@flag("--group-column", "data.group_column")
@flag("--group-prefix", "data.group_prefix")
@flag("--output", "train.output")
@click.option("--recipe", help="built-in recipe (decoder and training settings), or a YAML file with a train section")
@click.option("--scst", is_flag=True, help="self-critical sequence training (SCST) of the decoder given by --init-from")
@click.option("--then-scst", is_flag=True, help="continue the finished run with SCST (recipe scst), into <output>-scst")
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
@flag("--image-column", "data.image_column")
@flag("--caption-column", "data.caption_column")
@flag("--device", "train.device")
@flag("--seed", "seed")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="yes",
    type=click.Choice(["yes", "no", "auto"]),
    help="resume from the last checkpoint in --output, with the settings of the run; auto: resume if --output contains "
    "a run, else start one  [default: no; auto in a Slurm job]",
)
def train_decoder(
    config: PipelineConfig, dry_run: bool, resume: str | None, recipe: str | None, scst: bool, then_scst: bool
) -> None:
    """Train a decoder on a feature store.

    Each epoch ends with validation (loss, perplexity, and CIDEr), if there is a validation store, and with a
    checkpoint. The best checkpoint (by CIDEr) and the last one are kept. Exit status: 0 success, 1 failure, 2 usage
    error.
    """
    from gridcap.train.engine.distributed import find_ranks

    _check_init_from()
    with contextlib.ExitStack() as stack:
        if not find_ranks().is_main:  # only rank 0 prints; errors end the block and are printed by every rank
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        resumed = _should_resume(config, resume)
        config = _resumed_config(config) if resumed else _initial_config(config, recipe)
        _check_objective(config, then_scst, resumed)
        _train(config, dry_run, resumed)
        if then_scst and not dry_run:
            scst_config = with_scst(config)
            _train(scst_config, False, resumed and (scst_config.train.output / "config.yaml").is_file())


def _check_objective(config: PipelineConfig, then_scst: bool, resumed: bool) -> None:
    """Check the settings of SCST before anything is loaded."""
    from gridcap.train.engine.start import check_objective

    check_objective(config.train)
    if config.train.objective == "scst":
        if then_scst:
            raise ConfigError("--then-scst: the run itself trains with SCST", "omit --then-scst, or --scst")
        reject_ignored(["train.label_smoothing", "train.scheduled_sampling"], "with SCST", "omit it")
    elif not then_scst:
        reject_ignored(["train.scst"], "without SCST", "pass --scst or --then-scst, or omit it")
    elif not resumed and (output := scst_output(config)).exists():  # not after hours of training
        raise CheckpointError(f"{output}: already exists", "continue it with --resume, or choose another --output")


def _should_resume(config: PipelineConfig, choice: str | None) -> bool:
    """Return whether to resume the run in --output."""
    if choice is None:
        choice = "auto" if "SLURM_JOB_ID" in os.environ else "no"  # a requeued job runs the same command again
    if choice == "auto":
        output = _with_default_output(config).train.output
        choice = "yes" if (output / "config.yaml").is_file() else "no"
        click.echo(f"--resume auto: {'resuming the run' if choice == 'yes' else 'starting a new run'} in {output}")
    return choice == "yes"


def _initial_config(config: PipelineConfig, recipe: str | None) -> PipelineConfig:
    """Return the configuration of a new run; with --init-from, with the decoder of that run."""
    config = _with_default_output(config)
    return config if config.train.init_from is None else with_decoder_of(config, config.train.init_from, recipe)


def _resumed_config(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration of the run in --output, overridden by the command line."""
    output = _with_default_output(config).train.output
    saved = output / "config.yaml"
    if not saved.is_file():
        raise CheckpointError(f"no run to resume in {output}", "check --output, or omit --resume")
    return reload_config(saved, DECODER_CONFIGS)


def _with_default_output(config: PipelineConfig) -> PipelineConfig:
    """Put a run that starts from another one next to it, unless the command line sets the output."""
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


def _train(config: PipelineConfig, dry_run: bool, resume: bool) -> None:
    from gridcap.train.data.inputs import captions_for, warn_if_random
    from gridcap.train.data.vocabulary_check import check_vocabulary

    settings = config.train
    show_config(config, "train", full=dry_run)
    store = FeatureStore(settings.features or config.data.features_dir / "train.h5")
    train = captions_for(store, settings.annotations, [config], "train", "--annotations")
    if settings.val_fraction or settings.test_fraction:
        train, val = split_training_data(train, config)
        click.echo(f"split: {', '.join(f'{count:,} {name}' for name, count in _count_splits(train).items())}")
    else:
        reject_ignored(
            ["data.group_column", "data.group_prefix"], "without --val-fraction or --test-fraction", "omit it"
        )
        val = _validation_data(config, store)
    if val is None:
        click.echo("no validation store: the last checkpoint counts as the best one (pass --val-features)")
    warn_if_random(store)
    from gridcap.train.engine.history import format_run
    from gridcap.train.engine.job import check_disjoint
    from gridcap.train.engine.loop import fit

    if val is not None:
        check_disjoint(train, val)
    adapted = adapt(settings, len(train), train.caption_count)
    if dry_run:
        if choice := describe_choice(settings, len(train), train.caption_count):
            click.echo(choice)
        if settings.init_from is None and not resume:  # otherwise, the vocabulary is that of the checkpoint
            for line in check_vocabulary(train, val, adapted).lines(settings.max_unk):
                click.echo(line)
        epochs = plural(adapted.epochs, "epoch")
        click.echo(f"dry run: would train {settings.decoder.family} for {epochs} into {settings.output}")
        return
    history = fit(config, train, val, resume)
    click.echo(format_run(adapted, history))


def _count_splits(data: CaptionedImages) -> dict[str, int]:
    """Return split -> number of images, in the order of use."""
    counts = Counter(data.assignment.values())
    return {name: counts[name] for name in ("train", "val", "test") if name in counts}


def _validation_data(config: PipelineConfig, store: FeatureStore) -> CaptionedImages | None:
    """Return the validation images: of --val-features, or of the store next to the training store, if it exists."""
    from gridcap.train.data.inputs import captions_for

    settings = config.train
    split = store.split.replace("train", "val") if "train" in store.split else "val"
    path = settings.val_features or config.data.features_dir / f"{split}.h5"
    if settings.val_features is not None or path.exists():
        return captions_for(FeatureStore(path), settings.val_annotations, [config], "val", "--val-annotations")
    reject_validation_settings(settings)
    return None
