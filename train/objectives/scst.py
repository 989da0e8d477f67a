"""Self-critical sequence training (SCST): policy gradient with caption-level rewards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F  # noqa: N812 (the conventional name)
from torch import Tensor, nn

from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import BOS, PAD
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoding.base import mask_forbidden
from gridcap.train.decoding.sampling import SamplingOptions, sample_tokens
from gridcap.train.objectives.base import Terms
from gridcap.train.objectives.reward import CaptionReward


class SelfCritical:
    """Policy gradient on the reward of sampled captions (Rennie et al. 2017, arXiv:1612.00563).

    Several captions are sampled per image. The baseline of each is the mean reward of the others (leave-one-out: Kool
    et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; for captioning, Luo 2020, arXiv:2003.09971):
    loss = -(reward - baseline) * log-probability of the caption.

    A second pass with teacher forcing computes the log-probabilities of the sampled captions, which is faster than
    sampling with gradients. Meanwhile, another thread computes the rewards. Both passes run without dropout: the policy
    gradient is unbiased only if the captions are samples of the distribution that is differentiated, and two dropout
    masks give two distributions.

    With a temperature, captions are sampled from softmax(logits / temperature), and the objective is the expected
    reward under that distribution; greedy decoding does not depend on the temperature. A high-entropy decoder (trained
    on few images or with label smoothing) samples captions that are far worse than its greedy ones. At temperature 1,
    it first learns to avoid risks with short and generic captions, which lowers the CIDEr of greedy decoding.

    Args:
        reward: reward of captions of the training images.
        samples: number of captions sampled per image.
        max_length: maximum length of a sampled caption, in tokens.
        temperature: sampling temperature.
    """

    term_names: tuple[str, ...] = ("tokens", "captions", "reward", "baseline", "advantage")
    capturable = False  # the host computes the rewards

    def __init__(self, reward: CaptionReward, samples: int, max_length: int, temperature: float = 1.0) -> None:
        self._reward, self._samples = reward, samples
        self._options = SamplingOptions(max_length, temperature)

    def variant(self, epoch: int) -> None:
        """Return None: epochs do not differ."""

    def __call__(self, decoder: Decoder, batch: CaptionBatch, epoch: int) -> tuple[Tensor, Terms]:
        """Compute the loss as defined by `Objective`.

        The terms are the number of "captions" and, summed over them, the "reward", the "baseline", and the absolute
        "advantage" (reward - baseline).
        """
        grids = batch.grids.float()
        _disable_dropout(decoder)
        with torch.no_grad():
            sampled = sample_tokens(decoder, decoder.encode(grids), self._samples, self._options)
        torch.clear_autocast_cache()  # before torch 2.10, weights cast without gradient would be reused below
        with ThreadPoolExecutor(1, thread_name_prefix="reward") as thread:
            future = thread.submit(self._reward, batch.images, sampled.cpu().numpy())
            positions = (sampled != PAD).flatten().nonzero()[:, 0]
            log_probs = self._log_probs(decoder, grids, sampled, positions)
            rewards = torch.from_numpy(future.result()).to(grids.device)
        decoder.train()
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (self._samples - 1)
        advantage = rewards - baseline
        loss = -(advantage[..., None].expand(sampled.shape).flatten()[positions] * log_probs).sum()
        counts = torch.tensor([len(positions), rewards.numel()], device=grids.device)
        return loss, {
            "tokens": counts[0],
            "captions": counts[1],
            "reward": rewards.sum(),
            "baseline": baseline.sum(),
            "advantage": advantage.abs().sum(),
        }

    def _log_probs(self, decoder: Decoder, grids: Tensor, sampled: Tensor, positions: Tensor) -> Tensor:
        """Return the log-probabilities of sampled tokens under the sampling distribution.

        Args:
            decoder: decoder that sampled the captions.
            grids: (B, P, C) float32.
            sampled: (B, K, T) int64.
            positions: (N,) int64, indices into the flattened captions.

        Returns:
            (N,) float, with gradient.
        """
        inputs = torch.cat([torch.full_like(sampled[..., :1], BOS), sampled[..., :-1]], -1)
        logits, _ = decoder(decoder.encode(grids), inputs, positions)
        scaled = mask_forbidden(logits, self._options.forbidden) / self._options.temperature
        return -F.cross_entropy(scaled, sampled.flatten()[positions], reduction="none")


def _disable_dropout(decoder: Decoder) -> None:
    """Disable dropout until the next call of `decoder.train()`.

    Other modules stay in training mode, because cuDNN supports the backward pass of an LSTM in training mode only.
    """
    decoder.train()
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
