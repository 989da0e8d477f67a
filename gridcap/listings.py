"""The subcommands ``gridcap recipes`` and ``gridcap encoders``, which list built-in recipes and encoders."""

from __future__ import annotations

import click

from gridcap.common.command import CONTEXT_SETTINGS, PipelineCommand
from gridcap.common.config import read_recipe, recipe_names
from gridcap.common.errors import UserError
from gridcap.extract.encoders.specs import list_encoders

RECIPE_EXAMPLES = """
gridcap recipes
gridcap recipes top-down > mine.yaml               (a copy to edit, used as train-decoder --recipe mine.yaml)
"""
ENCODER_EXAMPLES = """
gridcap encoders
gridcap encoders "resnet*"
"""


@click.command("recipes", cls=PipelineCommand, epilog=RECIPE_EXAMPLES, context_settings=CONTEXT_SETTINGS)
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the built-in recipes, or print one.

    A recipe is a decoder and its training settings: train-decoder --recipe NAME.
    """
    if name is not None:
        click.echo(read_recipe(name), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names))
    for recipe in names:
        description = read_recipe(recipe).partition("\n")[0].removeprefix("# ")
        click.echo(f"{recipe:<{width}}  {description}")


@click.command("encoders", cls=PipelineCommand, epilog=ENCODER_EXAMPLES, context_settings=CONTEXT_SETTINGS)
@click.argument("pattern", default="*")
def encoders(pattern: str) -> None:
    """List the encoders with their grid shapes and input sizes.

    PATTERN is a shell-style pattern such as "resnet*". A name is used as extract-features --encoder NAME.
    """
    specs = list_encoders(pattern)
    if not specs:
        raise UserError(f"{pattern}: no such encoder", "run gridcap encoders without a pattern to list all of them")
    width = max(len("encoder"), *(len(spec.name) for spec in specs))
    click.echo(f"{'encoder':<{width}}  {'grid':<14}  input")
    for spec in specs:
        grid = " x ".join(map(str, spec.grid_shape))
        click.echo(f"{spec.name:<{width}}  {grid:<14}  {spec.side} x {spec.side}")
