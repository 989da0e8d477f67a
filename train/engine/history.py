"""The history of a run: one row per epoch."""

from __future__ import annotations

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
