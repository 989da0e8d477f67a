"""Inputs of the stage-two commands: a feature store joined with its captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from gridcap.common.captions.split import captions_only, columns_of, load_split
from gridcap.common.command import reject_ignored
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import PathError, UserError
from gridcap.common.store.reader import FeatureStore
from gridcap.common.text import plural
from gridcap.train.data.captioned import CaptionedImages


@dataclass(frozen=True)
class Joined:
    """A feature store joined with its captions.

    Attributes:
        data: images that have both a valid grid and captions.
        source: captions file or folder.
        notes: problems found in the source, one line each.
    """

    data: CaptionedImages
    source: Path
    notes: list[str]


def join_captions(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> Joined:
    """Join a store with its captions.

    Args:
        store: feature store.
        annotations: captions file; None looks up the store's split, then `role`, in the configurations.
        configs: configurations to search for the split; the first that defines its captions is used.
        role: name of the split to use if the configurations do not define the store's own ("train", "val", "test").
        option: flag that names the captions file, for error messages.

    Raises:
        UserError: no captions are configured for the split.
        PathError: the configured captions file does not exist.
        MismatchError: the store and the captions have no image in common.
    """
    if annotations is not None:
        name, split, config = store.split or role, captions_only(annotations), configs[0]
    else:
        candidates = (
            (name, config.data.splits[name], config)
            for name in (store.split, role)
            for config in configs
            if name in config.data.splits and config.data.splits[name].annotations is not None
        )
        match = next(candidates, None)
        if match is None:
            raise UserError(
                f"{store.path}: no captions configured for its split {store.split!r}",
                f"pass {option} FILE, or set data.splits.{store.split or role}.annotations in pipeline.yaml",
            )
        name, split, config = match
        if split.annotations is not None and not split.annotations.exists():
            raise PathError(
                f"{split.annotations}: no such file; it is configured as the captions of split {name!r}",
                f"pass {option} FILE, or run the command in the folder that the path is relative to",
            )
    complete = split.model_copy(update={"limit": None, "skip": 0})  # the store already is the subset
    loaded = load_split(complete, name, config.seed, config.data.max_invalid, columns=columns_of(config.data))
    source = split.annotations or split.images
    return Joined(CaptionedImages.join(store, loaded.records, source), source, loaded.problems.lines())


def captions_for(
    store: FeatureStore, annotations: Path | None, configs: list[PipelineConfig], role: str, option: str
) -> CaptionedImages:
    """Join a store with its captions as `join_captions` does, and print a summary."""
    splits = [f"data.splits.{name}" for config in configs for name in config.data.splits]
    reject_ignored(
        [f"{split}.{key}" for split in splits for key in ("limit", "skip")],
        "after feature extraction",
        "omit it, or extract the features of this subset",
    )
    joined = join_captions(store, annotations, configs, role, option)
    for line in joined.notes:
        click.echo(f"note: {joined.source}: {line}", err=True)
    data = joined.data
    captions = plural(sum(map(len, data.captions)), "caption")
    left_out = "".join(f", {plural(n, 'image')} {why}" for why, n in data.left_out.items())
    click.echo(f"{store.path}: {plural(len(data), 'image')}, {captions} from {joined.source}{left_out}")
    return data


def warn_if_random(store: FeatureStore) -> None:
    """Print a warning if the features were extracted with random encoder weights."""
    if store.provenance.get("weights", {}).get("random"):
        click.secho(
            f"WARNING: {store.path} was extracted with random encoder weights: fine for a demo, not for real captions",
            fg="yellow",
            err=True,
        )
