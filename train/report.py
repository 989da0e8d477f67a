"""An evaluation as a page that people can look at: `evaluate-decoder --report`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError
from gridcap.common.image import InvalidImageError, image_path, load_view
from gridcap.common.progress import progress_bar
from gridcap.common.report.page import LONGEST, ReportImage, describe_encoder, write_report
from gridcap.common.store.reader import FeatureStore
from gridcap.train.engine.checkpoint import Checkpoint
from gridcap.train.evaluate import Evaluation

MOST = 1000  # images in a report: some 25 MB
_ENDS = 100  # of these, the best and the worst
_FIRST = "CIDEr"  # the score that is shown and sorted by


def find_images(store: FeatureStore, images: Path | None, configs: Sequence[PipelineConfig]) -> Path:
    """The folder of a store's images: the one given, or that of its split in a configuration.

    Raises:
        UserError: none known, or it holds none of the images.
    """
    known = [config.data.splits[store.split].images for config in configs if store.split in config.data.splits]
    if images is None and not known:
        raise UserError(
            f"--report: the image folder of {store.path} is not known",
            "give --images FOLDER: the one that the features were extracted from",
        )
    folder = images or next((path for path in known if path.is_dir()), known[0])
    if not any((folder / name).is_file() for name in store.file_names):
        raise UserError(
            f"--report: {folder} holds no image of {store.path}, not even {store.file_names[0]}",
            "give --images FOLDER: the one that the features were extracted from",
        )
    return folder


def write_evaluation_report(
    path: Path,
    result: Evaluation,
    checkpoint: Checkpoint,
    store: FeatureStore,
    images: Path,
    facts: Mapping[str, str],
    curves: Path,
    seed: int,
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        result: with the looks kept.
        checkpoint: that made it.
        store: the grids it was made from.
        images: folder of the photos.
        facts: shown at the head, before those of the decoder.
        curves: picture of the training, if there is one.
        seed: of which images are shown, if there are too many.
    """
    shown = choose(result, seed)
    said = {**facts, "decoder": _decoder(checkpoint), "encoder": describe_encoder(store.provenance)}
    if len(shown) < len(result.captions):
        said["shown"] = (
            f"{len(shown)} of {len(result.captions)} images: the {_ENDS} best, the {_ENDS} worst, the rest by chance"
        )
    title = f"{checkpoint.path.parent.parent.name} on {store.split or store.path.stem}"
    write_report(path, title, said, result.scores.values, _images(result, store, images, shown), curves)


def choose(result: Evaluation, seed: int) -> list[int]:
    """The image ids to show, in their order: all, or the best, the worst and some by chance."""
    ids = [*result.captions]
    if len(ids) <= MOST:
        return ids
    ranked = sorted(ids, key=lambda i: result.scores.per_image[i][_FIRST])
    ends = {*ranked[:_ENDS], *ranked[-_ENDS:]}
    rest = random.Random(seed).sample([i for i in ids if i not in ends], MOST - len(ends))
    chosen = ends | {*rest}
    return [i for i in ids if i in chosen]


def _images(result: Evaluation, store: FeatureStore, folder: Path, shown: Sequence[int]) -> Iterator[ReportImage]:
    preprocessing = store.provenance.get("preprocessing", {})
    side, resize_mode = preprocessing.get("side", LONGEST), preprocessing.get("resize_mode", "stretch")
    rows, columns = store.grid_shape[:2] if len(store.grid_shape) == 3 else (1, 1)
    for i in progress_bar(shown, unit="image", desc="report", leave=False):
        try:
            path = image_path(folder, result.file_names[i], follow_links=True)
            picture: np.ndarray | str = load_view(path, side, resize_mode, LONGEST)
        except InvalidImageError as error:
            picture = str(error)
        words, attention = result.looks[i]
        scores = result.scores.per_image[i]
        yield ReportImage(
            result.file_names[i],
            picture,
            result.captions[i],
            words,
            None if attention is None else attention.reshape(-1, rows, columns),
            result.references[i],
            {_FIRST: scores[_FIRST], **scores},
        )


def _decoder(checkpoint: Checkpoint) -> str:
    """Family and sizes, in words."""
    tree = checkpoint.config.train.decoder.model_dump(mode="json")
    family = tree.pop("family")
    return ", ".join([family, *(f"{key.replace('_', ' ')} {value}" for key, value in tree.items() if value)])
