"""The ``gridcap`` command group. The module of a subcommand is imported when the subcommand is used."""

from __future__ import annotations

import difflib
import importlib

import click

from gridcap.common.command import CONTEXT_SETTINGS, reword_help_option

# Subcommand -> its module and click command, in the order in which users need them.
COMMANDS = {
    "download": "gridcap.extract.download.cli:main",
    "encoders": "gridcap.listings:encoders",
    "extract": "gridcap.extract.cli:main",
    "import": "gridcap.extract.store_cli:import_features",
    "inspect": "gridcap.extract.store_cli:inspect_features",
    "verify": "gridcap.extract.store_cli:verify_features",
    "recipes": "gridcap.listings:recipes",
    "train": "gridcap.train.cli:train_decoder",
    "evaluate": "gridcap.train.evaluate_cli:evaluate_decoder",
    "caption": "gridcap.caption.cli:main",
    "serve": "gridcap.caption.web_cli:main",
}

EPILOG = """\b
Shell completion (bash; use zsh_source or fish_source for other shells):
  eval "$(_GRIDCAP_COMPLETE=bash_source gridcap)"
"""


class LazyGroup(click.Group):
    """A click group that imports the module of a subcommand only when it is used."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the --help option, with a help text in the style of the other options."""
        return reword_help_option(super().get_help_option(ctx))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; suggest one if its name is unknown, as in ``gridcap extract-features``."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            same_start = [command for command in COMMANDS if name.startswith(command) or command.startswith(name)]
            matches = same_start or difflib.get_close_matches(name, COMMANDS, n=1)
            question = f"; did you mean {matches[0]}?" if matches else f" (commands: {', '.join(COMMANDS)})"
            ctx.fail(f"no such command: {name}{question}")
        return super().resolve_command(ctx, args)


@click.group(
    "gridcap",
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.version_option(None, "--version", package_name="gridcap", prog_name="gridcap", help="show the version and exit")
def main() -> None:
    """Train image captioning models on cached features.

    Every command reads pipeline.yaml if it is in the current folder.
    """
