"""The HTML report of an evaluation: `evaluate-decoder --report`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError
from gridcap.common.image import InvalidImageError, image_path, load_view
from gridcap.common.progress import progress_bar
from gridcap.common.report.images import MAX_SIDE, ReportImage
from gridcap.common.report.page import describe_encoder, write_report
from gridcap.common.store.reader import FeatureStore
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.evaluation import Evaluation

MAX_IMAGES = 1000  # about 25 MB
EXTREME_IMAGES = 100  # number of best and of worst images in a report that cannot show all
SORT_METRIC = "CIDEr"  # shown per image, and the sort key


@dataclass(frozen=True)
class ReportContext:
    """Contents of a report besides the captions.

    Attributes:
        images: folder of the images.
        facts: name -> value, shown at the top before the decoder and the encoder.
        curves: PNG file of the training curves; omitted if it does not exist.
        seed: seed of the random selection of images.
    """

    images: Path
    facts: Mapping[str, str]
    curves: Path
    seed: int


def find_images(store: FeatureStore, images: Path | None, configs: Sequence[PipelineConfig]) -> Path:
    """Return the image folder of a store: the given one, or that of its split in a configuration.

    Raises:
        UserError: the folder is unknown, or contains none of the images.
    """
    configured = [config.data.splits[store.split].images for config in configs if store.split in config.data.splits]
    hint = "pass --images FOLDER, the folder that the features were extracted from"
    if images is None and not configured:
        raise UserError(f"--report: the image folder of {store.path} is not configured", hint)
    folder = images or next((path for path in configured if path.is_dir()), configured[0])
    if not any((folder / name).is_file() for name in store.file_name):
        raise UserError(f"--report: {folder} contains no image of {store.path}, such as {store.file_name[0]}", hint)
    return folder


def write_evaluation_report(
    path: Path, result: Evaluation, checkpoint: Checkpoint, store: FeatureStore, context: ReportContext
) -> None:
    """Write the report of an evaluation.

    Args:
        path: HTML file.
        result: evaluation with `attention`.
        checkpoint: checkpoint that was evaluated.
        store: feature store that was captioned.
        context: images and facts to show.
    """
    selected = select_images(result, context.seed)
    facts = {**context.facts, "decoder": _describe_decoder(checkpoint), "encoder": describe_encoder(store.provenance)}
    if len(selected) < len(result.captions):
        facts["selection"] = (
            f"{len(selected):,} of {len(result.captions):,} images: the {EXTREME_IMAGES} best, the {EXTREME_IMAGES} "
            "worst, and a random sample of the rest"
        )
    title = f"{checkpoint.path.parent.parent.name} on {store.split or store.path.stem}"
    images = _report_images(result, store, context.images, selected)
    write_report(path, title, facts, result.scores.values, images, context.curves)


def select_images(result: Evaluation, seed: int) -> list[int]:
    """Return the ids of the images to show, in data set order: all, or the best, the worst, and a random sample."""
    ids = [*result.captions]
    if len(ids) <= MAX_IMAGES:
        return ids
    ranked = sorted(ids, key=lambda i: result.scores.per_image[i][SORT_METRIC])
    extremes = {*ranked[:EXTREME_IMAGES], *ranked[-EXTREME_IMAGES:]}
    rest = random.Random(seed).sample([i for i in ids if i not in extremes], MAX_IMAGES - len(extremes))
    selected = extremes | {*rest}
    return [i for i in ids if i in selected]


def _report_images(
    result: Evaluation, store: FeatureStore, folder: Path, selected: Sequence[int]
) -> Iterator[ReportImage]:
    preprocessing = store.provenance.get("preprocessing", {})
    side, resize_mode = preprocessing.get("side", MAX_SIDE), preprocessing.get("resize_mode", "stretch")
    rows, columns = store.grid_shape[:2] if len(store.grid_shape) == 3 else (1, 1)
    for i in progress_bar(selected, unit="image", desc="report", leave=False):
        try:
            path = image_path(folder, result.file_names[i], follow_links=True)
            picture: np.ndarray | str = load_view(path, side, resize_mode, MAX_SIDE)
        except InvalidImageError as error:
            picture = str(error)
        tokens, attention = result.attention[i]
        scores = result.scores.per_image[i]
        yield ReportImage(
            result.file_names[i],
            picture,
            result.captions[i],
            tokens,
            None if attention is None else attention.reshape(-1, rows, columns),
            result.references[i],
            {SORT_METRIC: scores[SORT_METRIC], **scores},
        )


def _describe_decoder(checkpoint: Checkpoint) -> str:
    """Return the family and sizes of the decoder, such as "attention, embed size 512, cell lstm"."""
    tree = checkpoint.config.train.decoder.model_dump(mode="json")
    family = tree.pop("family")
    return ", ".join([family, *(f"{key.replace('_', ' ')} {value}" for key, value in tree.items() if value)])
