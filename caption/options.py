"""Options and checks shared by the commands that caption photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gridcap.common.command import show_config
from gridcap.common.config import PipelineConfig

if TYPE_CHECKING:
    from gridcap.caption.captioner import Captioner

weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="weights file of the encoder; required if the features came from a local weights file",
)


def warn_if_random(captioners: Sequence[Captioner]) -> None:
    """Print a warning if a decoder was trained on features of a randomly initialized encoder."""
    if any(captioner.provenance["weights"]["random"] for captioner in captioners):
        click.secho(
            "WARNING: the decoder was trained on features of random encoder weights; its captions of photos are "
            "meaningless.",
            fg="yellow",
            err=True,
        )


def show_dry_run(config: PipelineConfig, checkpoints: Sequence[Path], action: str) -> None:
    """Print the configuration and what the command would do; `{}` in `action` is replaced by the checkpoints."""
    from gridcap.train.engine.checkpoint import find_checkpoint

    show_config(config, "caption", full=True)
    resolved = ", ".join(str(find_checkpoint(path)) for path in checkpoints)
    click.echo(f"dry run: would {action.format(resolved)}")
