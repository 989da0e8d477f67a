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
    """Good rows with changes, epochs 1, 2, ... unless they say."""
    return [GOOD | {"epoch": number, "step": 10 * number} | change for number, change in enumerate(changes, 1)]


# --- one caption for all ---


def test_the_share_of_the_commonest_caption():
    assert duplicate_share(["a cat", "a dog", "a cat", "two dogs"]) == 0.5
    assert duplicate_share(["a", "b", "c", "d"]) == 0
    assert duplicate_share(name for name in ["a", "a"]) == 1
    assert duplicate_share([""]) == 0, "one image's caption is not like another's"


def test_one_caption_for_many_images_is_a_warning():
    (text,) = health_warnings(rows({"val_duplicate_share": 0.31}))
    assert "31%" in text
    assert "same caption" in text


# --- attention ---


@pytest.mark.parametrize("cells", [2, 64, 196])
def test_spread_is_1_for_looks_everywhere_and_0_for_one_cell(cells):
    everywhere = torch.full((3, 1, 4, cells), 1 / cells)
    one = torch.zeros(3, 1, 4, cells)
    one[..., 1] = 1
    there = torch.ones(3, 1, 4, dtype=torch.bool)
    assert attention_entropy(everywhere, there).item() == pytest.approx(12, rel=1e-5)
    assert attention_entropy(one, there).item() == 0


def test_spread_is_the_entropy_relative_to_the_largest():
    looks = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
    by_hand = [0.5, -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)]
    assert attention_entropy(looks, torch.tensor([True, True])).item() == pytest.approx(sum(by_hand))
    assert attention_entropy(looks, torch.tensor([False, True])).item() == pytest.approx(by_hand[1])


def test_spread_counts_words_that_are_there_only():
    looks = torch.full((2, 3, 5, 8), 1 / 8)
    there = torch.zeros(2, 3, 5, dtype=torch.bool)
    there[0, 0, :4] = True
    there[1, 2, 0] = True
    assert attention_entropy(looks, there).item() == pytest.approx(5)
    assert attention_entropy(looks, torch.zeros_like(there)).item() == 0


def test_a_grid_of_one_cell_has_a_spread():
    assert attention_entropy(torch.ones(1, 2, 1), torch.ones(1, 2, dtype=torch.bool)).item() == 0


def test_half_precision_looks_that_go_everywhere_are_found():
    looks = torch.full((4, 64), 1 / 64).bfloat16()
    assert attention_entropy(looks, torch.ones(4, dtype=torch.bool)).item() / 4 > 0.998


def test_attention_that_looks_everywhere_is_a_warning_from_the_third_epoch_on():
    everywhere = {"val_attention_entropy": 0.9985}
    assert health_warnings(rows(everywhere)) == health_warnings(rows(everywhere, everywhere)) == []
    (text,) = health_warnings(rows(*[everywhere] * 3))
    assert "nearly uniform" in text
    assert health_warnings(rows(*[{"val_attention_entropy": 0.9975}] * 5)) == []


def test_the_epoch_counts_and_not_the_number_of_rows():
    """A run that begins with another's decoder has a row of epoch 0."""
    first = GOOD | {"epoch": 0, "val_attention_entropy": 0.9999}
    assert health_warnings([first, first | {"epoch": 1}, first | {"epoch": 2}]) == []


# --- perplexity ---


@pytest.mark.parametrize(("now", "warned"), [(19.9, False), (20.1, True), (10.0, False), (5.0, False)])
def test_perplexity_that_has_doubled_since_its_lowest_is_a_warning(now, warned):
    history = rows(
        {"val_perplexity": 30.0}, {"val_perplexity": 10.0}, {"val_perplexity": 12.0}, {"val_perplexity": now}
    )
    found = health_warnings(history)
    assert len(found) == warned
    if warned:
        assert "20.1" in found[0]
        assert "(10.0)" in found[0]


def test_the_first_epoch_has_no_lower_perplexity_before_it():
    assert health_warnings(rows({"val_perplexity": 1e9})) == []


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_perplexity_that_is_not_finite_is_a_warning(bad):
    assert health_warnings(rows({"val_perplexity": bad})) == ["validation perplexity is not finite"]
    assert health_warnings(rows({}, {"val_perplexity": bad})) == ["validation perplexity is not finite"]


def test_a_perplexity_that_was_not_finite_is_no_lowest_one():
    assert health_warnings(rows({"val_perplexity": None}, {"val_perplexity": 50.0})) == []
    assert health_warnings(rows({"val_perplexity": math.inf}, {"val_perplexity": 50.0})) == []


def test_self_critical_training_may_raise_the_perplexity():
    """It is trained on whole captions; that the references become unlikelier is usual."""
    rewarded = {"reward": 1.0, "baseline": 1.0, "advantage": 0.2}
    assert health_warnings(rows(rewarded, rewarded | {"val_perplexity": 45.0})) == []
    assert len(health_warnings(rows(rewarded, rewarded | {"val_perplexity": math.inf}))) == 1


# --- all together ---


def test_a_good_run_has_none():
    assert health_warnings(rows({}, {}, {}, {})) == []


def test_just_beside_is_no_warning():
    beside = {"val_duplicate_share": 0.3, "val_attention_entropy": 0.998, "val_perplexity": 20.0}
    assert health_warnings(rows({}, {}, {}, beside)) == []


def test_a_run_without_validation_has_none():
    plain = [{"epoch": n, "step": n, "train_loss": 1.0, "seconds": 1.0, "data_wait": 0.1} for n in range(1, 6)]
    assert health_warnings(plain) == []


def test_each_fires_by_itself_and_only_of_the_last_epoch():
    bad = {"val_duplicate_share": 0.9, "val_attention_entropy": 1.0, "val_perplexity": 100.0}
    assert len(health_warnings(rows({}, {}, {}, bad))) == 3
    assert health_warnings(rows({}, {}, bad, {})) == []
