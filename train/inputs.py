"""What the commands of stage two are given: a store with its captions."""

from __future__ import annotations

from pathlib import Path

import click

from common.annotations import captions_alone, load_split
from common.config import PipelineConfig
from common.errors import UserError
from common.store import FeatureStore
from train.stream import CaptionedImages


def captions_for(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> CaptionedImages:
    """Join a store with its captions, and say what was found.

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
        name, split = store.split or role, captions_alone(annotations)
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
    loaded = load_split(whole, name, config.seed, config.data.max_bad)
    source = split.annotations or split.images
    for line in loaded.problems.lines():
        click.echo(f"note: {source}: {line}", err=True)
    data = CaptionedImages.join(store, loaded.records, source)
    left_out = "".join(f", {n} images {why}" for why, n in data.left_out.items())
    click.echo(f"{store.path}: {len(data)} images, {sum(map(len, data.captions))} captions from {source}{left_out}")
    return data


def warn_if_random(store: FeatureStore) -> None:
    """Say on the screen that the grids come from an encoder that was never trained."""
    if store.provenance.get("weights", {}).get("random"):
        click.secho(
            f"WARNING: {store.path} was made with random encoder weights: fine for a demo, not for real captions.",
            fg="yellow", err=True,
        )  # fmt: skip
