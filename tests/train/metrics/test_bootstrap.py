"""Corpus metrics from sufficient statistics, and their bootstrap confidence intervals."""

import shutil

import numpy as np
import pytest

from gridcap.train.metrics import bootstrap, java
from gridcap.train.metrics.bootstrap import bootstrap_intervals, bootstrap_metrics, resample_counts
from gridcap.train.metrics.coco import score_captions
from gridcap.train.metrics.sufficient import ImageStatistics

NOUNS = ["dog", "cat", "man", "woman", "car", "bike", "plate", "street", "horse", "child"]
VERBS = ["runs", "sits", "stands", "is riding", "jumps"]


def make_captions(count, seed=0):
    """Return candidates, one of them empty, and references of `count` images."""
    rng = np.random.default_rng(seed)

    def sentence(noun):
        return f"a {noun} {rng.choice(VERBS)} near the {rng.choice(NOUNS)}{rng.choice(['', ' today'])}"

    nouns = rng.choice(NOUNS, count)
    references = {i: [sentence(noun) for _ in range(1 + i % 4)] for i, noun in enumerate(nouns)}
    candidates = {i: sentence(noun) for i, noun in enumerate(nouns)}
    return {**candidates, 3: ""}, references


@pytest.fixture(scope="module", params=["without Java", pytest.param("with Java", marks=pytest.mark.slow)])
def scores(request):
    if request.param == "with Java" and shutil.which("java") is None:
        pytest.skip("METEOR requires Java, but there is no java on the PATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "spice_models_installed", lambda: False)
        if request.param == "without Java":
            patch.setenv("PATH", "")
        return score_captions(*make_captions(12))


def test_statistics_reproduce_all_metrics_of_the_data_set_and_of_single_images(scores):
    counts = np.concatenate([np.ones((1, 12), int), np.eye(12, dtype=int)])
    metrics = scores.statistics.metrics(counts)
    assert metrics.keys() == scores.values.keys()
    for name, values in metrics.items():
        expected = [scores.values[name], *(each[name] for each in scores.per_image.values())]
        assert values == pytest.approx(expected, abs=1e-12), name


def test_metrics_of_a_resample_equal_those_of_its_captions(scores, monkeypatch):
    monkeypatch.setattr(java, "spice_models_installed", lambda: False)
    if "METEOR" not in scores.values:
        monkeypatch.setenv("PATH", "")
    candidates, references = make_captions(12)
    counts = next(iter(resample_counts(12)))[0]
    drawn = np.repeat(np.arange(12), counts)
    assert counts.max() > 1
    again = score_captions(
        {n: candidates[i] for n, i in enumerate(drawn)}, {n: references[i] for n, i in enumerate(drawn)}
    )
    metrics = scores.statistics.metrics(counts[None])
    for name in again.values:
        if not name.startswith("CIDEr"):  # whose document frequencies stay those of all images
            assert metrics[name][0] == pytest.approx(again.values[name], abs=1e-12), name


def test_interval_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    low, high = bootstrap_intervals(ImageStatistics({"x": values}))["x"]
    error = values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_intervals_cover_the_true_value_in_about_95_percent_of_the_samples():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        tokens = rng.integers(1, 20, 60)
        losses = tokens * rng.normal(2, 0.5, 60)
        statistics = ImageStatistics({"perplexity": np.stack([losses, tokens], 1).astype(float)})
        low, high = bootstrap_intervals(statistics)["perplexity"]
        covered += low <= np.exp(2) <= high
    assert 0.88 < covered / 200 < 0.99


def test_resamples_are_the_same_for_every_system_and_every_chunk_size(monkeypatch):
    whole = np.concatenate([*resample_counts(9)])
    assert whole.shape == (bootstrap.RESAMPLES, 9)
    assert (whole.sum(1) == 9).all()
    monkeypatch.setattr(bootstrap, "_CHUNK", 9 * 700)
    assert (np.concatenate([*resample_counts(9)]) == whole).all()
    values = np.arange(9.0)[:, None]
    ours, theirs = (bootstrap_metrics(ImageStatistics({"x": values + shift}))["x"] for shift in (0, 1))
    assert theirs - ours == pytest.approx(np.ones(bootstrap.RESAMPLES))


def test_a_single_image_has_no_interval():
    assert bootstrap_intervals(ImageStatistics({"x": np.ones((1, 1))})) == {}


def test_infinite_perplexity_has_an_interval_without_nan():
    statistics = ImageStatistics({"perplexity": np.array([[2000.0, 1], [1, 1], [1, 1], [1, 1]])})
    low, high = bootstrap_intervals(statistics)["perplexity"]
    assert (low, high) == (pytest.approx(np.e), np.inf)
