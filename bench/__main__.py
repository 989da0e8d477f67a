"""`make bench`, `make bench QUICK=1`: measure throughput, latency, and memory against baselines and upper bounds."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from pathlib import Path

import click

from bench.measure import Row, describe_machine, read_results, to_json
from bench.plot import format_cell, make_table
from gridcap.common.files import write_json

PARTS = ("extraction", "reading", "training", "decoding", "scoring", "scaling", "startup")
RESULTS = Path("bench/results")


def results_name(machine: dict[str, object]) -> str:
    """Return the name of the results file of a machine."""
    text = f"{machine['gpu'] or machine['processor']} {machine['cores']} cores".lower().replace("(r)", "")
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-") + ".json"


@click.command()
@click.option("--quick", is_flag=True, help="one round on less data: two or three minutes")
@click.option("--only", "parts", multiple=True, type=click.Choice(PARTS), help="benchmark to run  [default: all]")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="results file  [default: named by the machine]"
)
def main(quick: bool, parts: tuple[str, ...], output: Path | None) -> None:
    """Run benchmarks, print a table, and write the results; with --only, other results in the file are kept."""
    machine = describe_machine()
    output = output or RESULTS / (("quick-" if quick else "") + results_name(machine))
    click.echo(", ".join(f"{key}: {value}" for key, value in machine.items() if not isinstance(value, dict)))
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = read_results(output)[1] if parts and output.exists() else []
    for part in parts or PARTS:
        start, measured = time.perf_counter(), list[Row]()
        with tempfile.TemporaryDirectory(prefix="gridcap-bench-") as work:
            for row in importlib.import_module(f"bench.{part}").measure(Path(work), quick):
                measured.append(row)
                rows = [other for other in rows if other.name != row.name] + [row]
                rows.sort(key=lambda row: PARTS.index(row.part))
                write_json(output, to_json(machine, rows))  # after every row, so that an interrupted run keeps them
                click.echo(f"{row.name}: {format_cell(row.values)} {row.unit}")
        rows = [row for row in rows if row.part != part or row in measured]
        write_json(output, to_json(machine, rows))
        click.echo(f"\n{part}, {time.perf_counter() - start:.0f} s\n\n{make_table(measured)}")
    click.echo(f"done: {output}")
    if missed := [f"{row.name} ({', '.join(row.missed())})" for row in rows if row.missed()]:
        click.echo("missed targets: " + "; ".join(missed))


if __name__ == "__main__":
    main()
