"""What the commands that caption photos share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gridcap.caption.captioner import Captioner

weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="The encoder's weights file, when the features came from a local one; else found by the checkpoint.",
)


def warn_if_random(captioners: Sequence[Captioner]) -> None:
    """Say on the screen that a decoder was trained on features of an encoder that never was."""
    if any(captioner.provenance["weights"]["random"] for captioner in captioners):
        click.secho(
            "WARNING: this decoder was trained on random encoder weights: its captions mean nothing for photos.",
            fg="yellow",
            err=True,
        )
