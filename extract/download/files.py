"""The captions files and single images of a dataset, and its pipeline.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from gridcap.common.captions.split import load_split
from gridcap.common.config import load_config
from gridcap.common.download import download_lock, fetch_unverified
from gridcap.common.errors import AnnotationError, DownloadError
from gridcap.common.files import write_text
from gridcap.extract.download.datasets import Dataset
from gridcap.extract.download.images import download_images

HEADER = "# Written by gridcap download, which replaces it. Paths are relative to the current folder.\n"


def download_annotations(dataset: Dataset, output: Path, mirror: str | None) -> None:
    """Download the captions files that are not in archives.

    Raises:
        DownloadError: as for `fetch`, or the file is not valid JSON.
    """
    for name, url in dataset.annotation_files.items():
        file = output / name
        if not file.exists():
            with download_lock(file):
                fetch_unverified(_on_mirror(url, mirror), file, _check_json)


def _check_json(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise DownloadError(
            f"{file}: the server did not send valid JSON", "check --mirror, or try again later"
        ) from error


def write_pipeline(dataset: Dataset, output: Path, limit: int | None) -> Path:
    """Write the pipeline.yaml of a dataset: its splits, with paths, and a folder for its features.

    Args:
        dataset: the dataset.
        output: its folder.
        limit: limit of splits that have none of their own.
    """
    splits: dict[str, dict[str, Any]] = {}
    for name, files in dataset.splits.items():
        subset = {"limit": files.limit or limit, "skip": files.skip or None}
        splits[name] = {
            "images": (output / files.images).as_posix(),
            "annotations": (output / files.annotations).as_posix(),
            **{key: value for key, value in subset.items() if value is not None},
        }
    tree = {"data": {"features_dir": f"features/{dataset.name}", "splits": splits}}
    pipeline = output / "pipeline.yaml"
    write_text(pipeline, HEADER + yaml.safe_dump(tree, sort_keys=False))
    return pipeline


def download_split_images(
    dataset: Dataset, pipeline: Path, output: Path, mirror: str | None, seed: int
) -> tuple[int, dict[Path, str]]:
    """Download the images of all splits of a dataset, which its captions files select, one by one.

    Args:
        dataset: the dataset.
        pipeline: its pipeline.yaml.
        output: its folder.
        mirror: address of a mirror, which replaces the host of the images.
        seed: random seed of the subsets, as for extraction.

    Returns:
        The number of new images, and the images that could not be downloaded, with reasons.

    Raises:
        AnnotationError: a captions file is invalid or contains no addresses.
        DownloadError: as for `download_images`.
    """
    splits = load_config(pipeline).data.splits
    images: dict[Path, str] = {}
    for name in dataset.splits:
        split = splits[name]
        assert split.annotations is not None
        urls = None if dataset.image_server else image_urls(split.annotations)
        for record in load_split(split, name, seed).records:
            if urls is None:
                url = f"{mirror or dataset.image_server}/{record.file_name}"
            elif record.file_name in urls:
                url = _on_mirror(urls[record.file_name], mirror)
            else:
                raise AnnotationError(f"{split.annotations}: {record.file_name} has no coco_url", "delete it and rerun")
            images[split.images / record.file_name] = url
    existing = sum(file.exists() for file in images)
    failed = download_images(images)
    return len(images) - existing - len(failed), failed


def image_urls(annotations: Path) -> dict[str, str]:
    """Return the address of each image in a COCO captions file: file name -> coco_url."""
    images = json.loads(annotations.read_bytes())["images"]
    return {image["file_name"]: image["coco_url"] for image in images if image.get("coco_url")}


def _on_mirror(url: str, mirror: str | None) -> str:
    return url if mirror is None else mirror.rstrip("/") + urlsplit(url).path
