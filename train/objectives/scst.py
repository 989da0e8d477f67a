"""Self-critical training: the decoder's own captions, rewarded by what they are judged by."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import BOS, PAD
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.base import mask_special_tokens
from gridcap.train.decoding.sampling import SamplingOptions, sample_tokens
from gridcap.train.objectives.base import Terms
from gridcap.train.objectives.reward import CaptionReward


class SelfCritical:
    """Policy gradient with the reward of whole captions (Rennie et al. 2017, arXiv:1612.00563).

    Of each image some captions are drawn, and each is compared with the mean reward of the others (leave-one-out:
    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; for captions Luo 2020,
    arXiv:2003.09971): loss = -(reward - mean reward of the others) x log-probability of its words.

    The captions are drawn without dropout, and then read once more with it: teacher forcing over all words at once
    is quicker than a second walk. Meanwhile another thread counts the rewards.

    Captions may be drawn from softmax(logits / temperature), whose mean reward is then what is raised; greedy search
    is the same at every temperature. A decoder that is not sure of its words, after few images or label smoothing,
    draws captions far worse than its greedy ones. At temperature 1 it is then taught to avoid risks first, with short
    and general captions, and greedy search gets worse with it.

    Args:
        reward: of the training images' captions.
        samples: captions drawn of each image.
        max_length: of them, in words.
        temperature: that they are drawn with.
    """

    def __init__(self, reward: CaptionReward, samples: int, max_length: int, temperature: float = 1.0) -> None:
        self._reward, self._samples, self._max_length = reward, samples, max_length
        self._temperature = temperature

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """As `Objective`; the log has "captions" and, summed over them, their "reward", the "baseline" each was
        compared with, and how far from it they were ("advantage", without sign)."""
        grids = batch.grids.float()
        decoder.eval()
        with torch.no_grad():
            drawn = sample_tokens(
                decoder, decoder.encode(grids), self._samples, SamplingOptions(self._max_length, self._temperature)
            )
        torch.clear_autocast_cache()  # before torch 2.10 the weights cast without gradient would be used again
        decoder.train()
        with ThreadPoolExecutor(1, thread_name_prefix="reward") as thread:
            counted = thread.submit(self._reward, batch.images, drawn.cpu().numpy())
            given = torch.cat([torch.full_like(drawn[..., :1], BOS), drawn[..., :-1]], -1)
            written = (drawn != PAD).flatten().nonzero()[:, 0]
            logits, _ = decoder(decoder.encode(grids), given, written)
            scaled = mask_special_tokens(logits) / self._temperature
            log_probs = -F.cross_entropy(scaled, drawn.flatten()[written], reduction="none")
            rewards = torch.from_numpy(counted.result()).to(grids.device)
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (self._samples - 1)
        advantage = rewards - baseline
        loss = -(advantage[..., None].expand(drawn.shape).flatten()[written] * log_probs).sum()
        counts = torch.tensor([len(written), rewards.numel()], device=grids.device)
        return loss, {
            "words": counts[0],
            "captions": counts[1],
            "reward": rewards.sum(),
            "baseline": baseline.sum(),
            "advantage": advantage.abs().sum(),
        }
