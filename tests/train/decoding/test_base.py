"""The token distribution that all decoding methods share."""

import pytest
import torch

from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoding.base import mask_forbidden, token_log_probs
from gridcap.train.decoding.beam import BeamOptions, beam_search_nbest
from gridcap.train.decoding.sampling import SamplingOptions, sample_hypotheses
from tests.train.decoding.table_decoders import ChainDecoder, V, without_specials


def test_token_log_probs_exclude_pad_bos_and_unk():
    logits = torch.randn(2, 3, 4, V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    log_probs = token_log_probs(logits)
    assert torch.equal(logits, before), "the input is not modified"
    assert torch.allclose(log_probs, without_specials(logits), atol=1e-6)
    assert torch.isneginf(log_probs[..., [PAD, BOS, UNK]]).all()
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("forbidden", [(), (4,), (UNK, 5)])
def test_forbidden_tokens_are_an_argument_of_decoding(forbidden):
    """The table prefers the forbidden tokens by far, and no method generates them or counts their probability."""
    decoder = ChainDecoder(torch.zeros(V, V))
    decoder.table[:, [PAD, BOS, *forbidden]] += 30
    allowed = V - 2 - len(forbidden)
    log_probs = token_log_probs(decoder.table[0], forbidden)
    assert log_probs.isfinite().sum() == allowed
    torch.testing.assert_close(log_probs.max(), -torch.tensor(float(allowed)).log())
    for hypothesis in (
        *beam_search_nbest(decoder, torch.zeros(1, 1, 1), BeamOptions(4, 3, forbidden=forbidden))[0],
        *sample_hypotheses(decoder, torch.zeros(20, 1, 1), SamplingOptions(3, forbidden=forbidden)),
    ):
        assert not {PAD, BOS, *forbidden} & set(hypothesis.tokens)


def test_token_log_probs_are_float32_for_any_input_dtype():
    logits = torch.tensor([0.0, 0.0, 10.0, 0.0, 3.0, 0.01, -7.0])
    log_probs = token_log_probs(logits.bfloat16())
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs, without_specials(logits.bfloat16().float()), atol=1e-6)
    assert mask_forbidden(logits.bfloat16()).dtype == torch.float32


def test_token_log_probs_have_finite_gradients_and_none_for_masked_tokens():
    logits = torch.randn(2, 3, 4, V, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.tensor([4, 5, EOS, PAD]).expand(2, 3, 4)
    picked = token_log_probs(logits).gather(-1, targets[..., None])[..., 0].masked_fill(targets == PAD, 0.0)
    picked.sum().backward()
    assert torch.isfinite(picked).all()
    assert torch.isfinite(logits.grad).all()
    probs = without_specials(logits.detach()).exp()
    expected = torch.nn.functional.one_hot(targets, V) - probs
    expected[:, :, 3] = 0
    assert torch.allclose(logits.grad, expected, atol=1e-6)
