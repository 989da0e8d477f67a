"""The log of a run: JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gridcap.common.files import write_text

EVERY = 20  # steps from one line of steps.jsonl to the next
Row = dict[str, Any]


class RunLog:
    """Writes metrics.jsonl (a row an epoch), steps.jsonl (a row every 20 steps) and tensorboard/ into a run.

    After a resume the files hold just what the checkpoint remembers, and go on from there.

    Args:
        output: folder of the run.
        history: rows of the epochs that are done.
        step: steps done.
    """

    def __init__(self, output: Path, history: list[Row], step: int) -> None:
        self._output = output
        self._steps = output / "steps.jsonl"
        kept = [row for row in read_rows(self._steps) if row["step"] <= step]
        write_text(self._steps, _lines(kept))
        self.epochs(history)
        self._board = SummaryWriter(output / "tensorboard", purge_step=step + 1)

    def step(self, row: Row) -> None:
        """Add a row of a step."""
        with self._steps.open("a", encoding="utf-8") as file:
            file.write(_lines([row]))
        self._draw("step", row, row["step"])

    def epoch(self, history: list[Row]) -> None:
        """Write the rows of the epochs; the last one is new."""
        self.epochs(history)
        self._draw("epoch", history[-1], history[-1]["step"])

    def epochs(self, history: list[Row]) -> None:
        """Write the rows of the epochs."""
        write_text(self._output / "metrics.jsonl", _lines(history))

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._board.close()

    def _draw(self, group: str, row: Row, step: int) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                self._board.add_scalar(f"{group}/{name}", value, step)
        self._board.flush()


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON-lines log; a last line that a kill cut short is left out."""
    rows: list[Row] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _lines(rows: list[Row]) -> str:
    """Standard JSON has no infinity and no NaN: null."""
    plain = ({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows)
    return "".join(json.dumps(row) + "\n" for row in plain)
