"""Speed, measured against a baseline and against the limit in the same run: `make bench`, `make bench QUICK=1`."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from pathlib import Path

import click

from bench.measure import Row, as_tree, machine, read_rows
from bench.plot import table
from common.files import write_json

PARTS = ("extraction", "reading", "training", "decoding", "scoring", "growth", "starting")
RESULTS = Path("bench/results")


def file_name(where: dict[str, object]) -> str:
    """A results file's name, from the machine."""
    text = f"{where['gpu'] or where['processor']} {where['cores']} cores".lower().replace("(r)", "")
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-") + ".json"


@click.command()
@click.option("--quick", is_flag=True, help="One round each, and less of everything: two or three minutes.")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Just these  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), help="Results file  [default: by the machine's name]")
def main(quick: bool, parts: tuple[str, ...], output: Path | None) -> None:
    """Measure, print the table, and write it all to a file; parts that are not measured now keep what it says."""
    where = machine()
    output = output or RESULTS / (("quick-" if quick else "") + file_name(where))
    click.echo(", ".join(f"{key}: {value}" for key, value in where.items() if not isinstance(value, dict)))
    rows = kept(output, parts)
    for part in parts or PARTS:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="gridcap-bench-") as work:
            found: list[Row] = importlib.import_module(f"bench.{part}").measure(Path(work), quick)
        rows = [row for row in rows if row.part != part] + found
        rows.sort(key=lambda row: PARTS.index(row.part))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, as_tree(where, rows))
        click.echo(f"\n{part}, {time.perf_counter() - begin:.0f} s\n\n{table(found)}")
    click.echo(f"done: {output}")
    if missed := [f"{row.name} ({', '.join(row.missed())})" for row in rows if row.missed()]:
        click.echo("below what is wanted: " + "; ".join(missed))


def kept(output: Path, parts: tuple[str, ...]) -> list[Row]:
    """The rows of an earlier run that this one does not measure again."""
    if not parts or not output.exists():
        return []
    return [row for row in read_rows(output)[1] if row.part not in parts]


if __name__ == "__main__":
    main()
