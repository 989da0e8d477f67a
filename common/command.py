"""What every command shares: the configuration flags, `--dry-run`, and how errors are shown.

A command is declared with `@pipeline_command(...)` and `@flag("--batch-size", "extract.batch_size")`; the
flag's help and default come from the configuration itself, so each is written once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import click
from pydantic_core import PydanticUndefined

from gridcap.common.config import PipelineConfig, describe_key, load_config
from gridcap.common.errors import EXIT_FAILURE, EXIT_INTERRUPTED, GridcapError, from_os_error
from gridcap.common.process import tune_process

_LAYERS = "gridcap.layers"  # the flags and --set values of the running command


class ConfigFlag(click.Option):
    """A flag that stands for one key of the configuration."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


class _StoppedError(KeyboardInterrupt):
    """A signal asked the command to stop; it takes the same way out as Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR2 (a scheduler's warnings) end the command as cleanly as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGUSR2):  # another one may not disturb the tidying up
            signal.signal(other, signal.SIG_IGN)
        raise _StoppedError(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PipelineCommand(click.Command):
    """A command that shows a user's errors as two lines, and a traceback only with `--debug`."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _stop_signals():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt as error:
            again = {
                "train-decoder": "run the same command with --resume to go on",
                "extract-features": "run the same command again to go on",
            }.get(str(self.name), "run the same command again")
            click.echo(f"\ninterrupted: nothing is broken; {again}", err=True)
            ctx.exit(128 + error.number if isinstance(error, _StoppedError) else EXIT_INTERRUPTED)
        except BrokenPipeError:
            raise  # the reader of our output has gone: click ends the command quietly
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            if isinstance(error, GridcapError):
                shown = error
            elif isinstance(error, OSError) and error.errno is not None:
                shown = from_os_error(error)
            else:
                hint = "this is a defect in gridcap: run again with --debug and report what it prints"
                shown = GridcapError(f"{type(error).__name__}: {error}", hint)
            click.echo(f"error: {shown.message}\n  what to do: {shown.hint}", err=True)
            ctx.exit(shown.exit_status)
        return EXIT_FAILURE

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, line by line as they are written."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


def flag(name: str, key: str) -> Callable[[Any], Any]:
    """A flag for a key of the configuration; its help, type and default come from there."""
    field = describe_key(key)
    description = (field.description or "").partition("  [")[0]
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(default)
    shown = f"; default: {default}" if default is not None and default is not PydanticUndefined else ""
    # `PositiveInt | None` is Annotated[int, ...] inside a union.
    types = {
        get_args(t)[0] if get_origin(t) is Annotated else t for t in get_args(field.annotation) or (field.annotation,)
    }
    kind: Any
    if get_origin(field.annotation) is Literal:
        kind = click.Choice(list(get_args(field.annotation)))
    elif Path in types:
        kind = click.Path(path_type=Path)
    else:
        kind = next((t for t in (int, float) if t in types), str)
    option = name.removeprefix("--").replace("-", "_")
    help_text = f"{description}  [{key}{shown}]"
    if bool in types:  # --name and --no-name, so that a flag can go over a file either way
        switch = f"{name}/--no-{name.removeprefix('--')}"
        return click.option(switch, option, cls=ConfigFlag, key=key, default=None, help=help_text)
    return click.option(name, option, cls=ConfigFlag, key=key, type=kind, help=help_text)


def pipeline_command(
    name: str,
    examples: str,
    own_keys: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    own_recipe: Callable[[dict[str, Any]], str | None] | None = None,
) -> Callable[[Callable[..., Any]], PipelineCommand]:
    """Declare a command. The function gets `config` and `dry_run`, and its own options that are no ConfigFlag.

    Args:
        name: of the command.
        examples: lines for the end of `--help`.
        own_keys: from the values of the command's own options, keys of the configuration that they set.
        own_recipe: from the same, the recipe to lay over the file.
    """

    def decorate(function: Callable[..., Any]) -> PipelineCommand:
        def run(config_path: Path | None, sets: tuple[str, ...], debug: bool, **values: Any) -> Any:
            del debug  # read from the context by PipelineCommand
            keys = {p.name: p.key for p in click.get_current_context().command.params if isinstance(p, ConfigFlag)}
            flags = {key: v for n, key in keys.items() if n and (v := values.pop(n)) is not None}
            if own_keys is not None:
                flags.update(own_keys(values))
            tune_process()
            click.get_current_context().meta[_LAYERS] = (flags, sets)
            recipe = None if own_recipe is None else own_recipe(values)
            return function(config=load_config(config_path, flags, sets, recipe), **values)

        run.__doc__ = function.__doc__
        run.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        decorators = (
            click.version_option(None, "--version", package_name="gridcap", prog_name=name),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("--dry-run", is_flag=True, help="Print the configuration and what would be done, then stop."),
            click.option(
                "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any key: train.max_grad_norm=1."
            ),
            click.option(
                "--config",
                "config_path",
                type=click.Path(path_type=Path),
                help="YAML file with the whole run  [default: pipeline.yaml if it is here]; flags go over it.",
            ),
        )
        decorated: Any = run
        for decorator in decorators:
            decorated = decorator(decorated)
        return click.command(
            name,
            cls=PipelineCommand,
            epilog=examples,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": False},
        )(decorated)

    return decorate


def reload_config(path: Path) -> PipelineConfig:
    """The configuration of this command again, on top of another file: a run's own, when it is resumed."""
    flags, sets = click.get_current_context().meta[_LAYERS]
    return load_config(path, flags, sets)


def show_config(config: PipelineConfig, *sections: str) -> None:
    """Print the resolved values of the sections that a command uses."""
    click.echo("\n".join(f"  {line}" for line in config.to_yaml(*sections).splitlines()))
