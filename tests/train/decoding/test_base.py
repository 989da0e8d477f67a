"""The token distribution that all decoding methods share."""

import torch

from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoding.base import mask_special_tokens, token_log_probs
from tests.train.decoding.table_decoders import V, without_specials


def test_token_log_probs_exclude_pad_bos_and_unk():
    logits = torch.randn(2, 3, 4, V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    log_probs = token_log_probs(logits)
    assert torch.equal(logits, before), "the input is not modified"
    assert torch.allclose(log_probs, without_specials(logits), atol=1e-6)
    assert torch.isneginf(log_probs[..., [PAD, BOS, UNK]]).all()
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 3, 4))


def test_token_log_probs_are_float32_for_any_input_dtype():
    logits = torch.tensor([0.0, 0.0, 10.0, 0.0, 3.0, 0.01, -7.0])
    log_probs = token_log_probs(logits.bfloat16())
    assert log_probs.dtype == torch.float32
    assert torch.allclose(log_probs, without_specials(logits.bfloat16().float()), atol=1e-6)
    assert mask_special_tokens(logits.bfloat16()).dtype == torch.float32


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
