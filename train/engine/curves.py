"""curves.png: how a run went, at one look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gridcap.common.files import replacing

Row = dict[str, Any]


def plot_curves(epochs: list[Row], steps: list[Row], path: Path) -> None:
    """Draw loss, validation scores, learning rate and, of self-critical training, the reward.

    Args:
        epochs: rows of metrics.jsonl.
        steps: rows of steps.jsonl.
        path: of the picture.
    """
    panels: list[tuple[str, Callable[[Any], None]]] = []
    rewarded = any("reward" in row for row in epochs)
    if rewarded:
        panels.append(
            ("reward", lambda axis: _lines(axis, steps, {"reward": "one step in 20"}, epochs, {"reward": "epoch"}))
        )
    else:
        names = {"train_loss": "training", "val_loss": "validation"}
        panels.append(
            ("loss, nats a word", lambda axis: _lines(axis, steps, {"loss": "one step in 20"}, epochs, names))
        )
    if any("val_cider" in row for row in epochs):
        panels.append(("validation CIDEr", lambda axis: _lines(axis, [], {}, epochs, {"val_cider": "CIDEr"})))
        panels.append(
            ("validation perplexity", lambda axis: _lines(axis, [], {}, epochs, {"val_perplexity": "perplexity"}))
        )
    panels.append(("learning rate", lambda axis: _lines(axis, steps, {"learning_rate": "rate"}, [], {})))
    best = max((row for row in epochs if row.get("val_cider") is not None), key=lambda r: r["val_cider"], default=None)
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis)
        axis.set_title(title)
        if best is not None:
            axis.axvline(best["step"], color="0.6", ls=":", lw=1)
        if title in ("learning rate", "validation CIDEr", "reward"):
            axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{path.parent.name}: " + ("dotted: the epoch with the highest CIDEr" if best else ""), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _lines(axis: Any, steps: list[Row], of_steps: dict[str, str], epochs: list[Row], of_epochs: dict[str, str]) -> None:
    for rows, names, style in ((steps, of_steps, {"alpha": 0.45, "lw": 1}), (epochs, of_epochs, {"marker": "o"})):
        for name, label in names.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                alone = {"marker": "o"} if len(points) == 1 else {}
                axis.plot(*zip(*points, strict=True), label=label, markersize=3, **(style | alone))
    if len(axis.lines) > 1:
        axis.legend()
