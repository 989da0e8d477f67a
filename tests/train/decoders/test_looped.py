"""Deferred weight gradients against `nn.Linear` and autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gridcap.train.decoders.looped import LoopedLinear, LoopedMean, looped


class Recurrence(nn.Module):
    """A loop over two layers, one without bias and one called twice per step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = LoopedLinear(4, 4, dtype=dtype)
        self.second = LoopedLinear(4, 4, bias=False, dtype=dtype)

    def forward(self, state: Tensor, steps: int = 3) -> Tensor:
        for _ in range(steps):
            state = torch.tanh(self.first(state)) + self.second(self.first(state))
        return state


def gradients(module: Recurrence, start: Tensor, through_loop: bool) -> tuple[Tensor, list[Tensor]]:
    inside = looped(module) if through_loop else looped(nn.Module())
    start = start.clone().requires_grad_()
    with inside:
        end = module(start)
    return end.detach(), list(torch.autograd.grad(end.float().square().sum(), [start, *module.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32 is packed where supported
def test_outputs_and_gradients_equal_plain_layers(dtype: torch.dtype) -> None:
    module = Recurrence(dtype)
    start = torch.randn(2, 3, 4, dtype=dtype)
    (ours, grads), (theirs, expected) = (gradients(module, start, through) for through in (True, False))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_weight_gradients_are_float32_and_accurate_under_autocast() -> None:
    module, start = Recurrence(torch.float32), torch.randn(16, 5, 4)
    _, exact = gradients(module, start, False)
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = gradients(module, start, True)
    assert [g.dtype for g in ours] == [torch.float32] * 4
    for grad, expected in zip(ours, exact, strict=True):
        assert (grad - expected).norm() / expected.norm() < 0.05


def test_calls_that_do_not_contribute_to_the_loss_are_ignored() -> None:
    module = Recurrence(torch.float32)
    start = torch.randn(2, 4)
    with looped(module):
        seen = module.first(start)
        module.first(100 * start)
        nothing = module.second(start)
    seen.sum().backward()
    assert module.first.weight.grad is not None
    torch.testing.assert_close(module.first.weight.grad, start.sum(0).expand(4, 4))
    assert module.second.weight.grad is None
    nothing.sum().backward()
    assert module.second.weight.grad is not None


def test_second_backward_pass_is_independent() -> None:
    module, start = Recurrence(torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    with looped(module):
        end = module(start)
    first = torch.autograd.grad(end.sum(), module.first.weight, retain_graph=True)
    again = torch.autograd.grad(end.sum(), module.first.weight)
    torch.testing.assert_close(first, again)


def test_plain_layer_outside_a_loop_and_without_gradient() -> None:
    module, start = Recurrence(torch.float32), torch.randn(2, 4)
    expected = module(start)
    with torch.no_grad(), looped(module):
        assert module.first._loop is None
        torch.testing.assert_close(module(start), expected)
    with pytest.raises(RuntimeError, match="stop"), looped(module):
        raise RuntimeError("stop")
    assert module.first._loop is None
    assert set(module.state_dict()) == {"first.weight", "first.bias", "second.weight"}


def test_loop_is_freed_without_the_cycle_collector() -> None:
    """The tensors of a step are large and must not wait for a garbage collection."""
    module = Recurrence(torch.float32)
    gc.disable()
    try:
        with looped(module):
            kept = [weakref.ref(module.first._loop[0])]  # type: ignore[index]
            module(torch.randn(2, 4)).sum().backward()
        mean = LoopedMean(2 * torch.randn(2, 5, 4, requires_grad=True))
        kept.append(weakref.ref(mean._loop[0]))  # type: ignore[index]
        through_means(mean, torch.randn(2, 5, 4), torch.randn(2, 3, 5)).sum().backward()
        del mean
        assert [loop() for loop in kept] == [None, None]
    finally:
        gc.enable()


def through_means(mean: Callable[[Tensor], Tensor], keys: Tensor, weights: Tensor) -> Tensor:
    """Attend to the cells four times."""
    for _ in range(3):
        weights = torch.softmax(mean(weights) @ keys.mT, -1)
    return mean(weights)


def test_looped_mean_equals_matmul_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).double().requires_grad_() for shape in ((2, 5, 4), (2, 3, 5))]
    cells, weights = inputs
    expected = through_means(lambda some: some @ cells, cells, weights)
    mean = LoopedMean(cells)
    actual = through_means(mean, cells, weights)
    assert mean._loop is not None
    assert len(mean._loop[0].inputs) == 4
    torch.testing.assert_close(actual, expected)
    both = (torch.autograd.grad(end.square().sum(), inputs) for end in (actual, expected))
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(through_means(LoopedMean(cells), cells, weights), expected)


def test_looped_means_of_different_cells_are_independent() -> None:
    cells, others, weights = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 3, 5)
    for some in (cells, others):
        some.requires_grad_()
    (LoopedMean(cells)(weights).sum() + 2 * LoopedMean(others)(weights).sum()).backward()
    assert cells.grad is not None
    torch.testing.assert_close(others.grad, 2 * cells.grad)
