"""Options of commands: flags for configuration keys, and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from gridcap.common.config import describe_key


class ConfigFlag(click.Option):
    """A flag that sets one configuration key."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


def flag(name: str, key: str) -> Callable[[Any], Any]:
    """Return a decorator that adds a flag for a configuration key. Its help, type, and default come from the key."""
    field = describe_key(key)
    description = (field.description or "").partition("  [")[0]
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(default)
    default_text = f"; default: {default}" if default is not None and default is not PydanticUndefined else ""
    help_text = f"{description}  [{key}{default_text}]"
    option = name.removeprefix("--").replace("-", "_")
    types = _plain_types(field.annotation)
    if bool in types:  # --name and --no-name: the flag can override the file either way
        switch = f"{name}/--no-{name.removeprefix('--')}"
        return click.option(switch, option, cls=ConfigFlag, key=key, default=None, help=help_text)
    kind: Any
    if get_origin(field.annotation) is Literal:
        kind = click.Choice(list(get_args(field.annotation)))
    elif Path in types:
        kind = click.Path(path_type=Path)
    else:
        kind = next((t for t in (int, float) if t in types), str)
    return click.option(name, option, cls=ConfigFlag, key=key, type=kind, help=help_text)


def _plain_types(annotation: Any) -> set[Any]:
    """Return the types of a union without their constraints: ``PositiveInt | None`` -> {int, NoneType}."""
    members = get_args(annotation) or (annotation,)
    return {get_args(t)[0] if get_origin(t) is Annotated else t for t in members}


def subset_options(function: Any) -> Any:
    """Add the options that choose a subset of the images: --limit, --skip, and --seed.

    The function gets ``limit: int | None`` and ``skip: int | None``; the seed is the configuration key ``seed``.
    """
    limit = click.option(
        "--limit",
        type=click.IntRange(min=1),
        help="use a seeded random subset of this many images  [data.splits.<split>.limit]",
    )
    skip = click.option(
        "--skip",
        type=click.IntRange(min=0),
        help="leave out this many images of the same random order first  [data.splits.<split>.skip]",
    )
    return limit(skip(flag("--seed", "seed")(function)))
