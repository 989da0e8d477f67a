import math
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from gridcap.train.data.tokenizer import ptb_tokenize
from gridcap.train.metrics import coco, java
from gridcap.train.metrics.coco import cider, score_captions

REFERENCES = {
    1: ["a brown dog runs over the green grass", "the dog is running outside"],
    2: ["two people ride their bikes down the street", "a man and a woman on bicycles"],
    3: ["a plate of food with rice and beans", "rice on a white plate"],
}
PERFECT = {i: texts[0] for i, texts in REFERENCES.items()}
GOOD = {1: "a brown dog runs over the street", 2: "two people ride their bikes", 3: "a plate of food"}
BAD = {1: "two people on grass", 2: "a plate on the street", 3: "a dog is running"}
WITHOUT_JAVA = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "CIDEr-D"}


def test_cider_increases_with_better_captions():
    assert 0 <= cider(BAD, REFERENCES) < cider(GOOD, REFERENCES) < cider(PERFECT, REFERENCES) <= 10


def test_cider_of_an_exact_match_is_ten():
    only = {i: [text] for i, text in PERFECT.items()}
    assert cider(PERFECT, only) == pytest.approx(10)


def test_cider_ignores_case_and_punctuation_and_is_per_image():
    shouted = {i: f"{text.upper()}!" for i, text in PERFECT.items()}
    assert cider(shouted, REFERENCES) == cider(PERFECT, REFERENCES)
    moved = dict(zip((2, 3, 1), PERFECT.values(), strict=True))
    assert cider(moved, REFERENCES) < 0.2 * cider(PERFECT, REFERENCES)
    backwards = dict(reversed(PERFECT.items()))
    assert cider(backwards, REFERENCES) == pytest.approx(cider(PERFECT, REFERENCES))


def test_references_without_candidates_are_ignored():
    some = {1: PERFECT[1], 2: PERFECT[2]}
    assert cider(some, REFERENCES) == cider(some, {i: REFERENCES[i] for i in some})


@pytest.mark.usefixtures("no_java")
def test_bleu_and_rouge_of_identical_captions_are_one():
    values = score_captions(PERFECT, REFERENCES).values
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert values[name] == pytest.approx(1, abs=1e-6), name


@pytest.mark.usefixtures("no_java")
def test_bleu_1_and_rouge_l_equal_manual_values():
    values = score_captions({7: "the cat sat on mat"}, {7: ["the cat is on the mat"]}).values
    # Four of five words are in the reference; brevity penalty for 5 words against 6.
    assert values["BLEU-1"] == pytest.approx(4 / 5 * math.exp(1 - 6 / 5), rel=1e-6)
    # Longest common subsequence: the cat on mat.
    precision, recall, beta = 4 / 5, 4 / 6, 1.2
    rouge = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert values["ROUGE-L"] == pytest.approx(rouge, rel=1e-6)


@pytest.mark.usefixtures("no_java")
def test_all_scores_increase_with_better_captions():
    bad, good, perfect = (score_captions(captions, REFERENCES).values for captions in (BAD, GOOD, PERFECT))
    for name in WITHOUT_JAVA:
        assert bad[name] < good[name] < perfect[name], name


@pytest.mark.usefixtures("no_java")
def test_without_java_our_tokenizer_is_used_and_missing_metrics_have_a_reason():
    scores = score_captions({i: f"{text}." for i, text in PERFECT.items()}, REFERENCES)
    assert set(scores.values) == WITHOUT_JAVA
    assert scores.values["BLEU-4"] == pytest.approx(1, abs=1e-6), "the full stop is not a token"
    assert "gridcap" in scores.tokenizer
    assert set(scores.unavailable) == {"METEOR", "SPICE"}
    assert all("java" in reason.lower() for reason in scores.unavailable.values())


@pytest.mark.usefixtures("no_java")
def test_empty_captions_are_scored():
    scores = score_captions({**PERFECT, 1: ""}, REFERENCES)
    assert all(0 <= value < 10 and math.isfinite(value) for value in scores.values.values())
    assert scores.values["CIDEr"] < score_captions(PERFECT, REFERENCES).values["CIDEr"]


@pytest.fixture
def failing_java(monkeypatch, tmp_path):
    """A program `java` that prints an error and fails, as the only program on the PATH."""
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'could not reserve\nenough space' >&2\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(scope="module")
def java_scores():
    if shutil.which("java") is None:
        assert not os.environ.get("CI"), "CI needs Java; METEOR would never be tested"
        pytest.skip("METEOR requires Java, but there is no java on the PATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "spice_models_installed", lambda: False)
        return score_captions({**PERFECT, 3: f"{PERFECT[3].upper()}!"}, REFERENCES)


def test_with_java_the_ptb_tokenizer_is_used_and_meteor_is_computed(java_scores):
    assert "PTB" in java_scores.tokenizer
    assert set(java_scores.values) == WITHOUT_JAVA | {"METEOR"}
    assert java_scores.values["METEOR"] == pytest.approx(1, abs=1e-6)
    assert java_scores.values["BLEU-4"] == pytest.approx(1, abs=1e-6), "case and the exclamation mark do not count"


def test_spice_without_models_is_unavailable_with_the_reason(java_scores):
    assert set(java_scores.unavailable) == {"SPICE"}
    assert "CoreNLP" in java_scores.unavailable["SPICE"]


def test_spice_models_are_detected_by_their_jars(monkeypatch, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: spec)
    assert not java.spice_models_installed()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    assert java.spice_models_installed()


@pytest.mark.usefixtures("failing_java")
def test_failing_java_only_omits_java_metrics():
    results = []
    scoring = threading.Thread(target=lambda: results.append(score_captions(PERFECT, REFERENCES)), daemon=True)
    scoring.start()
    scoring.join(15)  # a hang fails this test instead of blocking the suite
    assert results, "score_captions never came back"
    assert set(results[0].values) == WITHOUT_JAVA
    assert results[0].values["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert set(results[0].unavailable) == {"METEOR", "SPICE"}


@pytest.mark.usefixtures("failing_java")
def test_item_22_failing_java_falls_back_to_our_tokenizer_with_the_reason():
    name, _, tokenized = coco._tokenize({1: ["a dog"]}, {1: ["a dog"]})
    assert tokenized == {1: ["a dog"]}
    assert "gridcap" in name
    assert "the PTB tokenizer failed (could not reserve enough space)" in name


# --- scores per image ---


@pytest.fixture(scope="module", params=["without Java", "with Java"])
def single_scores(request):
    """Scores of captions with unsorted ids, one of them empty; module scope because METEOR starts slowly."""
    ids = {1: 30, 2: 10, 3: 20}
    captions = {ids[i]: "" if i == 3 else text for i, text in GOOD.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "spice_models_installed", lambda: False)
        if request.param == "without Java":
            patch.setenv("PATH", "")
        else:
            request.getfixturevalue("java_scores")
        return score_captions(captions, {ids[i]: texts for i, texts in REFERENCES.items()})


def test_every_image_has_all_metrics(single_scores, monkeypatch):
    assert list(single_scores.per_image) == [30, 10, 20]
    for each in single_scores.per_image.values():
        assert set(each) == set(single_scores.values)
    assert all(value < 1e-6 for value in single_scores.per_image[20].values()), "the empty caption"
    monkeypatch.setenv("PATH", "")
    for image, text in ((30, 1), (10, 2)):
        alone = score_captions({1: GOOD[text]}, {1: REFERENCES[text]}).values
        for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
            assert single_scores.per_image[image][name] == pytest.approx(alone[name], abs=1e-6), name
    if "METEOR" in single_scores.values:
        assert 0.1 < single_scores.per_image[10]["METEOR"] < single_scores.per_image[30]["METEOR"] < 1


def test_cider_and_ciderd_agree_and_are_means_over_images(single_scores):
    for name in ("ROUGE-L", "CIDEr", "CIDEr-D"):
        each = [scores[name] for scores in single_scores.per_image.values()]
        assert single_scores.values[name] == pytest.approx(sum(each) / 3)
    for scores in (single_scores.values, *single_scores.per_image.values()):
        assert scores["CIDEr"] == pytest.approx(scores["CIDEr-D"], abs=1e-6)
    assert single_scores.values["CIDEr"] > 0.5


@pytest.mark.usefixtures("no_java")
def test_spice_per_image_follows_the_order_of_the_captions(monkeypatch):
    class Spice:
        def compute_score(self, truth, ours):
            return 0.5, [{"All": {"f": i / 100}} for i in sorted(truth)]

    monkeypatch.setattr(java.shutil, "which", lambda name: "java")
    monkeypatch.setattr(java, "spice_models_installed", lambda: True)
    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", Spice)
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", None)
    scores = score_captions({30: "a", 10: "b", 20: "c"}, {i: ["a b c"] for i in (10, 20, 30)})
    assert scores.values["SPICE"] == 0.5
    assert {i: each["SPICE"] for i, each in scores.per_image.items()} == {30: 0.3, 10: 0.1, 20: 0.2}


# --- our tokenizer and Stanford's ---

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
]
DIFFERENT = {  # known differences: our tokens, Java's tokens
    "smile :) there": ("smile -rrb- there", "smile :-rrb- there"),
    "is it ok?yes": ("is it ok yes", "is it ok?yes"),
    "1½ cups": ("1½ cups", "1 1/2 cups"),
    "from 10 a.m.-5 p.m.": ("from 10 a.m. -5 p.m.", "from 10 a.m.-5 p.m."),
    "a dog 😀 there": ("a dog 😀 there", "a dog there"),
}


def ours(text):
    return " ".join(ptb_tokenize(text))


def test_tokens_follow_penn_treebank_rules():
    assert ours("A man's T-shirt, isn't it?") == "a man 's t-shirt is n't it"
    assert ours("“The dogs’ bowl” (red) & 3.5 ft. of rope...") == "the dogs bowl -lrb- red -rrb- & 3.5 ft. of rope"
    assert ours("?!.,:;-- ''") == "?!"
    assert ours("नमस्ते") == "नमस्ते", "combining vowel signs belong to the word"


@pytest.mark.usefixtures("java_scores")
def test_our_tokenizer_agrees_with_stanfords_on_typical_captions():
    name, truth, _ = coco._tokenize({0: SAME, 1: list(DIFFERENT)}, {0: [""], 1: ["a"]})
    assert "PTB" in name
    assert [ours(text) for text in SAME] == truth[0]
    tokens = {text: (ours(text), java) for text, java in zip(DIFFERENT, truth[1], strict=True)}
    assert tokens == DIFFERENT, "the docstrings of ptb_tokenize and score_captions list the differences"


@pytest.mark.usefixtures("java_scores")
def test_scores_are_equal_with_and_without_java(monkeypatch):
    references = {i: [SAME[i], SAME[(i * 7 + 3) % len(SAME)]] for i in range(len(SAME))}
    captions = {i: SAME[(i * 5 + 1) % len(SAME)] if i % 3 else SAME[i][:25] for i in range(len(SAME))}
    monkeypatch.setattr(coco, "_add_java", lambda *_: None)
    with_java = score_captions(captions, references)
    monkeypatch.setenv("PATH", "")
    own = score_captions(captions, references)
    assert with_java.tokenizer != own.tokenizer
    assert own.values == pytest.approx(with_java.values)
    assert own.values["CIDEr"] == pytest.approx(cider(captions, references))
    assert own.values["CIDEr"] > 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x0b", "\x85", "\u2028", "\u2029"])
@pytest.mark.usefixtures("java_scores")
def test_line_breaks_in_captions_do_not_shift_later_captions(end, monkeypatch):
    monkeypatch.setattr(coco, "_add_java", lambda *_: None)
    captions = {**GOOD, 1: f"{GOOD[1][:7]}{end}{GOOD[1][8:]}"}
    scores = score_captions(captions, {**REFERENCES, 1: [f"A{end}brown dog", *REFERENCES[1]]})
    assert "PTB" in scores.tokenizer
    assert scores.per_image == score_captions(GOOD, {**REFERENCES, 1: ["a brown dog", *REFERENCES[1]]}).per_image


@pytest.mark.usefixtures("java_scores")
def test_item_22_read_only_site_packages_do_not_change_the_tokenizer(monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError("read-only site-packages")

    monkeypatch.setattr(coco, "_add_java", lambda *_: None)
    monkeypatch.setattr("pycocoevalcap.tokenizer.ptbtokenizer.tempfile.NamedTemporaryFile", fail)
    assert score_captions(GOOD, REFERENCES).tokenizer.startswith("PTB")


def test_item_22_spice_writes_to_a_temporary_folder_if_its_own_is_read_only(monkeypatch):
    from pycocoevalcap.spice import spice

    before = spice.TEMP_DIR, spice.CACHE_DIR
    monkeypatch.setattr(java.os, "access", lambda *_: False)
    with java._writable_spice_folders():
        folders = [Path(spice.__file__).parent / name for name in (spice.TEMP_DIR, spice.CACHE_DIR)]
        assert all(folder.parent.is_relative_to(tempfile.gettempdir()) for folder in folders)
        assert all(folder.parent.is_dir() for folder in folders)
    assert before == (spice.TEMP_DIR, spice.CACHE_DIR)
    assert not folders[0].parent.exists()
