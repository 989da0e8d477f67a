import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from train.loss import masked_cross_entropy
from train.vocabulary import PAD


def example(seed=0, shape=(2, 3, 5), words=9, padded=0.4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, words, generator=generator).requires_grad_()
    targets = torch.randint(1, words, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < padded] = PAD
    targets[0, 0, 0] = 1
    return logits, targets


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_loss_equals_torchs_cross_entropy_on_the_words_that_are_there(seed, captions, tokens):
    logits, targets = example(seed, (2, captions, tokens))
    there = targets != PAD
    total, count = masked_cross_entropy(logits, targets)
    assert int(count) == int(there.sum())
    expected = F.cross_entropy(logits[there], targets[there], reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_has_no_gradient_and_words_have():
    logits, targets = example()
    masked_cross_entropy(logits, targets)[0].backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, targets != PAD)


def test_what_stands_at_padding_does_not_matter():
    logits, targets = example()
    other = logits.detach().clone()
    other[targets == PAD] = 1e4
    assert masked_cross_entropy(other, targets)[0].item() == masked_cross_entropy(logits, targets)[0].item()


def test_uniform_logits_give_the_perplexity_of_the_vocabulary_size():
    total, count = masked_cross_entropy(torch.zeros(3, 4, 11), torch.full((3, 4), 5))
    assert (total / count).exp().item() == pytest.approx(11)


def test_half_precision_logits_are_summed_in_float32():
    logits, targets = example(shape=(8, 5, 20), words=30)
    total, _ = masked_cross_entropy(logits.bfloat16(), targets)
    assert total.dtype == torch.float32
    assert total.item() == masked_cross_entropy(logits.bfloat16().float(), targets)[0].item()
