"""Training settings that follow from the size of the training data, unless they are given.

They are the best found on 600 to 5,000 images (docs/recipes.md). For more images, the batch grows, so that the number
of steps stays about the same up to 32,000 images.
"""

from __future__ import annotations

from pydantic import PositiveInt

from gridcap.common.config.train import TrainConfig, VocabularyConfig
from gridcap.common.text import plural

_IMAGES_OVER_ALL_EPOCHS = 60_000
_EPOCHS = (12, 40)
_BATCH_SIZES = (10, 64)
_IMAGES_PER_BATCH_IMAGE = 500
_MIN_COUNTS = ((1_000, 1), (5_000, 2), (100_000, 3))  # (captions, minimum count for fewer captions)
_LARGEST_MIN_COUNT = 5  # as in the literature on COCO


class AdaptedVocabularyConfig(VocabularyConfig):
    """Vocabulary settings without open values."""

    min_count: PositiveInt


class AdaptedTrainConfig(TrainConfig):
    """Training settings without open values."""

    epochs: PositiveInt
    batch_size: PositiveInt
    vocabulary: AdaptedVocabularyConfig


def default_epochs(images: int) -> int:
    """Return 60,000 divided by the number of images, from 12 to 40."""
    return max(_EPOCHS[0], min(_EPOCHS[1], round(_IMAGES_OVER_ALL_EPOCHS / images)))


def default_batch_size(images: int) -> int:
    """Return the number of images divided by 500, from 10 to 64."""
    return max(_BATCH_SIZES[0], min(_BATCH_SIZES[1], images // _IMAGES_PER_BATCH_IMAGE))


def default_min_count(captions: int) -> int:
    """Return 1, 2, or 3 with fewer than 1,000, 5,000, or 100,000 captions, and 5 with more."""
    return next((count for limit, count in _MIN_COUNTS if captions < limit), _LARGEST_MIN_COUNT)


def adapt(settings: TrainConfig, images: int, captions: int) -> AdaptedTrainConfig:
    """Return the settings with all open values chosen.

    Args:
        settings: training settings.
        images: number of training images.
        captions: number of training captions.
    """
    if isinstance(settings, AdaptedTrainConfig):
        return settings
    values = {name: getattr(settings, name) for name in TrainConfig.model_fields}
    vocabulary = {name: getattr(settings.vocabulary, name) for name in VocabularyConfig.model_fields}
    if values["epochs"] is None:
        values["epochs"] = default_epochs(images)
    if values["batch_size"] is None:
        values["batch_size"] = default_batch_size(images)
    if vocabulary["min_count"] is None:
        vocabulary["min_count"] = default_min_count(captions)
    return AdaptedTrainConfig(**values | {"vocabulary": AdaptedVocabularyConfig(**vocabulary)})


def describe_choice(settings: TrainConfig, images: int, captions: int) -> str | None:
    """Return a line that names the values that `adapt` chooses; None if it chooses none."""
    chosen = chosen_settings(settings, adapt(settings, images, captions))
    if not chosen:
        return None
    values = ", ".join(f"{key} {value}" for key, value in chosen.items())
    data = f"{plural(images, 'image')} and {plural(captions, 'caption')}"
    return f"chosen for {data}: {values} (override with --set train.KEY=VALUE)"


def chosen_settings(before: TrainConfig, after: AdaptedTrainConfig) -> dict[str, int]:
    """Return key -> value of the settings that `adapt` chose."""
    chosen = {name: getattr(after, name) for name in ("epochs", "batch_size") if getattr(before, name) is None}
    if before.vocabulary.min_count is None:
        chosen["vocabulary.min_count"] = after.vocabulary.min_count
    return chosen
