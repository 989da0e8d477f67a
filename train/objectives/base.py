"""The interface of a training objective."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gridcap.train.data.batch import CaptionBatch
from gridcap.train.decoders.base import Decoder

Terms = dict[str, Tensor]


class Objective(Protocol):
    """A loss function over batches.

    The loss is a sum over tokens, not a mean: the sums of all ranks and gradient accumulation steps are added up and
    divided by the total number of tokens once, so that the result does not depend on how a step is split.

    Attributes:
        term_names: keys of the terms, in a fixed order. "tokens" is required.
        capturable: whether the computation reads nothing from the device and depends only on the shapes of the batch
            and on `variant`, so that it can be replayed as a CUDA graph.
    """

    term_names: tuple[str, ...]
    capturable: bool

    def variant(self, epoch: int) -> object:
        """Return what the operators of an epoch depend on; epochs with equal values can share a graph."""

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """Compute the loss of a batch.

        Args:
            decoder: decoder in training mode.
            batch: images and captions on the device of the decoder.
            epoch: index of the epoch, from 0.

        Returns:
            The loss to differentiate, (), and the terms for the log: detached sums, (), over the batch.
        """
