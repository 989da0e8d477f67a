"""curves.png: training curves of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gridcap.common.files import replacing

Row = dict[str, Any]
Labels = dict[str, str]  # key of a row -> label in the legend

STEP_STYLE = {"alpha": 0.45, "lw": 1}
EPOCH_STYLE = {"marker": "o"}
FROM_ZERO = ("learning rate", "validation CIDEr", "reward")  # panels whose y axis starts at 0


def plot_curves(epochs: list[Row], steps: list[Row], path: Path) -> None:
    """Plot the loss (or the SCST reward), the validation scores, and the learning rate.

    Args:
        epochs: rows of metrics.jsonl.
        steps: rows of steps.jsonl.
        path: PNG file to write.
    """
    panels = _panels(epochs, steps)
    best = max((row for row in epochs if row.get("val_cider") is not None), key=lambda r: r["val_cider"], default=None)
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        draw(axis)
        axis.set_title(title)
        if best is not None:
            axis.axvline(best["step"], color="0.6", ls=":", lw=1)
        if title in FROM_ZERO:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{path.parent.name}: " + ("dotted line: epoch with the highest CIDEr" if best else ""), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _panels(epochs: list[Row], steps: list[Row]) -> dict[str, Callable[[Any], None]]:
    """Return the functions that draw the panels, by title."""

    def panel(step_labels: Labels, epoch_labels: Labels) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            _plot(axis, steps, step_labels, STEP_STYLE)
            _plot(axis, epochs, epoch_labels, EPOCH_STYLE)
            if len(axis.lines) > 1:
                axis.legend()

        return draw

    panels = {}
    if any("reward" in row for row in epochs):
        panels["reward"] = panel({"reward": "every 20th step"}, {"reward": "epoch"})
    else:
        panels["loss (nats per token)"] = panel(
            {"loss": "every 20th step"}, {"train_loss": "training", "val_loss": "validation"}
        )
    if any("val_cider" in row for row in epochs):
        panels["validation CIDEr"] = panel({}, {"val_cider": "CIDEr"})
        panels["validation perplexity"] = panel({}, {"val_perplexity": "perplexity"})
    panels["learning rate"] = panel({"learning_rate": "learning rate"}, {})
    return panels


def _plot(axis: Any, rows: list[Row], labels: Labels, style: dict[str, Any]) -> None:
    for name, label in labels.items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            marker = {"marker": "o"} if len(points) == 1 else {}  # a line through one point is invisible
            axis.plot(*zip(*points, strict=True), label=label, markersize=3, **(style | marker))
