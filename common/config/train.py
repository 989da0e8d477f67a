"""Stage two's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gridcap.common.config.decoders import AttentionConfig, DecoderConfig
from gridcap.common.config.section import Section

TrainPrecision = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adam", "adamw"]
ScheduleKind = Literal["constant", "step", "cosine", "noam"]
Objective = Literal["cross-entropy", "scst"]
Shuffle = Literal["rows", "blocks"]


class VocabularyConfig(Section):
    """Which words the decoder knows; counted over the training split only."""

    max_size: int | None = Field(5000, ge=5, description="keep the commonest words up to this size, specials included")
    min_count: PositiveInt = Field(1, description="leave out words seen fewer times than this (5 is the field's habit)")


class ScheduleConfig(Section):
    """How the learning rate changes, step by step."""

    kind: ScheduleKind = Field("constant", description="constant, step, cosine (to 0 at the last epoch) or noam")
    warmup_steps: NonNegativeInt = Field(0, description="the rate rises from 0 over this many steps first")
    step_size: PositiveInt = Field(3, description="step only: epochs from one reduction to the next")
    gamma: float = Field(0.8, gt=0, le=1, description="step only: what a reduction multiplies the rate by")

    @model_validator(mode="after")
    def _noam_needs_warmup(self) -> ScheduleConfig:
        if self.kind == "noam" and not self.warmup_steps:
            raise ValueError("noam falls from the end of the warm-up on: give warmup_steps")
        return self


class ScheduledSamplingConfig(Section):
    """Feeding the decoder its own words instead of the reference's (Bengio et al. 2015)."""

    max_prob: float = Field(
        0.0, ge=0, le=1, description="largest probability that a word is the decoder's own; 0: never"
    )
    prob_step: float = Field(0.05, gt=0, le=1, description="the probability grows by this much")
    step_epochs: PositiveInt = Field(5, description="after every so many epochs, from 0 in the first ones")


class ScstConfig(Section):
    """Self-critical training, with objective scst (Rennie et al. 2017)."""

    samples: int = Field(5, ge=2, description="captions drawn of each image; each is judged against the others")
    temperature: PositiveFloat = Field(
        1.0, description="captions are drawn from softmax(logits / this); less is nearer to greedy search"
    )
    bleu_weight: NonNegativeFloat = Field(0.0, description="weight of BLEU-4 beside CIDEr-D in the reward")


class TrainConfig(Section):
    """Stage two: grid features and captions to a decoder."""

    features: Path | None = Field(
        None, description="feature store to train on  [default: <data.features_dir>/train.h5]"
    )
    annotations: Path | None = Field(
        None, description="its captions  [default: those of the store's split in data.splits]"
    )
    val_features: Path | None = Field(
        None, description="feature store to validate on  [default: <data.features_dir>/val.h5 if it is there]"
    )
    val_annotations: Path | None = Field(None, description="its captions  [default: as for annotations]")
    output: Path = Field(Path("runs/attention"), description="folder of the run: checkpoints, metrics, configuration")
    init_from: Path | None = Field(
        None, description="begin with the decoder and the vocabulary of this run or checkpoint"
    )
    objective: Objective = Field(
        "cross-entropy", description="cross-entropy, or scst: reward for whole captions, from init_from on"
    )
    decoder: DecoderConfig = Field(AttentionConfig(), description="the decoder and its sizes")
    vocabulary: VocabularyConfig = VocabularyConfig()
    captions_per_image: PositiveInt = Field(5, description="captions of one image trained on together")
    max_length: PositiveInt = Field(30, description="longer captions are cut to this many words")
    epochs: PositiveInt = Field(20, description="passes over the training split")
    batch_size: PositiveInt = Field(
        32, description="images in one step of the optimizer, over all processes and parts together"
    )
    grad_accum_steps: PositiveInt = Field(
        1, description="parts that a process takes its images of a step in: less memory"
    )
    shuffle: Shuffle = Field(
        "rows", description="order of an epoch: all rows anew, or blocks of neighbors for disks that seek slowly"
    )
    optimizer: Optimizer = Field("adam", description="adam, or adamw: with decoupled weight decay")
    learning_rate: PositiveFloat = Field(1e-3, description="the optimizer's step size, at the schedule's top")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="pull of the weights towards 0 (adam: L2; adamw: decoupled)"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: PositiveFloat | None = Field(5.0, description="gradients are scaled down to at most this norm")
    max_grad_value: PositiveFloat | None = Field(None, description="each entry of a gradient is cut to at most this")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all words")
    scheduled_sampling: ScheduledSamplingConfig = ScheduledSamplingConfig()
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the running average of the weights that is kept; 0: none"
    )
    patience: PositiveInt | None = Field(
        None, description="stop when validation CIDEr has not risen for this many epochs"
    )
    scst: ScstConfig = ScstConfig()
    checkpoint_steps: PositiveInt | None = Field(None, description="write a checkpoint after every so many steps")
    checkpoint_minutes: PositiveFloat | None = Field(10.0, description="and when this many minutes have passed")
    precision: TrainPrecision = Field("auto", description="auto: bfloat16 where the hardware has it, else float32")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")


# What belongs to this run of a recipe and not to the recipe itself: where things are, and on what they run.
NOT_OF_A_RECIPE = frozenset(
    {
        "features",
        "annotations",
        "val_features",
        "val_annotations",
        "output",
        "init_from",
        "checkpoint_steps",
        "checkpoint_minutes",
        "precision",
        "device",
        "grad_accum_steps",
    }
)
