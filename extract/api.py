"""Feature extraction as a function, for use from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gridcap.common.captions.split import split_images
from gridcap.common.config import SplitConfig, build_config
from gridcap.common.errors import UserError
from gridcap.common.sources.registry import open_source


def extract_features(
    images: str | Path,
    output: str | Path,
    annotations: str | Path | None = None,
    *,
    limit: int | None = None,
    skip: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Extract the feature grid of every image with a frozen encoder, like the command ``gridcap extract``.

    An interrupted extraction resumes when the function is called again with the same arguments. If the store is
    complete, nothing is computed. Invalid images keep their row and are marked in ``FeatureStore(output).valid``.

    Example:
        >>> extract_features("photos", "features/photos.h5", encoder="resnet50", device="cuda")
        PosixPath('features/photos.h5')

    Args:
        images: folder, list (.txt, .csv), .zip, .tar, or .parquet file of the images, or URL of one of them.
        output: index file of the store, ending in ``.h5``; the shards are in a folder of the same name.
        annotations: captions file that lists the images; None: all images in the folder.
        limit: use a seeded random subset of this many images.
        skip: leave out this many images of the same random order first.
        progress: show a progress bar.
        settings: keys of the section ``extract`` (``encoder``, ``weights``, ``dtype``, ``batch_size``, ...), and
            ``seed``, ``max_invalid``, and ``follow_links``. The file pipeline.yaml is not read.

    Returns:
        The index file, which ``FeatureStore`` opens.

    Raises:
        UserError: an invalid setting.
        PathError: there is no such folder or file of images.
        AnnotationError: the captions file cannot be used.
        MismatchError: the store at `output` was started with other images or settings.
        ExtractionError: too many images are invalid, or there is not enough disk space.
        WeightsError: the weights of the encoder are not available.
    """
    from gridcap.extract.job import ExtractionRequest, prepare
    from gridcap.extract.run import extract_features as run_extraction

    images, output = Path(images), Path(output)
    if output.suffix != ".h5":
        raise UserError(f"output {output}: the index file must end in .h5", f"use {output.with_suffix('.h5')}")
    open_source(images)  # raises an error before anything is written
    config = build_config("extract", settings)
    captions = None if annotations is None else Path(annotations)
    split = SplitConfig(images=images, annotations=captions, limit=limit, skip=skip)
    data = config.data.model_copy(update={"splits": {output.stem: split}})
    config = config.model_copy(update={"data": data})
    records, _ = split_images(split, output.stem, data, config.seed)
    request = ExtractionRequest(config, output.stem, records, images, output, replace_empty=True)
    run_extraction(prepare(request), show_progress=progress)
    return output
