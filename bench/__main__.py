"""Speed, measured against a baseline and against the limit in the same run: `make bench`, `make bench QUICK=1`."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from pathlib import Path

import click

from bench.measure import Row, as_tree, machine, read_rows
from bench.plot import cell, table
from gridcap.common.files import write_json

PARTS = ("extraction", "reading", "training", "decoding", "scoring", "growth", "starting")
RESULTS = Path("bench/results")


def file_name(where: dict[str, object]) -> str:
    """A results file's name, from the machine."""
    text = f"{where['gpu'] or where['processor']} {where['cores']} cores".lower().replace("(r)", "")
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-") + ".json"


@click.command()
@click.option("--quick", is_flag=True, help="One round each, and less of everything: two or three minutes.")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="Just these  [default: all]")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Results file  [default: by the machine's name]"
)
def main(quick: bool, parts: tuple[str, ...], output: Path | None) -> None:
    """Measure, print the table, and write it all to a file; parts that are not measured now keep what it says."""
    where = machine()
    output = output or RESULTS / (("quick-" if quick else "") + file_name(where))
    click.echo(", ".join(f"{key}: {value}" for key, value in where.items() if not isinstance(value, dict)))
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(output)[1] if parts and output.exists() else []
    for part in parts or PARTS:
        begin, found = time.perf_counter(), list[Row]()
        with tempfile.TemporaryDirectory(prefix="gridcap-bench-") as work:
            for row in importlib.import_module(f"bench.{part}").measure(Path(work), quick):
                found.append(row)
                rows = [other for other in rows if other.name != row.name] + [row]
                rows.sort(key=lambda row: PARTS.index(row.part))
                write_json(output, as_tree(where, rows))  # now, so that a run that is stopped leaves what it has
                click.echo(f"{row.name}: {cell(row.ours)} {row.unit}")
        rows = [row for row in rows if row.part != part or row in found]
        write_json(output, as_tree(where, rows))
        click.echo(f"\n{part}, {time.perf_counter() - begin:.0f} s\n\n{table(found)}")
    click.echo(f"done: {output}")
    if missed := [f"{row.name} ({', '.join(row.missed())})" for row in rows if row.missed()]:
        click.echo("below what is wanted: " + "; ".join(missed))


if __name__ == "__main__":
    main()
