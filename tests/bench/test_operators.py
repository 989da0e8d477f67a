import torch

from bench.operators import count_operators


def test_operators_are_counted_without_views_and_with_the_backward_pass() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    assert count_operators(lambda: torch.ones(2, 3).t().view(3, 2) + 1) == 2
    forward = count_operators(lambda: (weight @ weight).sum())
    assert forward == 2
    assert count_operators(lambda: torch.autograd.grad((weight @ weight).sum(), weight)) > forward
