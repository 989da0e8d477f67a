"""Tokenizers other than words: characters, segmenters, and subwords."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.config import TrainConfig, adapt
from gridcap.common.errors import PathError, UserError
from gridcap.train.data.tokenizers import segmented
from gridcap.train.data.tokenizers.base import tokenizer_from_json
from gridcap.train.data.tokenizers.characters import Characters
from gridcap.train.data.tokenizers.choose import choose_by_script, make_tokenizer
from gridcap.train.data.tokenizers.scripts import guess_language, is_unsegmented
from gridcap.train.data.tokenizers.segmented import Segmented
from gridcap.train.data.tokenizers.subwords import train_bpe
from gridcap.train.data.tokenizers.words import WORDS
from gridcap.train.data.vocabulary import BOS, EOS, UNK, Vocabulary
from gridcap.train.data.vocabulary_check import build_vocabulary

ENGLISH = ["A brown dog's ball, isn't it?", "Two dogs run (fast) on a beach.", "A dog jumps over the dog house."] * 4
CHINESE = ["一只棕色的狗在绿色的草地上奔跑。", "两个人在海滩上骑自行车", "一个穿着T恤的男人拿着 iPhone 手机"]
JAPANESE = ["緑の芝生の上を走っている茶色い犬。", "二人の男性が海辺で自転車に乗っています"]
THAI = ["สุนัขสีน้ำตาลกำลังวิ่งอยู่บนสนามหญ้าสีเขียว", "ผู้ชายสองคนขี่จักรยานบนชายหาด"]
UNSPACED = {"Chinese": CHINESE, "Japanese": JAPANESE, "Thai": THAI}


def settings(**values):
    """Return the settings of a run with a few captions."""
    return adapt(TrainConfig(**values), 10, 10)


@pytest.mark.parametrize(
    ("caption", "units", "text"),
    [
        ("一只狗，在跑。", "一 只 狗 在 跑", "一只狗在跑"),
        ("一个 iPhone 5 手机", "一 个 i p h o n e ▁ 5 手 机", "一个iphone 5手机"),
        ("A dog's T-shirt!", "a ▁ d o g ' s ▁ t - s h i r t", "a dog's t-shirt"),
        ("นี้", "นี้", "นี้"),
        ("  ", "", ""),
    ],
)
def test_characters(caption, units, text):
    tokenizer = Characters()
    assert tokenizer.split(caption) == units.split()
    assert tokenizer.join(units.split()) == text
    assert tokenizer.split(text) == units.split()


@given(st.text(max_size=30))
def test_joined_characters_are_split_the_same_way(text):
    tokenizer = Characters()
    units = tokenizer.split(text)
    assert tokenizer.split(tokenizer.join(units)) == units


@pytest.mark.parametrize(
    ("segmenter", "caption", "units", "text"),
    [
        ("jieba", "一个男人拿着 New York 的地图。", "一个 男人 拿 着 new york 的 地图", "一个男人拿着new york的地图"),
        ("fugashi", "茶色い犬が走っている。", "茶色い 犬 が 走っ て いる", "茶色い犬が走っている"),
        ("pythainlp", "สุนัขวิ่ง", "สุนัข วิ่ง", "สุนัขวิ่ง"),
    ],
)
def test_segmenters_find_words(segmenter, caption, units, text):
    tokenizer = tokenizer_from_json(Segmented(segmenter).to_json())
    assert tokenizer.split(caption) == units.split()
    assert tokenizer.join(units.split()) == text
    assert tokenizer.scoring is tokenizer
    assert tokenizer.name == f"words segmented by {segmenter}"


@pytest.mark.parametrize(
    ("captions", "tokenizer"),
    [
        (ENGLISH, "PTB, in Python"),
        (["собака бежит по траве"], "PTB, in Python"),
        (["สุนัข สีน้ำตาล วิ่ง บน สนามหญ้า", "緑 の 芝生 の 上 を 走っ て いる 犬"], "PTB, in Python"),
        (["一只狗在跑", "两个人"], "words segmented by jieba"),
        (["一只 棕色 的 狗 在 绿色 的 草地 上 奔跑"], "PTB, in Python"),
        (CHINESE, "words segmented by jieba"),
        (JAPANESE, "words segmented by fugashi"),
        (THAI, "words segmented by pythainlp"),
        (["ໝາສີນ້ຳຕານກຳລັງແລ່ນ"], "characters"),
        ([], "PTB, in Python"),
    ],
)
def test_auto_follows_the_script(captions, tokenizer):
    assert make_tokenizer(captions, settings(tokenizer="auto")).name == tokenizer


@pytest.mark.parametrize("captions", UNSPACED.values(), ids=UNSPACED)
def test_auto_selects_characters_without_a_segmenter(captions, monkeypatch):
    monkeypatch.setattr(segmented, "find_spec", lambda module: None)
    assert choose_by_script(captions).name == "characters"
    with pytest.raises(UserError) as caught:
        Segmented("jieba")
    assert caught.value.hint == "pip install 'gridcap[languages]'"


@pytest.mark.parametrize("captions", UNSPACED.values(), ids=UNSPACED)
def test_item_21_words_are_rejected_for_captions_without_spaces(captions):
    assert is_unsegmented(captions)
    with pytest.raises(UserError) as caught:
        make_tokenizer(captions, settings())
    assert "whole captions count as one word" in caught.value.message
    assert "--set train.tokenizer=auto" in caught.value.hint


def test_languages_are_told_apart_by_script():
    assert [guess_language(captions) for captions in (CHINESE, JAPANESE, THAI, ENGLISH)] == ["zh", "ja", "th", None]


def bpe(captions, size=60, scoring=WORDS):
    return train_bpe(captions, size, 1, scoring)


def test_bpe_keeps_punctuation_and_decodes_to_normal_text():
    tokenizer = bpe(ENGLISH)
    assert [tokenizer.join(tokenizer.split(text)) for text in ENGLISH] == [text.lower() for text in ENGLISH]
    assert tokenizer.join(tokenizer.split("  A  dog ,\n two ")) == "a dog , two"
    assert len({unit for text in ENGLISH for unit in tokenizer.split(text)}) <= 60
    assert "▁dog" in tokenizer.split("a dog"), "frequent words are units"
    assert len(tokenizer.split("hogs")) > 1, "words that were never seen consist of units"
    assert tokenizer.split("a ☃")[-1] == "<unk>"


def test_bpe_is_deterministic_and_saved_with_the_vocabulary(tmp_path):
    first, again = bpe(ENGLISH), bpe(ENGLISH)
    assert first.to_json() == again.to_json()
    vocabulary, _ = build_vocabulary(ENGLISH, settings(tokenizer="bpe", vocabulary={"max_size": 64}))
    assert vocabulary.tokenizer.to_json() == first.to_json()
    assert len(vocabulary) <= 64
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    ids = loaded.encode("Two hogs run, ☃.", 50)
    assert ids == vocabulary.encode("Two hogs run, ☃.", 50)
    assert ids.count(UNK) == 1
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert loaded.decode([i for i in ids if i != UNK]) == "two hogs run, ."
    assert loaded.tokenizer.scoring is WORDS
    assert loaded.texts(loaded.encode("a dog", 9)[1:-1]) == ["a", "dog"]


def test_bpe_of_chinese_captions_is_scored_by_words_or_characters():
    tokenizer = make_tokenizer(CHINESE, settings(tokenizer="bpe"))
    assert tokenizer.join(tokenizer.split(CHINESE[1])) == CHINESE[1]
    assert tokenizer.scoring.name == "words segmented by jieba"


def test_characters_are_scored_by_words_in_languages_with_spaces():
    assert make_tokenizer(ENGLISH, settings(tokenizer="characters")).scoring is WORDS
    tokenizer = make_tokenizer(CHINESE, settings(tokenizer="characters"))
    assert tokenizer.scoring is tokenizer
    for each in (tokenizer, Characters(WORDS)):
        again = tokenizer_from_json(each.to_json())
        assert again.scoring.name == each.scoring.name


def test_tokenizer_json_of_other_models_is_used_as_it_is(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    entries = ["[UNK]", "[CLS]", "[SEP]", "a", "dog", "##s", "run"]
    other = Tokenizer(models.WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]"))
    other.normalizer, other.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    other.decoder = decoders.WordPiece()
    other.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    other.enable_truncation(3)
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make_tokenizer(ENGLISH, settings(tokenizer=tmp_path / "tokenizer.json"))
    assert tokenizer.split("A dogs cat runs run") == ["a", "dog", "##s", "<unk>", "run", "##s", "run"]
    assert tokenizer.join(["a", "dog", "##s", "run"]) == "a dogs run"
    assert Vocabulary.build(["dogs cat"], tokenizer=tokenizer).encode("cat dogs", 9) == [BOS, UNK, 5, 4, EOS]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, PathError, "no such file (train.tokenizer)"),
        ("{}", UserError, "not a tokenizer"),
        (json.dumps({"vocab": {"a": 0}}), UserError, "not a tokenizer"),
        ("\x00", UserError, "not a tokenizer"),
    ],
)
def test_invalid_tokenizer_json_is_named(tmp_path, content, error, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        make_tokenizer(ENGLISH, settings(tokenizer=path))
    assert str(path) in caught.value.message
    assert message in caught.value.message


def test_bpe_without_a_size_or_the_library_is_rejected(monkeypatch):
    with pytest.raises(UserError, match=r"train\.vocabulary\.max_size is null"):
        make_tokenizer(ENGLISH, settings(tokenizer="bpe", vocabulary={"max_size": None}))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError) as caught:
        make_tokenizer(ENGLISH, settings(tokenizer="bpe"))
    assert caught.value.hint == "pip install 'gridcap[tokenizers]'"


def test_unknown_choice_is_rejected_with_the_choices():
    with pytest.raises(ValueError, match="words, characters, bpe, auto"):
        TrainConfig(tokenizer="sentences")
