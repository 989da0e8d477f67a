"""The running average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gridcap.train.decoders.base import Decoder


class WeightAverage:
    """An exponential moving average of a decoder's weights (Polyak and Juditsky 1992; as in Tarvainen and Valpola
    2017, arXiv:1703.01780, section 3).

    Its decoder is what is validated, kept and used; the trained weights themselves go on beside it.

    Args:
        decoder: the one that is trained.
        decay: of the average; early on it is less, (1 + n) / (10 + n), so that the random beginning is forgotten.

    Attributes:
        decoder: a copy with the averaged weights.
    """

    def __init__(self, decoder: Decoder, decay: float) -> None:
        self._decay = decay
        self.decoder = copy.deepcopy(decoder).requires_grad_(False)
        for part in self.decoder.modules():
            if isinstance(part, nn.RNNBase):
                part.flatten_parameters()  # a copy's weights no longer lie as cuDNN wants them

    @torch.no_grad()
    def update(self, decoder: Decoder, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.decoder.parameters())
        torch._foreach_lerp_(averages, list(decoder.parameters()), 1 - decay)
