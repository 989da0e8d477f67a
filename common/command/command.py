"""Declaration of commands: shared options, configuration, error reporting, and help."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gridcap.common.command.failures import check_utf8_locale, explain
from gridcap.common.command.options import ConfigFlag
from gridcap.common.command.settings import GivenSettings, check_settings_are_used, remember_settings
from gridcap.common.command.signals import exit_status_of, stop_signals_as_interrupts
from gridcap.common.command.suggest import suggest_flags
from gridcap.common.config import PipelineConfig, load_config
from gridcap.common.config.keys import Decoders
from gridcap.common.errors import EXIT_FAILURE
from gridcap.common.process import tune_process

# Entry point -> the same command as a subcommand of the gridcap group.
SUBCOMMANDS = {
    "extract-features": "gridcap extract",
    "train-decoder": "gridcap train",
    "evaluate-decoder": "gridcap evaluate",
    "caption-images": "gridcap caption",
}


def as_invoked(text: str) -> str:
    """Return a text with the names of commands as the user types them: "gridcap train" under the gridcap group."""
    context = click.get_current_context(silent=True)
    if context is None or context.find_root().info_name != "gridcap":
        return text
    return re.sub(rf"(?<![\w/.-])({'|'.join(SUBCOMMANDS)})(?![\w/-])", lambda m: SUBCOMMANDS[m[1]], text)


def reword_help_option(option: click.Option | None) -> click.Option | None:
    """Give click's --help option a help text in the style of the other options: lower case, no period."""
    if option is not None:
        option.help = "show this message and exit"
    return option


class PipelineCommand(click.Command):
    """A command that reports errors as a message and a hint, and shows the traceback only with --debug."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line. An unknown flag is reported with the flags that may be meant."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)]
            suggestions = " or ".join(suggest_flags(error.option_name, known))
            question = f"; did you mean {suggestions}?" if suggestions else ""
            raise click.UsageError(f"no such option: {error.option_name}{question}", ctx) from None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the --help option, with a help text in the style of the other options."""
        return reword_help_option(super().get_help_option(ctx))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and convert exceptions into messages and exit statuses."""
        try:
            with stop_signals_as_interrupts():
                check_utf8_locale()
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise  # click ends the command silently if the reader of the output has exited
        except KeyboardInterrupt as error:
            resumable = any(param.name == "resume" for param in self.params)
            again = "rerun the command with --resume to continue" if resumable else "rerun the command"
            click.echo(f"\ninterrupted; {again}", err=True)
            ctx.exit(exit_status_of(error))
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            reported = explain(error)
            click.echo(as_invoked(f"error: {reported.message}\n  what to do: {reported.hint}"), err=True)
            ctx.exit(reported.exit_status)
        return EXIT_FAILURE

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, with the names of commands as invoked."""
        text = self.help
        self.help = as_invoked(text or "")
        super().format_help_text(ctx, formatter)
        self.help = text

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one per line."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in as_invoked(self.epilog).strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


@dataclass(frozen=True)
class Uses:
    """The configuration keys that a command uses.

    Args:
        keys: sections such as "train", or single keys such as "train.device". Other keys are usage errors in --set.
        example: KEY=VALUE, shown in the help of --set.
    """

    keys: Sequence[str]
    example: str


CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
NO_SETTINGS = Uses((), "")  # the command has neither --config nor --set
ALL_SETTINGS = Uses(tuple(PipelineConfig.model_fields), "train.max_grad_norm=1")


def pipeline_command(
    name: str,
    examples: str,
    own_keys: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    own_recipe: Callable[[dict[str, Any]], str | None] | None = None,
    uses: Uses = ALL_SETTINGS,
    decoders: Decoders | None = None,
) -> Callable[[Callable[..., Any]], PipelineCommand]:
    """Return a decorator that declares a command.

    The function gets ``config``, ``dry_run``, and the command's options that are not ConfigFlags.

    Args:
        name: name of the command.
        examples: lines for the end of the help.
        own_keys: maps the values of the command's options to the configuration keys that they set.
        own_recipe: maps the values of the command's options to the recipe that overrides the file.
        uses: the configuration keys that the command uses.
        decoders: as for `load_config`, for a command that trains a decoder.
    """

    def decorate(function: Callable[..., Any]) -> PipelineCommand:
        def run(config_path: Path | None = None, sets: tuple[str, ...] = (), **values: Any) -> Any:
            del values["debug"]  # PipelineCommand reads it from the context
            tune_process(values.pop("threads"))
            settings = _take_settings(values, sets, own_keys)
            check_settings_are_used(settings, uses.keys)
            recipe = None if own_recipe is None else own_recipe(values)
            if uses is NO_SETTINGS:
                return function(config=PipelineConfig(), **values)
            config = load_config(config_path, settings.flags, sets, recipe, settings.origins, decoders)
            return function(config=config, **values)

        run.__doc__ = function.__doc__
        run.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        decorated: Any = run
        for decorator in _shared_options(name, uses):
            decorated = decorator(decorated)
        command = click.command(name, cls=PipelineCommand, epilog=examples, context_settings=CONTEXT_SETTINGS)
        return command(decorated)

    return decorate


def _take_settings(
    values: dict[str, Any], sets: Sequence[str], own_keys: Callable[[dict[str, Any]], dict[str, Any]] | None
) -> GivenSettings:
    """Remove the values of ConfigFlags from the options and attach them to the running command."""
    flags, origins = {}, {}
    for param in click.get_current_context().command.params:
        if isinstance(param, ConfigFlag) and param.name and (value := values.pop(param.name)) is not None:
            flags[param.key], origins[param.key] = value, param.opts[0]
    if own_keys is not None:
        flags |= own_keys(values)
    settings = GivenSettings(flags, sets, origins)
    remember_settings(settings)
    return settings


def _shared_options(name: str, uses: Uses) -> list[Callable[[Any], Any]]:
    """Return the decorators of the options that all commands share, the last one first."""
    options = [
        click.version_option(
            None, "--version", package_name="gridcap", prog_name=name, help="show the version and exit"
        ),
        click.option("--debug", is_flag=True, help="show the traceback of an error"),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="CPU threads (default: one per available core that is not busy)",
        ),
        click.option("--dry-run", is_flag=True, help="show the full configuration and the plan, then exit"),
    ]
    if uses is not NO_SETTINGS:
        config_help = "YAML file with the configuration; flags override it  [default: pipeline.yaml if it exists]"
        options += [
            click.option(
                "--set", "sets", multiple=True, metavar="KEY=VALUE", help=f"set any key, for example {uses.example}"
            ),
            click.option("--config", "config_path", type=click.Path(path_type=Path), help=config_help),
        ]
    return options


def show_config(config: PipelineConfig, *sections: str, full: bool = False) -> None:
    """Print the settings of the sections that a command uses.

    Args:
        config: the resolved configuration.
        sections: names of sections.
        full: print every setting as YAML (for --dry-run), not only those that differ from the defaults.
    """
    if full:
        click.echo("configuration")
        click.echo("\n".join(f"  {line}" for line in config.to_yaml(*sections).splitlines()))
    else:
        click.echo(f"configuration: {summarize_settings(config.changed_settings(*sections))}")


MAX_SUMMARY = 220  # characters: two lines of a terminal


def summarize_settings(changed: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults as one text of at most about two lines."""
    if not changed:
        return "all defaults"
    parts = [f"{key}={value}" for key, value in changed.items()]
    shown = 1
    while shown < len(parts) and len(", ".join(parts[: shown + 1])) <= MAX_SUMMARY:
        shown += 1
    hidden = len(parts) - shown
    return ", ".join(parts[:shown]) + (f", and {hidden} more (--dry-run shows all)" if hidden else "")
