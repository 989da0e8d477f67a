"""What the commands of stage two are given: a store with its captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from gridcap.common.captions.split import captions_only, load_split
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError
from gridcap.common.store.reader import FeatureStore
from gridcap.train.data.captioned import CaptionedImages


@dataclass(frozen=True)
class Joined:
    """A store with its captions.

    Attributes:
        data: the images that have both.
        source: where the captions are from.
        notes: what could not be used of that file, a line each.
    """

    data: CaptionedImages
    source: Path
    notes: list[str]


def join_captions(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> Joined:
    """Join a store with its captions.

    Args:
        store: the grids.
        annotations: the captions file; None looks for the store's split, then for `role`, in the configurations.
        configs: configurations that may know the split's captions, the first that does serves.
        role: the split's usual name, for a store without one.
        option: the flag that gives the file, for messages.

    Raises:
        UserError: no captions known.
        MismatchError: store and captions have no image in common.
    """
    if annotations is not None:
        name, split = store.split or role, captions_only(annotations)
        config = configs[0]
    else:
        known = (
            (name, config.data.splits[name], config)
            for name in (store.split, role)
            for config in configs
            if name in config.data.splits and config.data.splits[name].annotations is not None
        )
        found = next(known, None)
        if found is None:
            raise UserError(
                f"{store.path}: no captions known for its split {store.split!r}",
                f"give {option} FILE, or write data.splits.{store.split or role}.annotations into pipeline.yaml",
            )
        name, split, config = found
    whole = split.model_copy(update={"limit": None, "skip": 0})  # the store already is the subset
    loaded = load_split(whole, name, config.seed, config.data.max_invalid)
    source = split.annotations or split.images
    return Joined(CaptionedImages.join(store, loaded.records, source), source, loaded.problems.lines())


def captions_for(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> CaptionedImages:
    """`join_captions`, and say on the screen what was found."""
    joined = join_captions(store, annotations, configs, role, option)
    for line in joined.notes:
        click.echo(f"note: {joined.source}: {line}", err=True)
    data = joined.data
    left_out = "".join(f", {n} images {why}" for why, n in data.left_out.items())
    count = sum(map(len, data.captions))
    click.echo(f"{store.path}: {len(data)} images, {count} captions from {joined.source}{left_out}")
    return data


def warn_if_random(store: FeatureStore) -> None:
    """Say on the screen that the grids come from an encoder that was never trained."""
    if store.provenance.get("weights", {}).get("random"):
        click.secho(
            f"WARNING: {store.path} was made with random encoder weights: fine for a demo, not for real captions.",
            fg="yellow",
            err=True,
        )
