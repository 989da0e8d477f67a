"""The data set: splits, captions files, where features go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from gridcap.common.config.section import Section


class SplitConfig(Section):
    """Where one split's images and captions are."""

    images: Path = Field(description="folder with the images")
    annotations: Path | None = Field(
        None, description="captions file: COCO JSON, Karpathy's dataset_coco.json, or CSV image,caption"
    )
    limit: PositiveInt | None = Field(None, description="take a seeded random subset of this many images")
    skip: int = Field(
        0, ge=0, description="leave out this many images of the same random order first: disjoint subsets of one file"
    )


class DataConfig(Section):
    """The data set: its splits and where their features go."""

    splits: dict[str, SplitConfig] = Field({}, description="name of the split -> its images and captions")
    features_dir: Path = Field(Path("features"), description="folder of the feature stores, <split>.h5 each")
    max_invalid: str = Field(
        "20%", description="stop when more than this many images or annotations are bad: a number, or a share as 5%"
    )
    follow_links: bool = Field(
        False, description="read images through links that lead out of their folder, as in a folder of links"
    )

    @field_validator("max_invalid", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> str:
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", str(value)):
            raise ValueError("must be a number of items like 10, or a share like 5%")
        return str(value)


def max_invalid_count(max_invalid: str, total: int) -> float:
    """How many of `total` items may be bad under a `max_invalid` setting like "10" or "5%"."""
    return float(max_invalid[:-1]) / 100 * total if max_invalid.endswith("%") else float(max_invalid)
