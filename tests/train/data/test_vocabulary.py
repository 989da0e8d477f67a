import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.errors import CheckpointError
from gridcap.train.data.vocabulary import BOS, EOS, PAD, SPECIALS, UNK, Vocabulary

SAVED = {"version": 3, "tokenizer": {"kind": "words"}, "tokens": [*SPECIALS, "dog"]}
CAPTIONS = ["a cat and a dog", "a dog", "the zebra, the cat"]  # a 3, cat 2, dog 2, the 2, and 1, zebra 1


def test_special_tokens_come_first():
    vocabulary = Vocabulary.build(CAPTIONS)
    assert (PAD, len({PAD, BOS, EOS, UNK})) == (0, 4)
    assert [vocabulary.tokens[i] for i in (PAD, BOS, EOS, UNK)] == list(SPECIALS)


def test_words_are_sorted_by_frequency_then_alphabetically():
    words = Vocabulary.build(CAPTIONS).tokens
    assert words[4:] == ["a", "cat", "dog", "the", "and", "zebra"]
    assert Vocabulary.build(reversed(CAPTIONS)).tokens == words


def test_all_occurrences_in_a_caption_count():
    assert Vocabulary.build(["b b b", "a", "a"]).tokens[4:] == ["b", "a"]


def test_min_count_excludes_rare_words():
    assert Vocabulary.build(CAPTIONS, min_count=2).tokens[4:] == ["a", "cat", "dog", "the"]
    assert Vocabulary.build(CAPTIONS, min_count=3).tokens[4:] == ["a"]


@pytest.mark.parametrize(("max_size", "kept"), [(5, ["a"]), (7, ["a", "cat", "dog"]), (10, None), (None, None)])
def test_max_size_includes_special_tokens(max_size, kept):
    vocabulary = Vocabulary.build(CAPTIONS, max_size=max_size)
    assert vocabulary.tokens[4:] == (kept or ["a", "cat", "dog", "the", "and", "zebra"])
    assert len(vocabulary) == (max_size or 10)


def test_encode_adds_bos_and_eos_and_maps_unknown_words_to_unk():
    vocabulary = Vocabulary.build(CAPTIONS)
    a, dog = vocabulary.tokens.index("a"), vocabulary.tokens.index("dog")
    assert vocabulary.encode("A purple dog!", 10) == [BOS, a, UNK, dog, EOS]


def test_encode_cuts_at_max_length():
    vocabulary = Vocabulary.build(CAPTIONS)
    assert vocabulary.encode("a cat and a dog", 2) == vocabulary.encode("a cat", 30)[:-1]
    assert len(vocabulary.encode("a cat and a dog", 5)) == 7


def test_item_09_captions_cut_at_max_length_have_no_eos():
    vocabulary = Vocabulary.build(CAPTIONS)
    assert EOS not in vocabulary.encode("a cat and a dog", 4)
    assert vocabulary.encode("a cat and a dog", 5)[-1] == EOS


def test_text_of_special_tokens_is_not_special():
    vocabulary = Vocabulary.build(["eos pad eos"])
    assert not {PAD, EOS, BOS} & set(vocabulary.encode("<eos> <pad>", 5)[1:-1])


def test_decode_stops_at_eos_and_skips_bos_and_pad():
    vocabulary = Vocabulary.build(CAPTIONS)
    a, dog = vocabulary.tokens.index("a"), vocabulary.tokens.index("dog")
    assert vocabulary.decode([BOS, a, PAD, dog, EOS, dog, PAD]) == "a dog"
    assert vocabulary.decode([a, dog]) == "a dog"
    assert vocabulary.decode([EOS, a]) == ""


@given(st.lists(st.sampled_from(["a", "cat", "and", "dog's", "the", "zebra"]), max_size=12))
def test_decode_inverts_encode_for_known_words(words):
    vocabulary = Vocabulary.build(["a cat and dog's the zebra"])
    assert vocabulary.decode(vocabulary.encode(" ".join(words), 24)) == " ".join(words)


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(5, 20))
def test_any_text_yields_valid_vocabulary_and_ids(captions, max_size):
    vocabulary = Vocabulary.build(captions, max_size=max_size)
    assert len(vocabulary) == len(set(vocabulary.tokens)) <= max_size
    for caption in captions:
        ids = vocabulary.encode(caption, 7)
        assert ids[0] == BOS
        assert (ids[-1] == EOS) == (len(vocabulary.tokenizer.split(caption)) <= 7)
        words = [i for i in ids[1:] if i != EOS]
        assert len(words) <= 7
        assert all(i == UNK or len(SPECIALS) <= i < len(vocabulary) for i in words)


def test_save_and_load_preserve_ids(tmp_path):
    vocabulary = Vocabulary.build(["naïve café “quoted”", *CAPTIONS])
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert loaded.tokens == vocabulary.tokens
    assert loaded.encode("a naïve zebra", 9) == vocabulary.encode("a naïve zebra", 9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 3, "tokens": null}',
        '{"version": 3, "tokens": 3}',
        '{"version": 3, "nothing": []}',
        '{"version": 3, "tokenizer": {"kind": "words"}, "tokens": ["a", "b"]}',
        json.dumps({**SAVED, "tokens": [*SPECIALS, "dog", "dog"]}),
        json.dumps({**SAVED, "tokens": [*SPECIALS[::-1], "dog"]}),
        json.dumps({**SAVED, "tokenizer": {"kind": "sentences"}}),
        json.dumps({**SAVED, "tokenizer": {}}),
        json.dumps({**SAVED, "tokenizer": 3}),
        json.dumps({**SAVED, "tokenizer": {"kind": "subwords", "model": {}, "scoring": {"kind": "words"}}}),
    ],
)
def test_corrupted_file_is_named_in_the_error(tmp_path, text):
    path = tmp_path / "vocabulary.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"vocabulary\.json"):
        Vocabulary.load(path)


@pytest.mark.parametrize(("version", "age"), [(2, "an older"), (4, "a newer")])
def test_files_of_other_versions_are_rejected_with_one_sentence(tmp_path, version, age):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"format": "gridcap-vocabulary", "version": version, "tokens": [*SPECIALS, "dog"]}))
    with pytest.raises(CheckpointError) as caught:
        Vocabulary.load(path)
    message = f"{path}: written by {age} version of gridcap, with other words (format version {version}, expected 3)"
    assert caught.value.message == message


def test_missing_or_binary_file_is_named_in_the_error(tmp_path):
    path = tmp_path / "vocabulary.json"
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.json"):
        Vocabulary.load(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CheckpointError, match=r"vocabulary\.json"):
        Vocabulary.load(path)


def test_tokens_without_specials_or_with_repeats_raise():
    for tokens in (["a"], [*SPECIALS, "a", "a"], [*SPECIALS, "<unk>"]):
        with pytest.raises(ValueError, match="vocabulary"):
            Vocabulary(tokens)


def test_max_size_without_room_for_words_raises():
    with pytest.raises(ValueError, match="no room"):
        Vocabulary.build(["a dog"], max_size=4)
