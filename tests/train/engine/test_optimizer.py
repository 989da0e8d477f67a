import math

import pytest
import torch

from gridcap.common.config import TrainConfig
from gridcap.train.engine.optimizer import learning_rate, make_optimizer, take_step


def rates(steps, steps_per_epoch=10, peak=0.5, epochs=4, **schedule):
    schedule = {"kind": "constant", "warmup_steps": 0} | schedule
    settings = TrainConfig(learning_rate=peak, epochs=epochs, schedule=schedule)
    return [learning_rate(settings, step, steps_per_epoch) for step in steps]


# --- learning rate ---


def test_constant_learning_rate():
    assert rates([0, 1, 39, 10**6]) == [0.5] * 4


@pytest.mark.parametrize("kind", ["constant", "step", "cosine", "noam"])
def test_warmup_is_linear_up_to_the_peak(kind):
    assert rates(range(5), kind=kind, warmup_steps=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_step_schedule_decays_after_every_step_size_epochs():
    values = rates([0, 29, 30, 59, 60, 89, 90], kind="step", step_size=3, gamma=0.8)
    assert values == pytest.approx([0.5, 0.5, 0.4, 0.4, 0.32, 0.32, 0.256])


def test_step_schedule_counts_epochs_from_the_start():
    assert rates([0, 19, 20, 39, 40], kind="step", step_size=2, gamma=0.5, warmup_steps=4)[1:] == pytest.approx(
        [0.5, 0.25, 0.25, 0.125]
    )


def test_cosine_decays_from_peak_to_zero():
    values = rates([0, 10, 20, 30, 40, 55], kind="cosine")
    half = 0.25 * math.sqrt(2)
    assert values == pytest.approx([0.5, 0.25 + half / 2, 0.25, 0.25 - half / 2, 0, 0], abs=1e-12)
    assert 0 < rates([39], kind="cosine")[0] < 0.001, "the last step has a nonzero learning rate"


def test_cosine_starts_after_warmup():
    values = rates([7, 8, 24, 40], kind="cosine", warmup_steps=8)
    assert values == pytest.approx([0.5, 0.5, 0.25, 0], abs=1e-12)


def test_warmup_longer_than_the_run_never_reaches_the_peak():
    values = rates([0, 39, 49, 50], kind="cosine", warmup_steps=50)
    assert values[:3] == pytest.approx([0.01, 0.4, 0.5])
    assert 0 <= values[3] <= 0.5


def test_noam_equals_the_formula_of_vaswani_up_to_scale():
    """Eq. 3: d ** -0.5 * min(s ** -0.5, s * warmup ** -1.5), with s from 1."""
    warmup, steps = 40, list(range(300))
    theirs = [min((s + 1) ** -0.5, (s + 1) * warmup**-1.5) for s in steps]
    ours = rates(steps, kind="noam", warmup_steps=warmup)
    scale = ours[0] / theirs[0]
    assert ours == pytest.approx([scale * value for value in theirs])
    assert max(ours) == pytest.approx(0.5)
    assert ours.index(max(ours)) == warmup - 1


def test_linear_schedule_ends_at_zero():
    settings = TrainConfig(learning_rate=0.5, epochs=4, schedule={"kind": "linear", "warmup_steps": 0})
    assert [learning_rate(settings, step, 2) for step in range(9)] == pytest.approx(
        [0.5 * (1 - i / 8) for i in range(9)]
    )


# --- optimizer ---


def after_a_step(**settings):
    """Return two weights (2 with gradient 0, and 0 with gradient 1) after one step."""
    weights = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    optimizer = make_optimizer(TrainConfig(learning_rate=0.1, **settings), [weights])
    weights.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    return optimizer, weights.tolist()


def test_adam_is_the_default_optimizer():
    optimizer, weights = after_a_step()
    assert type(optimizer) is torch.optim.Adam
    assert weights == pytest.approx([2.0, -0.1])


def test_weight_decay_of_adam_is_l2():
    optimizer, weights = after_a_step(optimizer="adam", weight_decay=0.01)
    assert type(optimizer) is torch.optim.Adam
    assert weights == pytest.approx([1.9, -0.1]), "Adam normalizes the gradient of the penalty too"


def test_weight_decay_of_adamw_is_decoupled():
    optimizer, weights = after_a_step(optimizer="adamw", weight_decay=0.01)
    assert type(optimizer) is torch.optim.AdamW
    assert weights == pytest.approx([2 * (1 - 0.1 * 0.01), -0.1])


def test_adamw_has_no_weight_decay_by_default():
    assert after_a_step(optimizer="adamw")[1] == pytest.approx([2.0, -0.1])


# --- optimizer step ---


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    "clips",
    [
        {"max_grad_norm": None},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 100.0},
        {"max_grad_norm": None, "max_grad_value": 0.1},
        {"max_grad_norm": 0.5, "max_grad_value": 0.1},
    ],
)
def test_step_equals_torch_optimizer_on_clipped_mean_gradient(kind, clips):
    settings = TrainConfig(optimizer=kind, learning_rate=0.01, weight_decay=0.1, momentum=0.9, **clips)
    ours, theirs = ([torch.arange(1.0, 5).requires_grad_(), torch.ones(2, 3).requires_grad_()] for _ in range(2))
    optimizer = make_optimizer(settings, ours)
    make, options = {
        "adam": (torch.optim.Adam, {}),
        "adamw": (torch.optim.AdamW, {}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    }[kind]
    plain = make(theirs, 0.01, weight_decay=0.1, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        num_tokens = torch.tensor(3 + step)
        for mine, other in zip(ours, theirs, strict=True):
            summed = torch.randn(other.shape, generator=generator) * 10
            mine.grad, other.grad = summed.clone(), summed / num_tokens
        norm = take_step(optimizer, ours, num_tokens, settings)
        expected = torch.nn.utils.get_total_norm([other.grad for other in theirs])
        torch.testing.assert_close(norm, expected)
        assert expected > 1, "otherwise, a norm of 0.5 clips nothing"
        if clips["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clips["max_grad_norm"])
        if "max_grad_value" in clips:
            torch.nn.utils.clip_grad_value_(theirs, clips["max_grad_value"])
        plain.step()
        torch.testing.assert_close(ours, theirs)
        assert not hasattr(optimizer, "grad_scale"), "a later step would divide by it"


def test_step_without_tokens_has_no_gradient():
    weights = [torch.ones(3, requires_grad=True)]
    weights[0].grad = torch.zeros(3)
    settings = TrainConfig(learning_rate=0.01, weight_decay=0.0)
    assert take_step(make_optimizer(settings, weights), weights, torch.tensor(0), settings).item() == 0
    assert torch.equal(weights[0].detach(), torch.ones(3))
