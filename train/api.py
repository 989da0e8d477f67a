"""Training as a function, for use from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gridcap.common.config import PipelineConfig, TrainConfig, build_config, read_recipe
from gridcap.common.config.train import RUN_SETTINGS
from gridcap.common.errors import ConfigError, UserError
from gridcap.train.decoders.registry import DECODER_CONFIGS

if TYPE_CHECKING:
    from gridcap.train.data.captioned import CaptionedImages


def train_decoder(
    features: str | Path,
    annotations: str | Path,
    output: str | Path,
    *,
    recipe: str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train a caption decoder on a feature store, like the command ``gridcap train``.

    Example:
        >>> train_decoder("features/train.h5", "captions.json", "runs/mine", recipe="top-down", epochs=10)
        PosixPath('runs/mine')
        >>> Captioner.load("runs/mine")("photo.jpg").text
        'a dog on a beach'

    Args:
        features: index file of the feature store.
        annotations: captions file of the store.
        output: folder of the run.
        recipe: name of a built-in recipe, or YAML file with a ``train`` section.
        resume: continue the run in `output` from its last checkpoint; the settings must be the same.
        progress: show a progress bar and one line per epoch.
        settings: keys of the section ``train`` (``epochs``, ``learning_rate``, ``val_features``,
            ``decoder={"family": "lstm"}``, ...), and ``seed`` and ``max_invalid``. pipeline.yaml is not read.

    Returns:
        The folder of the run, which ``Captioner.load`` opens.

    Raises:
        UserError: an invalid setting or path.
        AnnotationError: a captions file cannot be used.
        CheckpointError: there is nothing to resume, or `output` contains a run and `resume` is false.
        MismatchError: the captions do not belong to the features, images are used for both training and validation, or
            the settings differ from those of the resumed run.
        StoreError: a feature store cannot be read.
        TrainingError: the loss became NaN or inf.
    """
    from gridcap.common.store.reader import FeatureStore
    from gridcap.train.data.inputs import join_captions
    from gridcap.train.engine.loop import fit
    from gridcap.train.engine.start import check_objective

    settings |= {"features": Path(features), "annotations": Path(annotations), "output": Path(output)}
    config = build_config("train", settings, recipe, DECODER_CONFIGS)
    if config.train.init_from is not None:
        config = with_decoder_of(config, config.train.init_from, recipe)
    check_objective(config.train)
    train = join_captions(FeatureStore(features), Path(annotations), [config], "train", "annotations").data
    val = None
    if config.train.val_fraction or config.train.test_fraction:
        train, val = split_training_data(train, config)
    elif config.train.val_features is None:
        reject_validation_settings(config.train)
    else:
        store = FeatureStore(config.train.val_features)
        val = join_captions(store, config.train.val_annotations, [config], "val", "val_annotations").data
    fit(config, train, val, resume, progress)
    return config.train.output


def split_training_data(
    data: CaptionedImages, config: PipelineConfig
) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Split the images of the training store by `val_fraction` and `test_fraction`.

    Returns:
        Training and validation images.

    Raises:
        UserError: the settings contradict each other, or a split would be empty.
    """
    from gridcap.train.data.assignment import group_by_prefix, split_images

    settings, separator = config.train, config.data.group_prefix
    if separator is not None:
        data = replace(data, groups=[group_by_prefix(name, separator) for name in data.file_names()])
    val, test = settings.val_fraction or 0.0, settings.test_fraction or 0.0
    if settings.val_features is not None:
        raise UserError("--val-fraction and --test-fraction: not with --val-features", "use one of the two")
    if val + test >= 1:
        raise UserError(f"--val-fraction {val:g} and --test-fraction {test:g} leave no training images", "lower them")
    if not val:
        reject_validation_settings(settings)
    if separator is not None and config.data.group_column is not None:
        raise UserError("--group-prefix and --group-column exclude each other", "use one of the two")
    splits = split_images(data, val, test, config.seed)
    return splits["train"], splits.get("val")


def reject_validation_settings(settings: TrainConfig) -> None:
    """Raise a UserError for settings that have no effect without a validation store."""
    if settings.val_annotations is not None:
        raise UserError("--val-annotations requires --val-features", "pass both, or neither")
    if settings.patience is not None:
        raise UserError("--patience requires a validation store", "pass --val-features, or omit --patience")


def scst_output(config: PipelineConfig) -> Path:
    """Return the folder of the run that `with_scst` describes."""
    return config.train.output.with_name(f"{config.train.output.name}-scst")


def with_scst(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration that continues a run with the recipe scst, in a folder next to it."""
    run, output = config.train.output, scst_output(config)
    kept = {key: getattr(config.train, key) for key in RUN_SETTINGS}
    recipe = yaml.safe_load(read_recipe("scst"))["train"]
    recipe["scst"] |= config.train.scst.changed_settings()
    changes = {"init_from": run, "output": output}
    scst = config.model_copy(update={"train": TrainConfig.model_validate(kept | recipe | changes)})
    return with_decoder_of(scst, run, None)


def with_decoder_of(config: PipelineConfig, source: Path, recipe: str | None) -> PipelineConfig:
    """Return the configuration with the decoder, tokenizer, vocabulary, and maximum length of another run.

    Raises:
        CheckpointError: there is no checkpoint in `source`.
        ConfigError: the recipe has another decoder.
    """
    from gridcap.train.engine.checkpoint import load_checkpoint

    saved = load_checkpoint(source).config.train
    default = DECODER_CONFIGS[TrainConfig().decoder.family]()
    if recipe is not None and config.train.decoder not in (default, saved.decoder):
        raise ConfigError(
            f"--init-from {source} and --recipe {recipe} have different decoders",
            "omit one of the two, or use a recipe that does not set the decoder",
        )
    changes = {
        "decoder": saved.decoder,
        "vocabulary": saved.vocabulary,
        "tokenizer": saved.tokenizer,
        "max_length": saved.max_length,
    }
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
