"""GridEncoder: a frozen encoder that maps images to feature grids."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gridcap.common.device import choose_device, choose_precision
from gridcap.common.errors import UserError, explain_out_of_memory, first_line
from gridcap.extract.encoders.cuda_graph import GraphedForward
from gridcap.extract.encoders.folding import fold_if_equal, probe
from gridcap.extract.encoders.packed import can_pack, pack_convolutions
from gridcap.extract.encoders.registry import DEFAULTS, EncoderSettings, find_encoder
from gridcap.extract.encoders.trunk import normalize
from gridcap.extract.encoders.weights import WeightsIdentity
from gridcap.extract.staging import PendingGrids, Staging


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder computes.

    Attributes:
        precision: dtype of the computation: "auto", "float32", "bfloat16", or "float16" (GPU only).
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: dtype of the returned grids: "float16" or "float32".
        compiled: use torch.compile, for batches of `batch_size`.
        batch_size: largest batch of compiled code. Smaller batches are padded to it, so nothing is recompiled; the
            last bits of a grid depend on it.
    """

    precision: str = "auto"
    device: str = "auto"
    dtype: str = "float16"
    compiled: bool = False
    batch_size: int = 32


class GridEncoder:
    """A frozen encoder with its weights, optimized for the device.

    Args:
        name: name of the encoder, see `gridcap encoders`.
        weights: "imagenet" (downloaded once), "random", "random:SEED", a file, or the result of `identify_weights`.
        options: device, precision, and dtype of the grids.
        settings: layer, image size, and normalization, if they differ from the encoder's defaults.

    Attributes:
        spec: input and output of the encoder.
        side: side of the square input images, in pixels.
        grid_shape: (rows, columns, channels) of a grid.
        device: the torch device.

    Raises:
        WeightsError: the weights are not found or do not match the encoder.
        UserError: the encoder or the device does not exist, or torch.compile failed.

    Example::

        from pathlib import Path

        from gridcap import GridEncoder
        from gridcap.common.image import load_image

        encoder = GridEncoder("resnet50")
        image = load_image(Path("photo.jpg"), encoder.side, "stretch")  # uint8 (256, 256, 3)
        grids = encoder.encode(image[None])                             # float16 (1, 8, 8, 2048)
    """

    def __init__(
        self,
        name: str = "inception_v3",
        weights: str | WeightsIdentity = "imagenet",
        options: EncoderOptions = EncoderOptions(),
        settings: EncoderSettings = DEFAULTS,
    ) -> None:
        encoder = find_encoder(name, settings)
        self.spec = encoder.spec
        self.device = choose_device(options.device)
        self.side = self.spec.side
        self.grid_shape = self.spec.grid_shape
        self._precision = choose_precision(options.precision, self.device)
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        identity = weights if isinstance(weights, WeightsIdentity) else encoder.identify_weights(weights)
        example = normalize(probe(self.side), self.spec, torch.float32)
        network = fold_if_equal(encoder.build(identity), example)
        network.requires_grad_(False)
        network.to(self.device, self._precision).to(memory_format=torch.channels_last)
        if self.device.type == "cpu" and not options.compiled and can_pack(self._precision):
            network = pack_convolutions(network, example.to(self._precision), options.batch_size)
        self._network: Callable[[Tensor], Tensor] = network
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        self._fixed_batch = options.batch_size if options.compiled else None
        self._compute: Callable[[Tensor], Tensor] = self._compute_eagerly
        if options.compiled:
            self._network = _compile(network, self.device)
            self._warm_up(name, options.batch_size)

    def _warm_up(self, name: str, batch_size: int) -> None:
        """Encode one batch, because torch.compile compiles in the first call: fail before the first shard.

        On a GPU, the compiled forward pass is then captured as a CUDA graph.
        """
        images = np.zeros((batch_size, self.side, self.side, 3), np.uint8)
        try:
            self.encode(images)
            if self.device.type == "cuda":
                with torch.inference_mode():
                    self._compute = GraphedForward(self._compute, torch.from_numpy(images).to(self.device))
        except Exception as error:  # dynamo, inductor, triton, and the C++ compiler raise different types
            if explain_out_of_memory(error) is not None:
                return  # the first batch fails in the same way, and its caller may divide it
            raise UserError(
                f"--compile: torch.compile failed on {name}: {first_line(error)}",
                "pass --compile off; a store that was started with --compile on must be recreated",
            ) from error

    @property
    def gpu_seconds(self) -> float | None:
        """Seconds that the GPU computed for batches whose grids have arrived on the host; None on a CPU."""
        return None if self._staging is None else sum(self._staging.forward_seconds)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode a batch.

        Args:
            images: uint8 (B, side, side, 3), RGB.

        Returns:
            (B, *grid_shape) of the chosen dtype. Values out of its range become infinite.

        Raises:
            ValueError: the images have another dtype or shape.
        """
        return self.submit(images).result()

    @torch.inference_mode()
    def submit(self, images: np.ndarray | Tensor, batch_size: int | None = None) -> PendingGrids:
        """Encode a batch asynchronously.

        On a GPU this returns immediately, and grids are copied to the host while the next batch is computed, provided
        that two or three batches are kept pending. On a CPU the work is done on return. `images` may be modified as
        soon as this returns. Not thread-safe.

        Args:
            images: as for `encode`, or a tensor on the CPU or on the encoder's device. Compiled encoders take at most
                `batch_size` images.
            batch_size: size that compiled encoders pad the batch to, which compiles them again if it is a new one;
                None: that of the options.
        """
        batch = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if batch.dtype != torch.uint8 or batch.shape[1:] != (self.side, self.side, 3):
            raise ValueError(
                f"expected images of type torch.uint8 and shape (B, {self.side}, {self.side}, 3), got {batch.dtype} "
                f"{tuple(batch.shape)}; gridcap.common.image.load_image returns them"
            )
        forward = functools.partial(self._forward, batch_size=batch_size)
        if self._staging is None:
            grids = forward(batch).numpy()
            return PendingGrids(lambda: grids)
        return self._staging.run(batch, forward)

    def _forward(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """uint8 (B, side, side, 3) -> contiguous (B, *grid_shape) of the chosen dtype, on the same device."""
        count = len(images)
        if self._fixed_batch is not None:
            size = batch_size or self._fixed_batch
            if count > size:
                raise ValueError(f"batch of {count} images, but the encoder was compiled for {size}")
            images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, size - count))
        return self._compute(images)[:count]

    def _compute_eagerly(self, images: Tensor) -> Tensor:
        """Return the contiguous grids of a batch that has been padded, if needed."""
        grids: Tensor = self._network(normalize(images, self.spec, self._precision))
        return grids.to(self._dtype).contiguous()


def _compile(network: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Compile the network for one batch size; on a CPU with frozen, repacked weights.

    "max-autotune" would choose kernels by timing, so two runs could round differently. "reduce-overhead" would replay
    CUDA graphs, which overwrite grids that are still being copied to the host; `GraphedForward` copies them first.
    """
    options: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
    return torch.compile(network, dynamic=False, options=options)
