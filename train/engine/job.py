"""The inputs of a training run, which stay the same from the first step to the last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gridcap.common.config import AdaptedTrainConfig, PipelineConfig, adapt
from gridcap.common.device import choose_device, choose_precision
from gridcap.common.errors import MismatchError, UserError
from gridcap.common.store.provenance import check_same_features
from gridcap.common.text import plural
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.engine.distributed import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class Runtime:
    """The hardware and the processes of a run.

    Attributes:
        device: device of the decoder.
        precision: autocast dtype; float32 disables autocast.
        ranks: this process among all.
        progress: whether to show progress bars and print.
    """

    device: torch.device
    precision: torch.dtype = torch.float32
    ranks: Ranks = SINGLE_PROCESS
    progress: bool = False

    def autocast(self) -> torch.autocast:
        """Return the context for forward passes in `precision`."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def print(self, text: str) -> None:
        """Print a line above the progress bar, unless output is disabled."""
        if self.progress:
            tqdm.write(text)


@dataclass(frozen=True)
class TrainingJob:
    """One call of `fit`.

    Attributes:
        config: resolved configuration.
        train: images to train on.
        val: images to validate on, if any.
        runtime: hardware and processes.
    """

    config: PipelineConfig
    train: CaptionedImages
    val: CaptionedImages | None
    runtime: Runtime

    def __post_init__(self) -> None:
        if self.val is not None:
            train, val = self.train.store, self.val.store
            check_same_features(train.provenance, val.provenance, f"{train.path} contains", str(val.path))
            check_disjoint(self.train, self.val)

    @property
    def settings(self) -> AdaptedTrainConfig:
        """The train section of the configuration."""
        return adapt(self.config.train, len(self.train), self.train.caption_count)

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return self.config.train.output

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The properties outside the configuration that must not change on resuming: data digests and precision."""
        return {
            "data": self.train.digest(),
            "validation": None if self.val is None else self.val.digest(),
            "precision": str(self.runtime.precision),
        }


def check_disjoint(train: CaptionedImages, val: CaptionedImages) -> None:
    """Raise a MismatchError if images are used for both training and validation."""
    if shared := len(train.images() & val.images()):
        raise MismatchError(
            f"{plural(shared, 'image')} in both {train.store.path} and {val.store.path}",
            "validate on images that are not used for training: pass another --val-features",
        )


def choose_runtime(settings: AdaptedTrainConfig, ranks: Ranks, progress: bool) -> Runtime:
    """Select the device and the precision of this rank.

    Raises:
        UserError: more ranks on this machine than GPUs, or fewer images per step than ranks times gradient
            accumulation steps.
    """
    name = settings.device
    if name in ("auto", "cuda") and (gpus := torch.cuda.device_count()):
        if 1 < gpus <= ranks.local_rank:
            raise UserError(
                f"local rank {ranks.local_rank} has no GPU: this machine has {gpus} GPUs",
                "start one process per GPU",
            )
        name = f"cuda:{ranks.local_rank % gpus}"  # a Slurm task may see only its own GPU, as number 0
    device = choose_device(name)
    if settings.batch_size < ranks.world_size * settings.grad_accum_steps:
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be split over {ranks.world_size} ranks and "
            f"{settings.grad_accum_steps} gradient accumulation steps",
            "choose a larger --batch-size (the number of images per step over all ranks)",
        )
    return Runtime(device, choose_precision(settings.precision, device), ranks, progress and ranks.is_main)
