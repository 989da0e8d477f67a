import math

import pytest
import torch

from gridcap.train.engine.health import attention_entropy, duplicate_share, health_warnings

GOOD = {
    "epoch": 5,
    "step": 50,
    "train_loss": 2.0,
    "val_loss": 2.3,
    "val_perplexity": 10.0,
    "val_cider": 0.8,
    "val_duplicate_share": 0.02,
    "val_attention_entropy": 0.8,
}


def rows(*changes):
    """Return healthy rows with changes, numbered from epoch 1 unless overridden."""
    return [GOOD | {"epoch": number, "step": 10 * number} | change for number, change in enumerate(changes, 1)]


# --- duplicate captions ---


def test_duplicate_share_is_the_share_of_the_most_common_caption():
    assert duplicate_share(["a cat", "a dog", "a cat", "two dogs"]) == 0.5
    assert duplicate_share(["a", "b", "c", "d"]) == 0
    assert duplicate_share(name for name in ["a", "a"]) == 1
    assert duplicate_share([""]) == 0, "a single caption is not a duplicate"


def test_warns_if_many_images_get_the_same_caption():
    (text,) = health_warnings(rows({"val_duplicate_share": 0.31}))
    assert "31%" in text
    assert "same caption" in text


# --- attention ---


@pytest.mark.parametrize("cells", [2, 64, 196])
def test_attention_entropy_is_1_if_uniform_and_0_for_one_cell(cells):
    uniform = torch.full((3, 1, 4, cells), 1 / cells)
    one = torch.zeros(3, 1, 4, cells)
    one[..., 1] = 1
    mask = torch.ones(3, 1, 4, dtype=torch.bool)
    assert attention_entropy(uniform, mask).item() == pytest.approx(12, rel=1e-5)
    assert attention_entropy(one, mask).item() == 0


def test_attention_entropy_is_relative_to_uniform():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    by_hand = [0.5, -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)]
    assert attention_entropy(weights, torch.tensor([True, True])).item() == pytest.approx(sum(by_hand))
    assert attention_entropy(weights, torch.tensor([False, True])).item() == pytest.approx(by_hand[1])


def test_attention_entropy_ignores_padding():
    weights = torch.full((2, 3, 5, 8), 1 / 8)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[0, 0, :4] = True
    mask[1, 2, 0] = True
    assert attention_entropy(weights, mask).item() == pytest.approx(5)
    assert attention_entropy(weights, torch.zeros_like(mask)).item() == 0


def test_attention_entropy_of_a_one_cell_grid_is_0():
    assert attention_entropy(torch.ones(1, 2, 1), torch.ones(1, 2, dtype=torch.bool)).item() == 0


def test_attention_entropy_detects_uniform_bfloat16_attention():
    weights = torch.full((4, 64), 1 / 64).bfloat16()
    assert attention_entropy(weights, torch.ones(4, dtype=torch.bool)).item() / 4 > 0.998


def test_warns_of_nearly_uniform_attention_from_the_third_epoch():
    uniform = {"val_attention_entropy": 0.9985}
    assert health_warnings(rows(uniform)) == health_warnings(rows(uniform, uniform)) == []
    (text,) = health_warnings(rows(*[uniform] * 3))
    assert "nearly uniform" in text
    assert health_warnings(rows(*[{"val_attention_entropy": 0.9975}] * 5)) == []


def test_attention_warning_counts_epochs_instead_of_rows():
    """A run with init_from has a row for epoch 0."""
    first = GOOD | {"epoch": 0, "val_attention_entropy": 0.9999}
    assert health_warnings([first, first | {"epoch": 1}, first | {"epoch": 2}]) == []


# --- perplexity ---


@pytest.mark.parametrize(("now", "warned"), [(19.9, False), (20.1, True), (10.0, False), (5.0, False)])
def test_warns_if_perplexity_is_twice_its_minimum(now, warned):
    history = rows(
        {"val_perplexity": 30.0}, {"val_perplexity": 10.0}, {"val_perplexity": 12.0}, {"val_perplexity": now}
    )
    messages = health_warnings(history)
    assert len(messages) == warned
    if warned:
        assert "20.1" in messages[0]
        assert "(10.0)" in messages[0]


def test_first_epoch_has_no_perplexity_warning():
    assert health_warnings(rows({"val_perplexity": 1e9})) == []


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_warns_of_non_finite_perplexity(value):
    assert health_warnings(rows({"val_perplexity": value})) == ["validation perplexity is not finite"]
    assert health_warnings(rows({}, {"val_perplexity": value})) == ["validation perplexity is not finite"]


def test_non_finite_perplexity_is_not_a_minimum():
    assert health_warnings(rows({"val_perplexity": None}, {"val_perplexity": 50.0})) == []
    assert health_warnings(rows({"val_perplexity": math.inf}, {"val_perplexity": 50.0})) == []


def test_scst_may_increase_perplexity():
    """SCST optimizes whole captions, so the likelihood of the references usually decreases."""
    rewarded = {"reward": 1.0, "baseline": 1.0, "advantage": 0.2}
    assert health_warnings(rows(rewarded, rewarded | {"val_perplexity": 45.0})) == []
    assert len(health_warnings(rows(rewarded, rewarded | {"val_perplexity": math.inf}))) == 1


# --- combinations ---


def test_healthy_run_has_no_warnings():
    assert health_warnings(rows({}, {}, {}, {})) == []


def test_values_at_the_thresholds_cause_no_warning():
    thresholds = {"val_duplicate_share": 0.3, "val_attention_entropy": 0.998, "val_perplexity": 20.0}
    assert health_warnings(rows({}, {}, {}, thresholds)) == []


def test_run_without_validation_has_no_warnings():
    plain = [{"epoch": n, "step": n, "train_loss": 1.0, "seconds": 1.0, "data_wait": 0.1} for n in range(1, 6)]
    assert health_warnings(plain) == []


def test_all_warnings_apply_to_the_last_epoch_only():
    unhealthy = {"val_duplicate_share": 0.9, "val_attention_entropy": 1.0, "val_perplexity": 100.0}
    assert len(health_warnings(rows({}, {}, {}, unhealthy))) == 3
    assert health_warnings(rows({}, {}, unhealthy, {})) == []
