"""The fused operator of additive attention against its formula, on the CPU and with Triton's interpreter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gridcap.train.decoders.layers.additive import additive_powers, additive_scores, additive_scores_reference

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_cpu(keys: Tensor, query: Tensor, score: Tensor) -> Tensor:
    return additive_scores(keys, additive_powers(keys), query, score)


class Interpreted(torch.autograd.Function):
    """The Triton kernels, run on CPU tensors by Triton's interpreter."""

    kernels = None

    @staticmethod
    def forward(ctx, keys, query, score):  # type: ignore[no-untyped-def]
        inputs = additive_powers(keys), query, score
        ctx.save_for_backward(*inputs)
        return Interpreted.kernels.scores(*inputs)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return Interpreted.kernels.backward(gradient, *ctx.saved_tensors)


@pytest.fixture(scope="module")
def with_triton() -> Scores:
    """Return the Triton kernels on CPU tensors; `tests/conftest.py` sets TRITON_INTERPRET."""
    if not os.environ.get("CI"):
        pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is set only on machines without a GPU")
    Interpreted.kernels = importlib.import_module("gridcap.train.decoders.layers.additive_triton")
    return Interpreted.apply


def example(seed: int, b: int, k: int, cells: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, cells, size), (b, k, size), (size,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradients(scores: Scores, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = [part.detach().clone().requires_grad_() for part in inputs]
    actual = scores(*inputs)
    return actual.detach(), torch.autograd.grad(actual, inputs, upstream.to(actual.dtype))


def check(scores: Scores, inputs: list[Tensor], tolerance: float, seed: int = 1) -> None:
    """Compare scores and gradients with those of the formula in float64, relative to the norm of each."""
    b, k, cells = len(inputs[0]), inputs[1].shape[1], inputs[0].shape[1]
    upstream = torch.randn(b, k, cells, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actual, ours = gradients(scores, inputs, upstream)
    expected, exact = gradients(additive_scores_reference, [part.double() for part in inputs], upstream)
    assert [part.dtype for part in ours] == [part.dtype for part in inputs]
    for mine, theirs in zip((actual, *ours), (expected, *exact), strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-12


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(deadline=None)
def test_scores_and_gradients_equal_the_formula(seed: int, b: int, k: int, cells: int, size: int) -> None:
    check(on_cpu, example(seed, b, k, cells, size), 1e-9, seed)


def test_gradients_pass_gradcheck() -> None:
    inputs = [part.requires_grad_() for part in example(0, 2, 3, 4, 5)]
    assert torch.autograd.gradcheck(on_cpu, inputs)


@pytest.mark.parametrize(
    ("b", "k", "cells", "size"), [(1, 1, 1, 1), (2, 5, 64, 32), (2, 3, 70, 40), (3, 1, 9, 33), (1, 2, 130, 7)]
)
def test_triton_kernels_equal_the_formula(with_triton: Scores, b: int, k: int, cells: int, size: int) -> None:
    check(with_triton, example(b + cells, b, k, cells, size, torch.float32), 1e-5)


def test_triton_kernels_in_bfloat16_are_within_two_percent(with_triton: Scores) -> None:
    keys, query, score = example(2, 2, 5, 66, 40, torch.bfloat16)
    check(with_triton, [keys, query, score.float()], 0.02)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_bfloat16_is_within_two_percent_of_float64(spread: float) -> None:
    keys, query, score = (part * spread for part in example(3, 4, 5, 16, 64))
    check(on_cpu, [keys.bfloat16(), query.bfloat16(), score.bfloat16()], 0.02)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_large_values_saturate(backend: str, request: pytest.FixtureRequest) -> None:
    scores = on_cpu if backend == "cpu" else request.getfixturevalue("with_triton")
    for query, expected in {0.0: [1.0, -1.0], 1e4: [1.0, 0.0], -1e4: [0.0, -1.0]}.items():
        keys = torch.tensor([[[1e4], [-1e4]]], requires_grad=True)
        actual = scores(keys, torch.full((1, 1, 1), query), torch.ones(1))
        torch.testing.assert_close(actual, torch.tensor([[expected]]))
        actual.sum().backward()
        slopes = [[0.0 if value else 1.0] for value in expected]  # where key and query cancel, the slope of tanh
        torch.testing.assert_close(keys.grad, torch.tensor([slopes]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_keys_and_queries_that_cancel_are_accurate(dtype: torch.dtype) -> None:
    keys = torch.tensor([[[30.0], [-30.0], [30.5]]], dtype=dtype)
    query = torch.tensor([[[-30.0], [30.0]]], dtype=dtype)
    exact = additive_scores_reference(keys.double(), query.double(), torch.ones(1))
    scores = on_cpu(keys, query, torch.ones(1))
    torch.testing.assert_close(scores.double(), exact, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


def test_score_gradient_accumulates_over_time_steps_in_float32() -> None:
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(2, 16, 32, generator=generator).bfloat16()
    queries = torch.randn(60, 2, 3, 32, generator=generator).bfloat16()
    score = torch.randn(32, generator=generator).requires_grad_()
    by_step = []
    for steps in (*queries[:, None], queries):
        total = sum(on_cpu(keys, query, score).sum() for query in steps)
        by_step += torch.autograd.grad(total, score)
    assert by_step[-1].dtype == torch.float32
    exact = torch.stack(by_step[:-1]).double().sum(0)
    torch.testing.assert_close(by_step[-1].double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_only_required_gradients_are_computed(needed: tuple[bool, ...]) -> None:
    inputs = [part.requires_grad_(want) for part, want in zip(example(0, 1, 2, 3, 4), needed, strict=True)]
    on_cpu(*inputs).sum().backward()
    assert [part.grad is not None for part in inputs] == list(needed)


def test_other_devices_use_the_formula() -> None:
    inputs = [part.to("meta") for part in example(0, 1, 2, 3, 4, torch.bfloat16)]
    assert on_cpu(*inputs).dtype == torch.float32
