"""Explicit gradients of additive attention against autograd."""

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
    """Compute Bahdanau's formula directly."""
    return torch.tanh(keys[:, None] + query[:, :, None]) @ weight + weight.sum()


def example(seed: int, b: int, k: int, cells: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, cells, size), (b, k, size), (size,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None)
def test_scores_and_gradients_equal_autograd(seed: int, b: int, k: int, cells: int, size: int) -> None:
    inputs = [part.requires_grad_() for part in example(seed, b, k, cells, size)]
    actual, expected = ours(*inputs), formula(*inputs)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=actual.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("cache_elements", [1, 24, 1 << 21])
def test_chunked_scores_without_gradient_equal_the_formula(
    cache_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gridcap.train.decoders.additive._CACHE_ELEMENTS", cache_elements)
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
        slopes = [[1.0 if score == 1 else 0.0] for score in expected]  # where key and query cancel, the slope of tanh
        torch.testing.assert_close(keys.grad, torch.tensor([slopes]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_keys_and_queries_that_cancel_are_accurate(dtype: torch.dtype) -> None:
    keys = torch.tensor([[[30.0], [-30.0], [30.5]]], dtype=dtype)
    query = torch.tensor([[[-30.0], [30.0]]], dtype=dtype)
    exact = formula(keys.double(), query.double(), torch.ones(1, dtype=torch.float64))
    scores = ours(keys, query, torch.ones(1))
    torch.testing.assert_close(scores.double(), exact, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


def test_weight_gradient_is_float32_under_autocast() -> None:
    keys, query, weight = example(0, 2, 3, 4, 64, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        scores = ours(keys.bfloat16(), query.bfloat16(), weight)
    assert scores.dtype == torch.bfloat16
    weights, exact = scores.float().softmax(-1), formula(keys, query, weight).softmax(-1)
    assert (weights - exact).abs().max() < 0.05
    scores.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_bfloat16_gradients_are_within_two_percent_of_float64(spread: float) -> None:
    exact = [part * spread for part in example(3, 4, 5, 16, 64)[:2]]
    weight = torch.randn(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    upstream = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rounded = [part.bfloat16().requires_grad_() for part in (*exact, weight)]
    inputs = [part.detach().double().requires_grad_() for part in rounded]
    actual = torch.autograd.grad(ours(*rounded), rounded, upstream.bfloat16())
    expected = torch.autograd.grad(formula(*inputs), inputs, upstream.bfloat16().double())
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_weight_gradient_accumulates_over_time_steps_in_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(2, 16, 32, generator=generator).bfloat16()
    queries = torch.randn(60, 2, 3, 32, generator=generator).bfloat16()
    by_step = []
    weight = torch.randn(32, generator=generator).requires_grad_()
    for steps in (*queries[:, None], queries):
        double = 2 * weight
        total = sum(additive_scores(additive_keys(keys), query, double).float().sum() for query in steps)
        by_step += torch.autograd.grad(total, weight)
    assert by_step[-1].dtype == torch.float32
    exact = torch.stack(by_step[:-1]).double().sum(0)
    torch.testing.assert_close(by_step[-1].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_only_required_gradients_are_computed(needed: tuple[bool, ...]) -> None:
    inputs = [part.requires_grad_(want) for part, want in zip(example(0, 1, 2, 3, 4), needed, strict=True)]
    ours(*inputs).sum().backward()
    assert [part.grad is not None for part in inputs] == list(needed)
