"""gridcap: which commands there are."""

from __future__ import annotations

from importlib import metadata

import click

EPILOG = """\b
Completion of commands and flags, in bash (zsh: zsh_source):
  for c in $(gridcap --names); do
    eval "$(env _$(echo $c | tr a-z- A-Z_)_COMPLETE=bash_source $c)"
  done
"""
_ORDER = ("download", "extract", "import", "inspect", "verify", "train", "evaluate", "caption")  # as they are used


@click.command("gridcap", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="gridcap", prog_name="gridcap")
@click.option("--names", is_flag=True, help="Print the commands' names alone.")
def main(names: bool) -> None:
    """List the commands of Gridcap, a line each, in the order of their use."""
    found = {
        point.name: point
        for point in metadata.distribution("gridcap").entry_points
        if point.group == "console_scripts" and point.name != "gridcap"
    }
    ordered = sorted(found, key=lambda name: (_ORDER.index(name.partition("-")[0]), name))
    if names:
        click.echo("\n".join(ordered))
        return
    for name in ordered:
        click.echo(f"{name:<18} {found[name].load().get_short_help_str(90)}")
    click.echo("\nEach has --help with examples; all read pipeline.yaml if it is in the current folder.")
