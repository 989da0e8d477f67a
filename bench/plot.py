"""Tables and picture of a results file: `python -m bench.plot FILE` puts them into docs/speed.md and README.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.measure import Row, read_rows

PAGE = Path("docs/speed.md")
README = Path("README.md")
MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")
_BARS = {
    "value": "at least {}",
    "at most": "at most {}",
    "of baseline": "{} x the baseline",
    "of limit": "{} of the limit",
}


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(values: Sequence[float]) -> str:
    """The median, and half of what lies between the lowest and the highest round."""
    if not values:
        return ""
    spread = (max(values) - min(values)) / 2
    return number(statistics.median(values)) + (f" ± {number(spread)}" if len(values) > 1 else "")


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a row, with the ratios to baseline and limit, and what was wanted."""
    lines = ["| what | ours | baseline | ratio | limit | share | wanted |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        found, missed = row.found(), row.missed()
        bars = [
            _BARS[name].format(number(bar)) + (": **missed**" if name in missed else "")
            for name, bar in row.wanted.items()
        ]
        cells = (
            row.name,
            f"{cell(row.ours)} {row.unit}",
            cell(row.baseline),
            number(found["of baseline"]) if row.baseline else "",
            cell(row.limit),
            number(found["of limit"]) if row.limit else "",
            "; ".join(bars),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short_table(rows: Sequence[Row]) -> str:
    """Markdown: what has a baseline to be compared with by its rate, a line each."""
    lines = ["| what | ours, a second | beside the usual way | share of the limit |", "|---|---|---|---|"]
    for row in rows:
        if row.baseline and row.unit != "s":
            found = row.found()
            cells = (
                row.name,
                f"{number(statistics.median(row.ours))} {row.unit.removesuffix('/s')}",
                f"{number(found['of baseline'])} × {row.baseline_is}",
                f"{number(found['of limit'])} of {row.limit_is}" if row.limit else "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def explanations(rows: Sequence[Row]) -> str:
    """What baseline and limit of each row are, and its note."""
    lines = []
    for row in rows:
        parts = [
            f"baseline: {row.baseline_is}" if row.baseline_is else "",
            f"limit: {row.limit_is}" if row.limit_is else "",
        ]
        if said := "; ".join(part for part in (*parts, row.note) if part):
            lines.append(f"* {row.name}: {said}.")
    return "\n".join(lines) + "\n"


def machine_line(where: dict[str, Any]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"Measured on {where['gpu'] or 'the CPU'} ({where['processor']}, {where['cores']} cores, "
        f"{', '.join(where['arithmetic'])}, {where['memory (GiB)']} GiB), {where['threads']} threads, "
        f"Python {where['python']}, {versions}."
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars: how many times the baseline, and which share of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("of baseline", "times the baseline"), ("of limit", "share of the limit")]
    rates = [row for row in rows if row.unit != "s"]  # of which more is better
    chosen = [[row for row in rates if name in row.found()] for name, _ in panels]
    height = 1.2 + 0.32 * max(map(len, chosen), default=1)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    for axis, (name, title), some in zip(axes, panels, chosen, strict=True):
        values = [row.found()[name] for row in some]
        axis.barh(range(len(some)), values, color="#3b6ea5")
        for place, (row, value) in enumerate(zip(some, values, strict=True)):
            inside = {"va": "center", "fontsize": 8, "color": "white"}  # at the bar's end the mark would cross it
            axis.annotate(number(value), (0, place), (4, 0), textcoords="offset points", **inside)
            if name in row.wanted:
                axis.plot([row.wanted[name]] * 2, [place - 0.4, place + 0.4], color="#c0392b", linewidth=2)
        axis.set_yticks(range(len(some)), [row.name for row in some], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"{title} (red: what was wanted)", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def between_marks(page: str, text: str) -> str:
    """A page with its measured part replaced.

    Raises:
        ValueError: the page has no such marks.
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
    """Put the table and the picture of a results file into the page, and what is compared into the README."""
    where, rows = read_rows(results)
    picture = page.with_suffix(".png")
    machine = machine_line(where)
    whole = f"{machine}\n\n{table(rows)}\n{explanations(rows)}\n![ratios]({picture.name})\n"
    texts = {}
    for path, text in ((page, whole), (readme, f"{machine}\n\n{short_table(rows)}")):
        try:
            texts[path] = between_marks(path.read_text(encoding="utf-8"), text)
        except ValueError as error:
            raise click.ClickException(f"{path}: {error}") from error
    draw(rows, picture)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    click.echo(f"done: {page}, {picture}, {readme}")


if __name__ == "__main__":
    main()
