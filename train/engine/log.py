"""The log of a run: JSON Lines files and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gridcap.common.files import write_text

STEPS_PER_ROW = 20  # steps per row of steps.jsonl
Row = dict[str, Any]


class RunLog:
    """Writer of metrics.jsonl (one row per epoch), steps.jsonl (one row per 20 steps), and tensorboard/.

    Opening the log of a resumed run discards the rows after the checkpoint.

    Args:
        output: folder of the run.
        history: rows of the finished epochs.
        step: number of finished steps.
    """

    def __init__(self, output: Path, history: list[Row], step: int) -> None:
        self._output = output
        self._steps, self._events = output / "steps.jsonl", output / "tensorboard"
        kept = [row for row in read_rows(self._steps) if row["step"] <= step]
        write_text(self._steps, _to_json_lines(kept))
        self._write_epochs(history)
        with _naming(self._events):
            self._tensorboard = SummaryWriter(self._events, purge_step=step + 1)

    def log_step(self, row: Row) -> None:
        """Append the row of a step."""
        with _naming(self._steps), self._steps.open("a", encoding="utf-8") as file:
            file.write(_to_json_lines([row]))
        self._add_scalars("step", row, row["step"])

    def log_epoch(self, history: list[Row]) -> None:
        """Write the rows of all epochs; only the last one is new."""
        self._write_epochs(history)
        self._add_scalars("epoch", history[-1], history[-1]["step"])

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        with _naming(self._events):
            self._tensorboard.close()

    def _write_epochs(self, history: list[Row]) -> None:
        write_text(self._output / "metrics.jsonl", _to_json_lines(history))

    def _add_scalars(self, group: str, row: Row, step: int) -> None:
        with _naming(self._events):
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self._tensorboard.add_scalar(f"{group}/{name}", value, step)
            self._tensorboard.flush()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name a file in the system errors of the block: the error for a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_rows(file: Path) -> list[Row]:
    """Read a JSON Lines log, ignoring everything from the first truncated line."""
    rows: list[Row] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _to_json_lines(rows: list[Row]) -> str:
    """Format rows; NaN and infinity, which standard JSON does not support, become null."""
    plain = ({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows)
    return "".join(json.dumps(row) + "\n" for row in plain)
