"""Exponential moving average (EMA) of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gridcap.train.decoders.base import Decoder


class WeightEMA(AveragedModel):
    """EMA of a decoder's parameters and buffers (Tarvainen and Valpola 2017, arXiv:1703.01780, section 3).

    The averaged decoder is validated, saved, and used for inference. The trained weights are not changed.

    Args:
        decoder: decoder being trained.
        decay: decay after the warmup. After n steps, the decay is at most (1 + n) / (10 + n), so that the random
            initial weights are quickly forgotten.
    """

    def __init__(self, decoder: Decoder, decay: float) -> None:
        super().__init__(decoder, multi_avg_fn=self._blend, use_buffers=True)
        self._decay = decay
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # deepcopy breaks up the contiguous weights that cuDNN expects

    @property
    def decoder(self) -> Decoder:
        """The decoder with the averaged weights."""
        return cast(Decoder, self.module)

    def update(self, decoder: Decoder, step: int) -> None:
        """Add the weights after `step` optimizer steps (from 1) to the average."""
        self.n_averaged.fill_(step)  # makes the average a function of the step, so that resuming needs no counter
        self.update_parameters(decoder)

    @torch.no_grad()
    def _blend(self, averages: Sequence[Tensor], values: Sequence[Tensor], _: Tensor | int) -> None:
        step = int(self.n_averaged)
        decay = min(self._decay, (1 + step) / (10 + step))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(values), 1 - decay)
        else:
            torch._foreach_copy_(list(averages), list(values))  # an average of counters or indices has no meaning
