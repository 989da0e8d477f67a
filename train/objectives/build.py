"""Build the objective that a configuration names."""

from __future__ import annotations

from gridcap.common.config import TrainConfig
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.objectives.base import Objective
from gridcap.train.objectives.cross_entropy import CrossEntropy
from gridcap.train.objectives.reward import CaptionReward
from gridcap.train.objectives.scst import SelfCritical


def build_objective(settings: TrainConfig, data: CaptionedImages, vocabulary: Vocabulary) -> Objective:
    """Return the objective of `settings.objective`.

    Args:
        settings: train section of the configuration.
        data: training images; their captions are the references of the SCST reward.
        vocabulary: vocabulary of the decoder.
    """
    if settings.objective == "cross-entropy":
        return CrossEntropy(settings)
    reward = CaptionReward.build(data, vocabulary, settings.scst.bleu_weight)
    return SelfCritical(reward, settings.scst.samples, settings.max_length, settings.scst.temperature)
