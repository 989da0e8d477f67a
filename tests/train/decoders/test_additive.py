"""The written-down gradient against the formula's own, by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridcap.train.decoders.additive import additive_keys, additive_scores


def ours(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    return additive_scores(additive_keys(keys), query, 2 * weight)


def formula(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Bahdanau's, word by word."""
    return torch.tanh(keys[:, None] + query[:, :, None]) @ weight + weight.sum()


def example(seed: int, b: int, k: int, cells: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, cells, size), (b, k, size), (size,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None)
def test_scores_and_all_three_gradients_are_the_formulas(seed: int, b: int, k: int, cells: int, size: int) -> None:
    inputs = [part.requires_grad_() for part in example(seed, b, k, cells, size)]
    found, expected = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(found, expected)
    seen = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=found.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, seen), torch.autograd.grad(expected, inputs, seen), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("in_cache", [1, 24, 1 << 21])
def test_without_gradient_the_scores_are_the_same_in_stretches_of_any_size(
    in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.train.decoders.additive._CACHE_ELEMENTS", in_cache)
    inputs = example(1, 5, 2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), formula(*inputs))


def test_large_values_saturate() -> None:
    keys = torch.tensor([[[1e4], [-1e4]]], requires_grad=True)
    for query in (0.0, 1e4, -1e4):
        keys.grad = None
        scores = ours(keys, torch.full((1, 1, 1), query), torch.ones(1))
        expected = {0.0: [2.0, 0.0], 1e4: [2.0, 1.0], -1e4: [1.0, 0.0]}[query]
        torch.testing.assert_close(scores, torch.tensor([[expected]]))
        scores.sum().backward()
        assert keys.grad is not None
        slopes = [[1.0 if score == 1 else 0.0] for score in expected]  # where they cancel, tanh's own
        torch.testing.assert_close(keys.grad, torch.tensor([slopes]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_keys_and_queries_that_cancel_each_other_give_what_is_left(dtype: torch.dtype) -> None:
    keys = torch.tensor([[[30.0], [-30.0], [30.5]]], dtype=dtype)
    query = torch.tensor([[[-30.0], [30.0]]], dtype=dtype)
    exact = formula(keys.double(), query.double(), torch.ones(1, dtype=torch.float64))
    scores = ours(keys, query, torch.ones(1))
    torch.testing.assert_close(scores.double(), exact, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


def test_under_autocast_the_weights_stay_float32_and_so_does_their_gradient() -> None:
    keys, query, weight = example(0, 2, 3, 4, 64, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = ours(keys.bfloat16(), query.bfloat16(), weight)
    assert scores.dtype == torch.bfloat16
    looks, exact = scores.float().softmax(-1), formula(keys, query, weight).softmax(-1)
    assert (looks - exact).abs().max() < 0.05
    scores.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_gradients_in_bfloat16_are_those_in_float64_to_two_hundredths(spread: float) -> None:
    exact = [part * spread for part in example(3, 4, 5, 16, 64)[:2]]
    weight = torch.randn(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    seen = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rounded = [part.bfloat16().requires_grad_() for part in (*exact, weight)]
    inputs = [part.detach().double().requires_grad_() for part in rounded]
    found = torch.autograd.grad(ours(*rounded), rounded, seen.bfloat16())
    wanted = torch.autograd.grad(formula(*inputs), inputs, seen.bfloat16().double())
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_the_weights_gradient_is_summed_over_the_words_in_its_own_type() -> None:
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(2, 16, 32, generator=generator).bfloat16()
    queries = torch.randn(60, 2, 3, 32, generator=generator).bfloat16()
    by_word = []
    weight = torch.randn(32, generator=generator).requires_grad_()
    for words in (*queries[:, None], queries):
        double = 2 * weight
        total = sum(additive_scores(additive_keys(keys), query, double).float().sum() for query in words)
        by_word += torch.autograd.grad(total, weight)
    assert by_word[-1].dtype == torch.float32
    exact = torch.stack(by_word[:-1]).double().sum(0)
    torch.testing.assert_close(by_word[-1].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_only_the_gradients_that_are_wanted(needed: tuple[bool, ...]) -> None:
    inputs = [part.requires_grad_(want) for part, want in zip(example(0, 1, 2, 3, 4), needed, strict=True)]
    ours(*inputs).sum().backward()
    assert [part.grad is not None for part in inputs] == list(needed)
