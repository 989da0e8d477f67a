import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.data.vocabulary import PAD
from gridcap.train.objectives.loss import attention_reg, masked_cross_entropy, perplexity, smoothed_cross_entropy


def example(seed=0, shape=(2, 3, 5), vocab_size=9, padded=0.4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab_size, generator=generator).requires_grad_()
    targets = torch.randint(1, vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < padded] = PAD
    targets[0, 0, 0] = 1
    return logits, targets


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_loss_equals_torch_cross_entropy_without_padding(seed, captions, tokens):
    logits, targets = example(seed, (2, captions, tokens))
    mask = targets != PAD
    total, count = masked_cross_entropy(logits, targets)
    assert int(count) == int(mask.sum())
    expected = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_has_no_gradient():
    logits, targets = example()
    masked_cross_entropy(logits, targets)[0].backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, targets != PAD)


def test_logits_at_padding_are_ignored():
    logits, targets = example()
    other = logits.detach().clone()
    other[targets == PAD] = 1e4
    assert masked_cross_entropy(other, targets)[0].item() == masked_cross_entropy(logits, targets)[0].item()


def test_uniform_logits_have_perplexity_of_the_vocabulary_size():
    total, count = masked_cross_entropy(torch.zeros(3, 4, 11), torch.full((3, 4), 5))
    assert (total / count).exp().item() == pytest.approx(11)


def test_half_precision_logits_are_summed_in_float32():
    logits, targets = example(shape=(8, 5, 20), vocab_size=30)
    total, _ = masked_cross_entropy(logits.bfloat16(), targets)
    assert total.dtype == torch.float32
    assert total.item() == masked_cross_entropy(logits.bfloat16().float(), targets)[0].item()


def test_extremely_unlikely_tokens_have_exact_loss_and_gradient():
    logits = torch.tensor([[0.0, 0.0, 300.0, 0.0], [0.0, 0.0, 300.0, 300.0]])
    total, plain, _ = smoothed_cross_entropy(logits.requires_grad_(), torch.tensor([1, 3]), 0.0)
    assert plain.item() == pytest.approx(300 + math.log(2), rel=1e-6)
    total.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -1, 1, 0], [0, 0, 0.5, -0.5]]))


# --- label smoothing ---


@given(st.integers(0, 10_000), st.floats(0.01, 0.9))
def test_label_smoothing_is_uniform_over_the_vocabulary(seed, share):
    logits, targets = example(seed)
    total, plain, count = smoothed_cross_entropy(logits.flatten(0, -2), targets.flatten(), share)
    log_probs = logits.log_softmax(-1)
    expected = 0.0
    for index in (targets != PAD).nonzero().tolist():
        row = log_probs[tuple(index)]
        distribution = torch.full((9,), share / 9)
        distribution[targets[tuple(index)]] += 1 - share
        expected -= (distribution * row).sum().item()
    assert int(count) == int((targets != PAD).sum())
    assert total.item() == pytest.approx(expected, rel=1e-4)
    mask = targets != PAD
    reference = F.cross_entropy(logits[mask], targets[mask], reduction="sum", label_smoothing=share)
    assert total.item() == pytest.approx(reference.item(), rel=1e-5)
    assert plain.item() == pytest.approx(masked_cross_entropy(logits, targets)[0].item(), rel=1e-5)
    assert not plain.requires_grad


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.7]), st.sampled_from([1, 30, 1 << 19]))
def test_gradient_equals_torch_cross_entropy_for_any_chunk_size(seed, share, chunk_size):
    logits, targets = example(seed)
    rows, flat_targets = logits.flatten(0, -2), targets.flatten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.objectives.loss._CHUNK_SIZE", chunk_size)
        total, plain, _ = smoothed_cross_entropy(rows, flat_targets, share)
    (alone,) = torch.autograd.grad(total, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(3 * total, logits)
    torch.testing.assert_close(3 * alone, gradient)
    kept = flat_targets != PAD
    expected = F.cross_entropy(rows[kept], flat_targets[kept], reduction="sum", label_smoothing=share)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain.item() == pytest.approx(
        F.cross_entropy(rows[kept], flat_targets[kept], reduction="sum").item(), rel=1e-5
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, logits)[0])


def test_half_precision_logits_get_half_precision_gradient_of_float32_loss():
    logits, targets = example()
    half = logits.detach().bfloat16().requires_grad_()
    total, plain, _ = smoothed_cross_entropy(half.flatten(0, -2), targets.flatten(), 0.1)
    assert total.dtype == plain.dtype == torch.float32
    total.backward()
    exact = half.detach().float().requires_grad_()
    smoothed_cross_entropy(exact.flatten(0, -2), targets.flatten(), 0.1)[0].backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.float(), exact.grad, rtol=0.01, atol=1e-3)


def test_batch_without_tokens_has_zero_loss():
    total, plain, tokens = smoothed_cross_entropy(torch.zeros(0, 9, requires_grad=True), torch.zeros(0).long(), 0.1)
    assert (total.item(), plain.item(), int(tokens)) == (0, 0, 0)


# --- attention regularization ---


def attention_of(*captions):
    """Return attention weights of shape (1, K, T, P)."""
    return torch.tensor([captions], dtype=torch.float32)


def test_attention_penalty_equals_the_formula_of_xu():
    """Two cells, whose weights sum to 0.9 + 0.7 and 0.1 + 0.3 over the first caption, and so on."""
    attention = attention_of([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]], [[0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])
    targets = torch.tensor([[[5, 2, PAD], [7, 8, 2]]])
    first = ((1 - 1.6) ** 2 + (1 - 0.4) ** 2) / 2
    second = ((1 - 1.2) ** 2 + (1 - 1.8) ** 2) / 2
    assert attention_reg(attention, targets).item() == pytest.approx(first + second)


def test_attention_penalty_is_that_of_the_released_code_at_its_batch_size():
    """cost = (-log p of each caption).mean() + ((1 - alphas.sum(time)) ** 2).sum(batch).mean(cells)."""
    captions = 64
    alphas = torch.randn(captions, 1, 7, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    targets = torch.full((captions, 1, 7), 5)
    nll = torch.rand(captions, generator=torch.Generator().manual_seed(1))
    released = nll.mean() + ((1 - alphas[:, 0].sum(1)) ** 2).sum(0).mean()
    ours = nll.sum() + captions * attention_reg(alphas, targets)
    torch.testing.assert_close(ours, captions * released)


def test_attention_that_sums_to_one_per_cell_has_no_penalty():
    attention = attention_of([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    targets = torch.tensor([[[5, 6, 2, PAD]]])
    assert attention_reg(attention, targets).item() == pytest.approx(0)
    assert attention_reg(attention, torch.tensor([[[5, 6, 7, 2]]])).item() > 0.1


def test_empty_caption_has_no_penalty():
    attention = torch.rand(2, 3, 4, 5).softmax(-1)
    targets = torch.full((2, 3, 4), 5)
    targets[1, 2] = PAD
    targets[0, 1] = PAD
    captions = [(b, k) for b in range(2) for k in range(3) if (b, k) not in ((1, 2), (0, 1))]
    apart = sum(
        attention_reg(attention[b : b + 1, k : k + 1], targets[b : b + 1, k : k + 1]).item() for b, k in captions
    )
    assert attention_reg(attention, targets).item() == pytest.approx(apart, rel=1e-5)


def test_penalty_has_gradient_except_at_padding():
    scores = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([[[5, 6, 2, PAD], [2, PAD, PAD, PAD]]])
    attention_reg(scores.softmax(-1), targets).backward()
    assert torch.equal(scores.grad.abs().sum(-1) > 1e-7, targets != PAD)


def test_half_precision_attention_is_summed_in_float32():
    assert attention_reg(torch.rand(2, 2, 3, 4).bfloat16(), torch.ones(2, 2, 3).long()).dtype == torch.float32


# --- perplexity ---


def test_perplexity_overflows_to_infinity():
    assert perplexity(0.0) == 1
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(708.0) < math.inf
    assert perplexity(800.0) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan)) or perplexity(math.nan) == math.inf
