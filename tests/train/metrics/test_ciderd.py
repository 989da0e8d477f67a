"""CIDEr-D against the authors' implementation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from gridcap.train.metrics.ciderd import CiderD

REAL = [
    ["a brown dog runs over the green grass", "the dog is running outside", "a dog a dog a dog runs runs"],
    ["two people ride their bikes down the street", "a man and a woman on bicycles"],
    ["a plate of food with rice and beans", "rice on a white plate", "a plate of rice", "food", "a a a a a a"],
    ["a man on a skateboard does a trick on a rail at a skate park in front of a crowd of people"],
]
CANDIDATES = ["a brown dog runs over the street", "a man on a a a man on a", "a plate of", "man"]

captions = st.lists(st.sampled_from("abcd"), max_size=9)
images = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=1, max_size=6)


def reference_scores(references, candidates):
    truth = {i: [" ".join(map(str, caption)) for caption in image] for i, image in enumerate(references)}
    ours = {i: [" ".join(map(str, caption))] for i, caption in enumerate(candidates)}
    return Cider().compute_score(truth, ours)[1]


def split(texts):
    return [text.split() for text in texts]


@given(images)
def test_scores_equal_the_authors_implementation(examples):
    candidates, references = zip(*examples, strict=True)
    if not any(caption for image in references for caption in image):
        return  # the authors' code takes the maximum of an empty list
    scores = CiderD(references).scores(range(len(examples)), candidates)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(reference_scores(references, candidates), abs=1e-9)


def test_scores_of_real_sentences_equal_the_authors_implementation():
    references = [split(image) for image in REAL]
    scores = CiderD(references).scores(range(4), split(CANDIDATES))
    assert scores == pytest.approx(reference_scores(references, split(CANDIDATES)), abs=1e-9)
    assert 0 < scores.min() < 1 < scores.max() < 10


def test_tokens_may_be_any_hashable():
    numbers = {word: i for i, word in enumerate({w for image in REAL for text in image for w in text.split()})}
    coded = [[[7 * numbers[w] for w in text.split()] for text in image] for image in REAL]
    candidate = ["a", "plate", "of", "beans"]
    expected = CiderD([split(image) for image in REAL]).score(2, candidate)
    assert CiderD(coded).score(2, [7 * numbers[w] for w in candidate]) == pytest.approx(expected)
    assert expected > 0


def test_batch_scores_equal_single_scores():
    scorer = CiderD([split(image) for image in REAL])
    which = [3, 0, 0, 2, 3, 0]
    texts = split(["a man on a rail", "the dog", "a dog runs", "rice and beans", "zebra zebra", ""])
    batch = scorer.scores(np.array(which), texts)
    assert batch == pytest.approx([scorer.score(i, text) for i, text in zip(which, texts, strict=True)])
    assert batch[4] == batch[5] == 0
    assert (batch[:4] > 0).all()


def test_unknown_words_are_distinct_words():
    scorer = CiderD([split(image) for image in REAL])
    same, different = scorer.scores([0, 0], split(["dog x x x", "dog x y z"]))
    assert same < different, "one word three times makes a longer vector than three words once"
    assert different == pytest.approx(scorer.score(0, ["dog", "u", "v", "w"]))


def test_document_frequencies_are_counted_over_all_images():
    scorer = CiderD([split(image) for image in REAL])
    references = [split(image) for image in REAL]
    candidates = [[], [], ["rice"], []]
    assert scorer.score(2, ["rice"]) == pytest.approx(reference_scores(references, candidates)[2], abs=1e-9)


def test_empty_batches_and_empty_references_score_zero():
    assert CiderD([[["a"]], [["b"]]]).scores([], []).shape == (0,)
    assert CiderD([[[]], [["b"]]]).score(0, ["a"]) == 0
    assert CiderD([[[]], [[]]]).score(0, ["a"]) == 0


def test_invalid_inputs_raise():
    with pytest.raises(ValueError, match="image 1 has no references"):
        CiderD([[["a"]], []])
    scorer = CiderD([[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="2 images for 1 candidates"):
        scorer.scores([0, 1], [["a"]])
    for image in (2, -1):
        with pytest.raises(IndexError):
            scorer.score(image, ["a"])
    assert len(scorer) == 2
