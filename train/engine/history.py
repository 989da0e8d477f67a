"""The history of a run: one row per epoch."""

from __future__ import annotations

from gridcap.common.config import AdaptedTrainConfig
from gridcap.common.text import plural
from gridcap.train.engine.log import Row


def epochs_done(history: list[Row]) -> int:
    """Return the number of finished epochs. Validation before the first step counts as epoch 0."""
    return int(history[-1]["epoch"]) if history else 0


def best_row(history: list[Row]) -> Row:
    """Return the row with the highest validation CIDEr; ties are broken by the lowest validation loss.

    Without any validation, return the last row.
    """
    validated = [row for row in history if "val_cider" in row]
    return max(validated, key=lambda row: (row["val_cider"], -row["val_loss"])) if validated else history[-1]


def should_stop(history: list[Row], patience: int | None) -> bool:
    """Return whether validation CIDEr has not improved for `patience` epochs."""
    if patience is None or not history or "val_cider" not in history[-1]:
        return False
    return bool(history[-1]["epoch"] - best_row(history)["epoch"] >= patience)


def format_last_epoch(history: list[Row], epochs: int) -> str:
    """Return the line for the terminal that summarizes the last of `epochs` epochs."""
    row, initial = history[-1], history[0]
    text = f"epoch {row['epoch']:3d}/{epochs}"
    if row["epoch"] == 0:
        text += "  before the first step"
    if "train_loss" in row:
        text += f"  loss {row['train_loss']:.3f}"
    if "reward" in row:
        text += f"  reward {row['reward']:.3f}, baseline {row['baseline']:.3f}, advantage {row['advantage']:.3f}"
    if "val_cider" in row:
        text += f"  validation: loss {row['val_loss']:.3f}, perplexity {row['val_perplexity']:.2f}"
        text += f", greedy CIDEr {row['val_cider']:.3f}"
        if initial["epoch"] == 0 and row["epoch"] and row["val_cider"] < initial["val_cider"]:
            text += f" (below the initial {initial['val_cider']:.3f})"
        elif best_row(history) is row:
            text += " (best so far)"
    return f"{text}  {row['seconds']:.1f} s" if "seconds" in row else text


def format_run(settings: AdaptedTrainConfig, history: list[Row]) -> str:
    """Return the lines for the terminal that summarize a finished run."""
    best, last = best_row(history), history[-1]
    lines = [f"done: {settings.output}: {plural(last['epoch'], 'epoch')}, best is epoch {best['epoch']}"]
    if last["epoch"] < settings.epochs:
        lines[0] += f" (stopped: validation CIDEr did not improve for {plural(settings.patience or 0, 'epoch')})"
    if "val_cider" in best:
        lines[0] += f", validation CIDEr {best['val_cider']:.3f}, perplexity {best['val_perplexity']:.2f}"
        if history[0]["epoch"] == 0 and best["epoch"] == 0 and last["epoch"]:
            lines.append(f"no epoch improved on the initial decoder ({settings.init_from}), which is kept as the best")
            lines.append(
                f"try --set train.scst.temperature={settings.scst.temperature / 2:g}, "
                f"or --learning-rate {settings.learning_rate / 4:g}"
            )
    lines.append(f"curves: {settings.output / 'curves.png'}")
    return "\n".join(lines)
