"""Settings of the dataset: splits, captions files, and the folder of the feature stores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from gridcap.common.config.section import Section


class SplitConfig(Section):
    """Images and captions of one split."""

    images: Path = Field(description="folder, list, zip, tar, or Parquet file with the images, or a URL")
    annotations: Path | None = Field(
        None, description="captions file: COCO or Karpathy JSON, table, JSON Lines, Parquet, ...; see docs/captions.md"
    )
    limit: PositiveInt | None = Field(None, description="use a seeded random subset of this many images")
    skip: int = Field(
        0, ge=0, description="leave out this many images of the same random order first (for disjoint subsets)"
    )


class DataConfig(Section):
    """The dataset: its splits, and the folder of their feature stores."""

    splits: dict[str, SplitConfig] = Field({}, description="name of the split -> its images and captions")
    image_column: str | None = Field(
        None, description="column of a captions file with the file names or ids of the images (default: by its name)"
    )
    caption_column: str | None = Field(
        None, description="column of a captions file with the captions (default: by its name)"
    )
    group_column: str | None = Field(
        None,
        description="column of a captions file whose value near-duplicate images share: a split keeps them together",
    )
    group_prefix: str | None = Field(
        None,
        min_length=1,
        description="separator: file names that agree up to it are near-duplicates (one photographer, one video)",
    )
    features_dir: Path = Field(Path("features"), description="folder of the feature stores <split>.h5")
    max_invalid: str = Field(
        "20%", description="stop if more images or annotations than this are invalid: a count (10) or a share (5%)"
    )
    follow_links: bool = Field(False, description="follow symbolic links that lead out of the image folder")

    @field_validator("max_invalid", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> str:
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", str(value)):
            raise ValueError("must be a count such as 10 or a share such as 5%")
        return str(value)


def max_invalid_count(max_invalid: str, total: int) -> float:
    """Return how many of `total` items may be invalid under a `max_invalid` setting such as "10" or "5%"."""
    return float(max_invalid[:-1]) / 100 * total if max_invalid.endswith("%") else float(max_invalid)
