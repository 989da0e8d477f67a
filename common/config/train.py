"""Settings of training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from gridcap.common.config.decoders import DecoderSettings
from gridcap.common.config.section import Section

TrainPrecision = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adam", "adamw", "sgd"]
ScheduleKind = Literal["constant", "step", "linear", "cosine", "noam"]
Objective = Literal["cross-entropy", "scst"]
Shuffle = Literal["rows", "blocks"]
CudaGraph = Literal["auto", "on", "off"]
TokenizerKind = Literal["words", "characters", "bpe", "auto"]


class VocabularyConfig(Section):
    """The vocabulary, counted over the training split only."""

    max_size: int | None = Field(
        10000, ge=5, description="maximum vocabulary size, special tokens included; null: unlimited (not with bpe)"
    )
    min_count: PositiveInt | None = Field(
        None,
        description="minimum count of a word, or of a merge of bpe; null: 1 to 5, depending on the number of captions",
    )


class ScheduleConfig(Section):
    """Learning rate schedule, applied per step."""

    kind: ScheduleKind = Field(
        "cosine", description="constant, step, linear or cosine (to 0 at the last epoch), or noam"
    )
    warmup_steps: NonNegativeInt = Field(50, description="linear warmup from 0 over this many steps")
    step_size: PositiveInt = Field(3, description="step only: epochs between reductions")
    gamma: float = Field(0.8, gt=0, le=1, description="step only: factor of each reduction")

    @model_validator(mode="after")
    def _noam_needs_warmup(self) -> ScheduleConfig:
        if self.kind == "noam" and not self.warmup_steps:
            raise ValueError("noam requires warmup_steps: the rate decays from the end of the warmup")
        return self


class ScheduledSamplingConfig(Section):
    """Scheduled sampling: feed the decoder its own predictions instead of the reference tokens (Bengio et al. 2015)."""

    max_prob: float = Field(
        0.0, ge=0, le=1, description="maximum probability of feeding a predicted token; 0: teacher forcing only"
    )
    prob_step: float = Field(0.05, gt=0, le=1, description="increase of the probability per increment")
    step_epochs: PositiveInt = Field(5, description="epochs between increments, starting from probability 0")


class ScstConfig(Section):
    """Self-critical sequence training, for objective scst (Rennie et al. 2017)."""

    samples: int = Field(
        5, ge=2, description="captions sampled per image; the baseline of each is the mean reward of the others"
    )
    temperature: PositiveFloat = Field(
        1.0, description="sampling temperature: <1 sharpens the distribution, >1 flattens it"
    )
    bleu_weight: NonNegativeFloat = Field(0.0, description="weight of BLEU-4 in the reward, added to CIDEr-D")


class TrainConfig(Section):
    """Stage two: feature grids and captions to a decoder."""

    features: Path | None = Field(
        None, description="feature store to train on  [default: <data.features_dir>/train.h5]"
    )
    annotations: Path | None = Field(
        None, description="captions file of the training store  [default: that of the store's split in data.splits]"
    )
    val_features: Path | None = Field(
        None, description="feature store to validate on  [default: <data.features_dir>/val.h5 if it exists]"
    )
    val_annotations: Path | None = Field(
        None, description="captions file of the validation store  [default: as for annotations]"
    )
    val_fraction: float | None = Field(
        None, gt=0, lt=1, description="validate on a random share of the images of the training store instead"
    )
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="set a random share of the images aside, to be evaluated with --split test"
    )
    output: Path = Field(
        Path("runs/attention"), description="output folder of the run: checkpoints, metrics, configuration"
    )
    init_from: Path | None = Field(
        None, description="run or checkpoint whose decoder and vocabulary training starts from"
    )
    objective: Objective = Field(
        "cross-entropy",
        description="training objective: cross-entropy, or scst (CIDEr-D reward, starts from init_from)",
    )
    decoder: SerializeAsAny[DecoderSettings] = Field(DecoderSettings(), description="decoder family and its settings")
    tokenizer: TokenizerKind | Path = Field(
        "words",
        union_mode="left_to_right",
        description="units that captions consist of: words, characters, bpe (subwords; vocabulary.max_size sets their "
        "number), auto (words, or what fits a language without spaces), or the path of a tokenizer.json",
    )
    vocabulary: VocabularyConfig = VocabularyConfig()
    min_vocabulary: NonNegativeInt = Field(
        20,
        description="minimum number of words (or other units) in the vocabulary; with fewer, training does not start",
    )
    max_unk: float = Field(
        0.3,
        ge=0,
        le=1,
        description="maximum fraction of UNK in the training captions; with more, training does not start",
    )
    captions_per_image: PositiveInt = Field(5, description="captions per image and step")
    max_length: PositiveInt = Field(30, description="maximum caption length in tokens; longer captions are truncated")
    epochs: PositiveInt | None = Field(
        None,
        description="epochs over the training split; null: 60,000 divided by the number of images, from 12 to 40",
    )
    batch_size: PositiveInt | None = Field(
        None,
        description="images per optimizer step, over all ranks and gradient accumulation steps; null: the number of "
        "images divided by 500, from 10 to 64",
    )
    grad_accum_steps: PositiveInt = Field(1, description="gradient accumulation steps")
    shuffle: Shuffle = Field(
        "rows",
        description="epoch order: rows (full shuffle) or blocks (of neighboring rows, for disks with slow seeks)",
    )
    optimizer: Optimizer = Field("adam", description="optimizer: adam, adamw (decoupled weight decay), or sgd")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only: momentum")
    learning_rate: PositiveFloat = Field(7e-4, description="peak learning rate")
    weight_decay: NonNegativeFloat = Field(0.0, description="weight decay (adam, sgd: L2 penalty; adamw: decoupled)")
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: PositiveFloat | None = Field(5.0, description="maximum gradient norm; null: no clipping")
    max_grad_value: PositiveFloat | None = Field(
        None, description="maximum absolute value of gradient elements; null: no clipping"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    scheduled_sampling: ScheduledSamplingConfig = ScheduledSamplingConfig()
    ema_decay: float = Field(
        0.995, ge=0, lt=1, description="decay of the exponential moving average (EMA) of the weights; 0: no EMA"
    )
    patience: PositiveInt | None = Field(
        None, description="early stopping: epochs without improvement of the validation CIDEr"
    )
    scst: ScstConfig = ScstConfig()
    checkpoint_steps: PositiveInt | None = Field(None, description="steps between checkpoints")
    checkpoint_minutes: PositiveFloat | None = Field(
        10.0, description="minutes between checkpoints; null: only at the end of each epoch"
    )
    precision: TrainPrecision = Field(
        "auto", description="training precision; auto: bfloat16 if the hardware supports it, else float32"
    )
    device: str = Field("auto", description="device: auto, cpu, cuda, cuda:1, ...")
    cuda_graph: CudaGraph = Field(
        "auto",
        description="replay training steps as CUDA graphs; auto: on a GPU, if the captured step gives the same results",
    )

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _tokenizer_is_a_choice_or_a_json_file(cls, value: object) -> object:
        if value not in get_args(TokenizerKind) and not str(value).endswith(".json"):
            raise ValueError("choose words, characters, bpe, auto, or the path of a tokenizer.json")
        return value


# Settings of a run rather than of a recipe: paths, hardware, and limits of checks. A recipe leaves them unchanged.
RUN_SETTINGS = frozenset(
    {
        "features",
        "annotations",
        "val_features",
        "val_annotations",
        "val_fraction",
        "test_fraction",
        "output",
        "init_from",
        "checkpoint_steps",
        "checkpoint_minutes",
        "precision",
        "device",
        "cuda_graph",
        "grad_accum_steps",
        "min_vocabulary",
        "max_unk",
    }
)
