"""Dropout whose masks are drawn quickly on a CPU as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_VALUES = 2**16  # of a draw: an int16 for every number


class Dropout(nn.Dropout):
    """As `nn.Dropout` (Srivastava et al. 2014): (...) float -> the same shape, some of it zero, the rest scaled.

    On a CPU torch draws a mask number by number, at 10 to 20 ns each, which a step of training feels. Here 64 random
    bits serve four numbers, so the share of zeros is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        zeros = min(round(self.p * _VALUES), _VALUES - 1)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
        mask = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(draws, zeros - _VALUES // 2, out=mask)
        return x * mask.mul_(_VALUES / (_VALUES - zeros))
