"""The state of a training run, which checkpoints contain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.base import Decoder
from gridcap.train.engine.ema import WeightEMA
from gridcap.train.engine.log import Row


@dataclass
class RunState:
    """Everything that changes during a run.

    Random states are not part of it: the random numbers of a step depend only on the seed of the run, the step, and the
    rank.

    Attributes:
        decoder: decoder with the trained weights.
        ema: moving average of the weights, if the run uses one.
        optimizer: optimizer with its moments.
        vocabulary: vocabulary of the decoder.
        history: one row per finished epoch.
        step: number of finished steps.
        sums: sums of the current epoch for its row, if the epoch is unfinished.
    """

    decoder: Decoder
    ema: WeightEMA | None
    optimizer: torch.optim.Optimizer
    vocabulary: Vocabulary
    history: list[Row] = field(default_factory=list)
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def eval_decoder(self) -> Decoder:
        """The decoder to validate and to save: averaged, if the run uses EMA."""
        return self.decoder if self.ema is None else self.ema.decoder

    def training_state(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return the state that resuming needs in addition to the weights of `eval_decoder`.

        Args:
            fingerprint: properties that must not change on resuming.
        """
        return {
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "step": self.step,
            "sums": self.sums,
            "fingerprint": fingerprint,
            "weights": None if self.ema is None else self.decoder.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `training_state`, except for the weights."""
        self.history, self.step, self.sums = list(state["history"]), state["step"], dict(state["sums"])
        self.optimizer.load_state_dict(state["optimizer"])
