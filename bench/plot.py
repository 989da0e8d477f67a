"""`python -m bench.plot FILE`: write the tables and the chart of a results file to docs/speed.md and README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.measure import Row, read_results

PAGE = Path("docs/speed.md")
README = Path("README.md")
MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")
TARGETS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "speedup": "speedup {}",
    "fraction of upper bound": "{} of the upper bound",
}


def format_number(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_cell(values: Sequence[float]) -> str:
    """Format the median of the rounds, and half of their range if there are several."""
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    return format_number(statistics.median(values)) + (f" ± {format_number(spread)}" if len(values) > 1 else "")


def make_table(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table with ratios and targets."""
    lines = [
        "| measurement | Gridcap | baseline | speedup | upper bound | fraction of it | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        results, missed = row.results(), row.missed()
        targets = [
            TARGETS[name].format(format_number(target)) + (": **missed**" if name in missed else "")
            for name, target in row.targets.items()
        ]
        cells = (
            row.name,
            f"{format_cell(row.values)} {row.unit}",
            format_cell(row.baseline),
            format_number(results["speedup"]) if row.baseline else "",
            format_cell(row.upper_bound),
            format_number(results["fraction of upper bound"]) if row.upper_bound else "",
            "; ".join(targets),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def make_short_table(rows: Sequence[Row]) -> str:
    """Return the throughput rows that have a baseline as a Markdown table."""
    lines = [
        "| measurement | throughput | speedup over the baseline | fraction of the upper bound |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.baseline and row.unit != "s":
            results = row.results()
            cells = (
                row.name,
                f"{format_number(statistics.median(row.values))} {row.unit}",
                f"{format_number(results['speedup'])} × ({row.baseline_name})",
                f"{format_number(results['fraction of upper bound'])} ({row.upper_bound_name})"
                if row.upper_bound
                else "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def make_notes(rows: Sequence[Row]) -> str:
    """Return the baseline, the upper bound, and the note of each row as a Markdown list."""
    lines = []
    for row in rows:
        parts = [
            f"baseline: {row.baseline_name}" if row.baseline_name else "",
            f"upper bound: {row.upper_bound_name}" if row.upper_bound_name else "",
            row.note,
        ]
        if text := "; ".join(part for part in parts if part):
            lines.append(f"* {row.name}: {text}.")
    return "\n".join(lines) + "\n"


def describe(machine: dict[str, Any]) -> str:
    """Return a sentence about the machine and the library versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured on {machine['gpu'] or 'the CPU'} ({machine['processor']}, {machine['cores']} cores, "
        f"{', '.join(machine['instruction sets'])}, {machine['memory (GiB)']} GiB), {machine['threads']} threads, "
        f"Python {machine['python']}, {versions}."
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a bar chart of the speedups and of the fractions of the upper bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("speedup", "speedup over the baseline"), ("fraction of upper bound", "fraction of the upper bound")]
    throughputs = [row for row in rows if row.unit != "s"]  # higher is better
    selected = [[row for row in throughputs if name in row.results()] for name, _ in panels]
    height = 1.2 + 0.32 * max(map(len, selected), default=1)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    for axis, (name, title), chosen in zip(axes, panels, selected, strict=True):
        _draw_bars(axis, name, chosen)
        axis.set_title(f"{title} (red: target)", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_bars(axis: Any, name: str, rows: Sequence[Row]) -> None:
    values = [row.results()[name] for row in rows]
    axis.barh(range(len(rows)), values, color="#3b6ea5")
    for position, (row, value) in enumerate(zip(rows, values, strict=True)):
        # Numbers are inside the bars: at their ends they would cross the target marks.
        style = {"va": "center", "fontsize": 8, "color": "white"}
        axis.annotate(format_number(value), (0, position), (4, 0), textcoords="offset points", **style)
        if name in row.targets:
            axis.plot([row.targets[name]] * 2, [position - 0.4, position + 0.4], color="#c0392b", linewidth=2)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)


def between_marks(page: str, text: str) -> str:
    """Return a page with the text between the marks replaced.

    Raises:
        ValueError: the page does not contain the marks.
    """
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"no {' ... '.join(MARKS)}")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--page", type=click.Path(path_type=Path, exists=True), default=PAGE, show_default=True)
@click.option("--readme", type=click.Path(path_type=Path, exists=True), default=README, show_default=True)
def main(results: Path, page: Path, readme: Path) -> None:
    """Write the full table and the chart of a results file to PAGE, and a short table to README."""
    machine, rows = read_results(results)
    chart = page.with_suffix(".png")
    sentence = describe(machine)
    full = f"{sentence}\n\n{make_table(rows)}\n{make_notes(rows)}\n![ratios]({chart.name})\n"
    texts = {}
    for path, text in ((page, full), (readme, f"{sentence}\n\n{make_short_table(rows)}")):
        try:
            texts[path] = between_marks(path.read_text(encoding="utf-8"), text)
        except ValueError as error:
            raise click.ClickException(f"{path}: {error}") from error
    plot(rows, chart)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    click.echo(f"done: {page}, {chart}, {readme}")


if __name__ == "__main__":
    main()
