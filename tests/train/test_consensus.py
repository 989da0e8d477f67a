"""Captions that others agree with weigh more; nothing else changes."""

import numpy as np
import pytest
import torch

from common.annotations import ImageRecord
from train.ciderd import CiderD
from train.consensus import Consensus
from train.loss import smoothed_cross_entropy
from train.stream import CaptionedImages, CaptionStream
from train.vocabulary import PAD, Vocabulary, tokenize

CAPTIONS = (
    ("a dog runs over the grass", "a brown dog runs over the grass", "the dog runs on grass", "such a lovely morning"),
    ("two men ride on a boat", "two men on a boat"),
    ("a child", "someone at play", "nobody knows why"),
    ("one caption alone",),
)


@pytest.fixture
def data(new_store, tmp_path, coco_file):
    records = [ImageRecord(i, f"{i}.jpg", captions) for i, captions in enumerate(CAPTIONS)]
    grids = np.random.default_rng(0).normal(size=(len(records), 2, 2, 8)).astype(np.float16)
    store = new_store(tmp_path / "s.h5", grids, file_names=[r.file_name for r in records])
    return CaptionedImages.join(store, records, tmp_path / "captions.json")


def all_of(image):
    return [[*range(len(CAPTIONS[image]))]]


def test_a_weight_is_the_agreement_with_the_others_over_the_images_mean(data):
    (found,) = Consensus(data, 1.0)([0], all_of(0))
    scorer = CiderD([[tokenize(caption) for caption in captions] for captions in CAPTIONS])
    count, itself = len(CAPTIONS[0]), 10
    expected = [(scorer.score(0, tokenize(caption)) * count - itself) / (count - 1) for caption in CAPTIONS[0]]
    np.testing.assert_allclose(found, np.array(expected) / np.mean(expected), rtol=1e-5)
    assert found[3] < 0.05, "nobody else would have written that"
    assert found[:2].min() > 1


def test_the_share_mixes_with_equal_weights(data):
    (whole,), (half,), (none,) = (Consensus(data, share)([0], all_of(0)) for share in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(half, (whole + 1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(none, np.ones(4, np.float32))


@pytest.mark.parametrize("image", [2, 3])
def test_without_any_agreement_all_weigh_the_same(data, image):
    (found,) = Consensus(data, 1.0)([image], all_of(image))
    np.testing.assert_array_equal(found, np.ones(len(CAPTIONS[image]), np.float32))


def test_the_mean_is_one_over_the_captions_that_are_shown(data):
    for found in Consensus(data, 1.0)(np.array([0, 1, 0]), [[0, 3], [1], [1, 2, 3]]):
        assert found.mean() == pytest.approx(1)


def test_batches_carry_them_beside_their_captions(data):
    vocabulary = Vocabulary.build([c for captions in CAPTIONS for c in captions])
    stream = CaptionStream(data, vocabulary, 3, 4, 12, seed=1, weigh=Consensus(data, 1.0))
    seen = 0
    for batch in stream.epoch(0):
        for image, tokens, weights in zip(batch.images, batch.tokens, batch.weights, strict=True):
            there = (tokens[:, 1] != PAD).numpy()
            (expected,) = Consensus(data, 1.0)([image], all_of(image))
            order = [CAPTIONS[image].index(vocabulary.decode(row.tolist())) for row in tokens[there]]
            np.testing.assert_allclose(weights[there], expected[order])
            assert not weights[~there].any()
            seen += 1
    assert seen == len(CAPTIONS)
    assert all(batch.weights is None for batch in stream.in_order()), "validation counts every caption alike"


def test_an_empty_share_of_a_step_has_no_weights(data):
    assert Consensus(data, 1.0)(np.array([], np.int64), []) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_multiply_the_loss_of_words_and_not_what_is_logged(smoothing):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.tensor([4, 5, PAD, 6, 7, 8])
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5, 1.0])
    loss, plain, words = smoothed_cross_entropy(logits, targets, smoothing, weights)
    each = [smoothed_cross_entropy(logits[i : i + 1], targets[i : i + 1], smoothing)[0] for i in range(6)]
    torch.testing.assert_close(loss, sum(w * one for w, one in zip(weights, each, strict=True)))
    unweighted = smoothed_cross_entropy(logits, targets, smoothing)
    torch.testing.assert_close((plain, words), unweighted[1:])
