"""Checks of the training vocabulary."""

import pytest

from gridcap.common.config.train import TrainConfig
from gridcap.common.errors import UserError
from gridcap.train.data.vocabulary import SPECIALS, count_words
from gridcap.train.data.vocabulary_check import build_vocabulary, is_unsegmented

ENGLISH = [f"a word{i} and a word{i + 1}" for i in range(20)]
CHINESE = [f"一只棕色的狗在绿色的草地上奔跑{chr(0x4E00 + i)}" for i in range(40)]
JAPANESE = [f"緑の芝生の上を走っている茶色い犬{chr(0x3042 + i)}" for i in range(40)]
THAI = [f"สุนัขสีน้ำตาลกำลังวิ่งอยู่บนสนามหญ้าสีเขียว{chr(0x0E01 + i)}" for i in range(40)]


def settings(min_count, **limits):
    return TrainConfig(vocabulary={"min_count": min_count}, **limits)


def test_vocabulary_equals_plain_build():
    vocabulary = build_vocabulary(ENGLISH, TrainConfig())
    assert len(vocabulary) == len(SPECIALS) + 23


@pytest.mark.parametrize("captions", [CHINESE, JAPANESE, THAI], ids=["Chinese", "Japanese", "Thai"])
def test_item_21_unsegmented_captions_warn_and_are_rejected(captions, capsys):
    with pytest.raises(UserError) as caught:
        build_vocabulary(captions, settings(2))
    assert "0 words, fewer than 20" in caught.value.message
    assert "segment" in caught.value.hint
    assert "whole captions count as one word" in capsys.readouterr().err


@pytest.mark.parametrize(
    "caption",
    [
        "一只 棕色 的 狗 在 绿色 的 草地 上 奔跑",
        "緑 の 芝生 の 上 を 走っ て いる 犬",
        "สุนัข สีน้ำตาล วิ่ง บน สนามหญ้า",
        "a brown dog runs",
    ],
)
def test_segmented_captions_do_not_warn(caption):
    assert not is_unsegmented(count_words([caption]))


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
    assert len(build_vocabulary(captions, settings(2, min_vocabulary=10, max_unk=1))) == 25
