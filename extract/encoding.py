"""Encode stage of the extraction: the encoder of a planned store, applied to every view of an image."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gridcap.common.image.views import SelectedView, select_view
from gridcap.common.store.codecs import find_codec
from gridcap.common.store.shard_format import ORIGINAL
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.halving import HalvingEncoder
from gridcap.extract.job import Extraction, encoder_settings
from gridcap.extract.staging import PendingGrids


class ViewEncoder:
    """Encodes the views of images; builds the encoder when it is first needed.

    Attributes:
        encoded: number of images so far.
    """

    def __init__(self, extraction: Extraction) -> None:
        self._extraction = extraction
        self._views: list[str] = extraction.plan.provenance["views"]
        self.encoded = 0

    @functools.cached_property
    def _halving(self) -> HalvingEncoder:
        return HalvingEncoder(self._encoder, self._extraction.plan.batch_size)

    @functools.cached_property
    def _encoder(self) -> GridEncoder:
        self._extraction.check_arithmetic()
        plan, extract = self._extraction.plan, self._extraction.config.extract
        if plan.provenance["threads"]:
            torch.set_num_threads(plan.provenance["threads"])
        dtype = find_codec(extract.dtype).read.name  # the shard writer encodes
        compiled = bool(plan.provenance["compile"])
        options = EncoderOptions(extract.precision, extract.device, dtype, compiled, plan.batch_size)
        return GridEncoder(extract.encoder, self._extraction.identity, options, encoder_settings(extract))

    @property
    def side(self) -> int:
        """Side of the input images in pixels.

        Raises:
            MismatchError: this machine would not compute like the one that started the store.
        """
        return self._encoder.side

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds that the GPU computed so far; None on a CPU."""
        return self._encoder.gpu_seconds

    def submit(self, images: np.ndarray | Tensor, at_most: int | None = None) -> dict[str, PendingGrids]:
        """Encode a batch.

        Args:
            images: uint8 (V, B, side, side, 3), the originals and their decoded views (see `decoded_views`).
            at_most: images computed at a time, if fewer than the plan's batch size; without enough memory, fewer are.

        Returns:
            View -> grids (B, *grid), which may still be computed.
        """
        self.encoded += images.shape[1]
        decoded = dict(zip([ORIGINAL, *(view.name for view in decoded_views(self._views))], images, strict=True))
        return {view: self._halving.submit(_pixels(view, decoded), at_most) for view in self._views}


def decoded_views(names: Sequence[str]) -> list[SelectedView]:
    """Return the views that are made while an image is decoded; the others are functions of its square."""
    return [view for name in names if (view := select_view(name)).of_square is None]


def _pixels(view: str, decoded: Mapping[str, np.ndarray | Tensor]) -> np.ndarray | Tensor:
    if view in decoded:
        return decoded[view]
    of_square = select_view(view).of_square
    assert of_square is not None
    pixels: np.ndarray | Tensor = of_square(decoded[ORIGINAL])
    return pixels
