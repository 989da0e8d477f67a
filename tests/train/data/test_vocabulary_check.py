"""Checks of the training vocabulary."""

from types import SimpleNamespace

import pytest

from gridcap.common.config.train import TrainConfig
from gridcap.common.errors import UserError
from gridcap.train.data.tokenizers.characters import Characters
from gridcap.train.data.vocabulary import SPECIALS, Vocabulary
from gridcap.train.data.vocabulary_check import build_vocabulary, check_vocabulary

ENGLISH = [f"a word{i} and a word{i + 1}" for i in range(20)]
CHINESE = [f"一只棕色的狗在绿色的草地上奔跑{chr(0x4E00 + i)}" for i in range(40)]


def settings(min_count=1, **values):
    return TrainConfig(vocabulary={"min_count": min_count}, **values)


def images(captions):
    return SimpleNamespace(captions=[(caption,) for caption in captions])


def test_vocabulary_equals_plain_build():
    vocabulary, unk = build_vocabulary(ENGLISH, settings(1))
    assert vocabulary.tokens == Vocabulary.build(ENGLISH).tokens
    assert unk == 0


def test_item_21_vocabulary_of_special_tokens_only_is_rejected():
    with pytest.raises(UserError) as caught:
        build_vocabulary(ENGLISH, settings(100))
    assert "0 words" in caught.value.message
    assert "train.vocabulary.min_count (now 100)" in caught.value.hint


def test_item_21_too_many_unknown_words_are_rejected():
    captions = [*ENGLISH, *(f"rare{i} unique{i} single{i}" for i in range(100))]
    with pytest.raises(UserError) as caught:
        build_vocabulary(captions, settings(2, min_vocabulary=10))
    assert "of the words of the training captions are not in the vocabulary of 21 words" in caught.value.message
    assert "min_count" in caught.value.hint
    vocabulary, unk = build_vocabulary(captions, settings(2, min_vocabulary=10, max_unk=1))
    assert len(vocabulary) == 25
    assert unk == pytest.approx(302 / 400)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("characters", "5 characters, fewer than 20"),
        ("bpe", "subwords, fewer than 20"),
        ("auto", "words, fewer than 20"),
    ],
)
def test_the_check_applies_to_every_tokenizer(tokenizer, message):
    with pytest.raises(UserError) as caught:
        build_vocabulary(["一只狗在跑"] * 9, settings(tokenizer=tokenizer))
    assert message in caught.value.message


def test_min_count_applies_to_merges_of_bpe_and_not_to_its_units():
    captions = [*ENGLISH, "a zebra"]
    few, many = (build_vocabulary(captions, settings(n, tokenizer="bpe")) for n in (15, 1))
    assert len(few[0]) < len(many[0])
    assert few[1] == many[1] == 0, "rare words consist of characters"


def test_size_and_unk_are_printed_for_both_splits():
    checked = check_vocabulary(images(ENGLISH), images(["a word1 and a zebra"]), settings(1))
    assert checked.lines(0.3) == [
        "vocabulary: 23 words (PTB, in Python), UNK: 0.0% of the training captions, 20.0% of the validation captions"
    ]
    checked = check_vocabulary(images(CHINESE), None, settings(1, tokenizer="characters"))
    assert checked.lines(0.3) == ["vocabulary: 51 characters (characters), UNK: 0.0% of the training captions"]


def test_validation_captions_in_another_language_give_a_warning():
    _, warning = check_vocabulary(images(ENGLISH), images(["ein Hund rennt"]), settings(1)).lines(0.3)
    assert warning.startswith("WARNING: 100% of the words of the validation captions are not in the vocabulary")


def test_a_given_vocabulary_is_kept_and_must_fit_the_captions():
    given = Vocabulary.build(CHINESE, tokenizer=Characters())
    checked = check_vocabulary(images(CHINESE[:3]), None, settings(tokenizer="characters"), given)
    assert checked.vocabulary is given
    with pytest.raises(UserError) as caught:
        check_vocabulary(images(ENGLISH), None, settings(), given)
    assert "100% of the characters of the training captions" in caught.value.message
    assert "init_from" in caught.value.hint
    assert len(given) > len(SPECIALS)
