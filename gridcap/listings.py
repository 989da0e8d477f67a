"""The subcommands ``gridcap recipes`` and ``gridcap encoders``, which list built-in recipes and encoders."""

from __future__ import annotations

import click

from gridcap.common.command import CONTEXT_SETTINGS, PipelineCommand
from gridcap.common.config import read_recipe, recipe_names
from gridcap.common.errors import UserError
from gridcap.extract.encoders.registry import encoder_names, find_encoder
from gridcap.extract.encoders.specs import CNNS

RECIPE_EXAMPLES = """
gridcap recipes
gridcap recipes top-down > mine.yaml               (a copy to edit, used as train-decoder --recipe mine.yaml)
"""
ENCODER_EXAMPLES = """
gridcap encoders
gridcap encoders "resnet*"
gridcap encoders "timm/*dinov2*"
"""
MAX_DETAILED = 50


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

    PATTERN is a shell-style pattern such as "resnet*" or "timm/*dinov2*". A name is used as
    extract-features --encoder NAME.
    """
    names = list(encoder_names(pattern))
    if not names:
        raise UserError(f"{pattern}: no such encoder", "run gridcap encoders without a pattern to list all of them")
    width = max(len("encoder"), *map(len, names))
    detailed = len(names) <= MAX_DETAILED  # the shape of a grid takes a model without weights and a forward pass
    click.echo(f"{'encoder':<{width}}  {'grid':<14}  input" if detailed else "encoder")
    for name in names:
        click.echo(f"{name:<{width}}  {_describe(name)}" if detailed else name)
    if pattern == "*":
        click.echo("timm/NAME: any model of timm (pip install 'gridcap[timm]'); gridcap encoders 'timm/*' lists them")
    if not detailed:
        click.echo(f"{len(names):,} encoders; for grids and input sizes, match at most {MAX_DETAILED}")


def _describe(name: str) -> str:
    """Return the shape of the grid and the input size; for torchvision's CNNs without loading torch."""
    try:
        spec = CNNS.get(name) or find_encoder(name).spec
    except UserError as error:
        return error.message.partition(": ")[2]
    return f"{' x '.join(map(str, spec.grid_shape)):<14}  {spec.side} x {spec.side}"
