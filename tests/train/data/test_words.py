"""The words of `Words` against those of Stanford's PTB tokenizer, and back to text."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pycocoevalcap.tokenizer.ptbtokenizer as ptb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.train.data.tokenizers.words import WORDS, ptb_tokenize

SAME = [
    "A man riding a wave on top of a surfboard.",
    "A woman's hand, holding a half-eaten hot dog!",
    "",
    "There are 2 dogs, 3 cats and 1,000 birds; it's 10:30 p.m.",
    'Two men (one in red) play "frisbee".',
    "A sign that says 'STOP' on a pole",
    "“Curly quotes” and ‘single’ ones",
    "The man who’s sitting doesn’t move…",
    "A black & white photo: a t-shirt - with dots",
    "A 1950's style car -- it’s PARKED near St. Mary's in the U.S.",
    "They can't, won't and cannot; I'm gonna go, they'll've left",
    "Fruits, vegetables, etc. on 5th Ave.",
    "$5.00 and 50% off #1 @ home",
    "24/7 store, half/whole, 1/2 pizza",
    "A café au lait, naïve ½ cup",
    "the dogs' bowls and the ladies’ room",
    "rock 'n' roll o'clock 'tis ma'am",
    "AT&T and A&W, B & B",
    "what?! no!!",
    "A cat.A dog ,a bird,a fish",
    "[left] {right} <b>bold</b> x_y a * b = c",
    "women`s semi truck w/ trailer",
    "e-mail foo@bar.com at www.site.com",
    "a t.v. and a T.V. on a stand.",
    '-5 degrees +3 4x4 3-d 12" 5\'4"',
    "日本 の Mr. Smith vs. Dr. Jones",
    "x's and o's, y'all",
    "#hashtag No. 5 wait...what",
    "It's 90° ~ £5 €6",
    "the letter P.",
    "Miami U. pushes forward .",
    "grade A. It is",
    "S. S. Minnow and plan b. too",
    "a Ph.D. student",
    "un chien qu'il aime",
    "ein Hund „läuft“ schnell",
    "a dog 😀 there",
    "a cat cannot jump.",
    "wanna go . ",
    "main st.",
]
DIFFERENT = {  # known differences: our tokens, Java's tokens
    "smile :) there": ("smile -rrb- there", "smile :-rrb- there"),
    "is it ok?yes": ("is it ok yes", "is it ok?yes"),
    "1½ cups": ("1½ cups", "1 1/2 cups"),
    "from 10 a.m.-5 p.m.": ("from 10 a.m. -5 p.m.", "from 10 a.m.-5 p.m."),
}


def java_words(captions, folder):
    """Return the words of captions by Stanford's PTB tokenizer, without the punctuation that pycocoevalcap removes."""
    if shutil.which("java") is None:
        assert not os.environ.get("CI"), "CI needs Java; the tokenizer would never be compared with Stanford's"
        pytest.skip("there is no java on the PATH")
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    source = folder / "captions.txt"
    source.write_text("\n".join(captions), encoding="utf-8")
    command = ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", source]
    lines = subprocess.run(command, check=True, capture_output=True).stdout.decode().split("\n")[: len(captions)]
    return [" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in lines]


def words(caption):
    return " ".join(ptb_tokenize(caption))


def test_words_follow_penn_treebank_rules():
    assert words("A man's T-shirt, isn't it?") == "a man 's t-shirt is n't it"
    assert words("“The dogs’ bowl” (red) & 3.5 ft. of rope...") == "the dogs bowl -lrb- red -rrb- & 3.5 ft. of rope"
    assert words("?!.,:;-- ''") == "?!"
    assert words("नमस्ते हिन्दी") == "नमस्ते हिन्दी", "combining vowel signs belong to the word"
    assert words("cafe\u0301") == "café"


def test_words_agree_with_stanfords(tmp_path):
    assert [words(text) for text in SAME] == java_words(SAME, tmp_path)
    found = {
        text: (words(text), java) for text, java in zip(DIFFERENT, java_words([*DIFFERENT], tmp_path), strict=True)
    }
    assert found == DIFFERENT, "the docstring of ptb_tokenize lists the differences"


def test_words_agree_with_stanfords_on_random_captions(tmp_path):
    rng = random.Random(0)
    starts = ["A man", "two dogs", "The girl's cat", "People", "an old T-shirt", "Children", "3 men", "A half-pipe"]
    middles = ["is", "isn't", "ride bikes,", 'play "catch" -', "(in red)", "& co.", "can't", "at 5 p.m.", "don't look;"]
    ends = ["outside.", "near the U.S. flag .", "together!", "on it", "...", "in St. Louis.", "with J. Smith .", "?"]
    captions = [" ".join([rng.choice(starts), *rng.choices(middles, k=2), rng.choice(ends)]) for _ in range(300)]
    assert [words(text) for text in captions] == java_words(captions, tmp_path)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("A man's T-shirt, isn't it?", "a man's t-shirt isn't it"),
        ("The dogs (two of them) can't run.", "the dogs (two of them) can't run"),
        ("I'm gonna pay $5.00 or 50%, 'tis #1", "i'm gonna pay $5.00 or 50% 'tis #1"),
        ("They cannot go at 5 p.m.", "they can not go at 5 p.m."),
        ("[left] {right} what?!", "[left] {right} what?!"),
        ("the 1950's style at 90°", "the 1950's style at 90°"),
        ("¿Qué perro?", "¿qué perro"),
        ("", ""),
    ],
)
def test_join_returns_normal_text(caption, text):
    assert WORDS.join(WORDS.split(caption)) == text
    assert WORDS.split(text) == WORDS.split(caption)


@pytest.mark.parametrize("caption", SAME)
def test_words_of_joined_text_are_the_same(caption):
    if "AT&T" not in caption:  # which the PTB tokenizer keeps whole in capitals only
        assert WORDS.split(WORDS.join(WORDS.split(caption))) == WORDS.split(caption)


@given(st.lists(st.sampled_from(["a", "dog", "'s", "is", "n't", "red", "5", "%", "cannot", "st", "mr"]), max_size=8))
def test_the_fast_path_for_plain_captions_changes_nothing(parts):
    caption = " ".join(parts)
    assert ptb_tokenize(caption) == ptb_tokenize(caption + " ,")
    assert ptb_tokenize(f"{caption}.") == ptb_tokenize(f"{caption}. ,")
