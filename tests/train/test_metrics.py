import math
import os
import shutil
import stat
import threading

import pytest

from train import metrics
from train.metrics import cider, score_captions

REFERENCES = {
    1: ["a brown dog runs over the green grass", "the dog is running outside"],
    2: ["two people ride their bikes down the street", "a man and a woman on bicycles"],
    3: ["a plate of food with rice and beans", "rice on a white plate"],
}
PERFECT = {i: texts[0] for i, texts in REFERENCES.items()}
GOOD = {1: "a brown dog runs over the street", 2: "two people ride their bikes", 3: "a plate of food"}
BAD = {1: "two people on grass", 2: "a plate on the street", 3: "a dog is running"}
WITHOUT_JAVA = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}


def test_cider_grows_with_better_captions():
    assert 0 <= cider(BAD, REFERENCES) < cider(GOOD, REFERENCES) < cider(PERFECT, REFERENCES) <= 10


def test_cider_of_the_only_reference_itself_is_ten():
    only = {i: [text] for i, text in PERFECT.items()}
    assert cider(PERFECT, only) == pytest.approx(10)


def test_cider_ignores_case_and_punctuation_and_belongs_to_the_right_image():
    shouted = {i: f"{text.upper()}!" for i, text in PERFECT.items()}
    assert cider(shouted, REFERENCES) == cider(PERFECT, REFERENCES)
    moved = dict(zip((2, 3, 1), PERFECT.values(), strict=True))
    assert cider(moved, REFERENCES) < 0.2 * cider(PERFECT, REFERENCES)
    backwards = dict(reversed(PERFECT.items()))
    assert cider(backwards, REFERENCES) == pytest.approx(cider(PERFECT, REFERENCES))


def test_references_of_images_without_a_candidate_do_not_count():
    some = {1: PERFECT[1], 2: PERFECT[2]}
    assert cider(some, REFERENCES) == cider(some, {i: REFERENCES[i] for i in some})


@pytest.mark.usefixtures("no_java")
def test_identical_captions_have_a_bleu_and_rouge_of_one():
    values = score_captions(PERFECT, REFERENCES).values
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert values[name] == pytest.approx(1, abs=1e-6), name


@pytest.mark.usefixtures("no_java")
def test_bleu_1_and_rouge_l_as_worked_out_by_hand():
    values = score_captions({7: "the cat sat on mat"}, {7: ["the cat is on the mat"]}).values
    # Four of five words are in the reference; brevity penalty for 5 words against 6.
    assert values["BLEU-1"] == pytest.approx(4 / 5 * math.exp(1 - 6 / 5), rel=1e-6)
    # Longest common subsequence: the cat on mat.
    precision, recall, beta = 4 / 5, 4 / 6, 1.2
    rouge = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert values["ROUGE-L"] == pytest.approx(rouge, rel=1e-6)


@pytest.mark.usefixtures("no_java")
def test_every_score_grows_with_better_captions():
    bad, good, perfect = (score_captions(captions, REFERENCES).values for captions in (BAD, GOOD, PERFECT))
    for name in WITHOUT_JAVA:
        assert bad[name] < good[name] < perfect[name], name


@pytest.mark.usefixtures("no_java")
def test_without_java_our_tokeniser_serves_and_what_is_left_out_says_why():
    scores = score_captions({i: f"{text}." for i, text in PERFECT.items()}, REFERENCES)
    assert set(scores.values) == WITHOUT_JAVA
    assert scores.values["BLEU-4"] == pytest.approx(1, abs=1e-6), "the full stop is no word"
    assert "gridcap" in scores.tokenizer
    assert set(scores.left_out) == {"METEOR", "SPICE"}
    assert all("java" in why.lower() for why in scores.left_out.values())


@pytest.mark.usefixtures("no_java")
def test_an_empty_caption_is_scored():
    scores = score_captions({**PERFECT, 1: ""}, REFERENCES)
    assert all(0 <= value < 10 and math.isfinite(value) for value in scores.values.values())
    assert scores.values["CIDEr"] < score_captions(PERFECT, REFERENCES).values["CIDEr"]


@pytest.fixture(scope="module")
def java_scores():
    if shutil.which("java") is None:
        assert not os.environ.get("CI"), "CI must have Java, or METEOR is never tested"
        pytest.skip("METEOR needs Java, and there is no java on the PATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_spice_models_there", lambda: False)
        return score_captions({**PERFECT, 3: f"{PERFECT[3].upper()}!"}, REFERENCES)


def test_with_java_captions_go_through_the_ptb_tokeniser_and_meteor_is_computed(java_scores):
    assert "PTB" in java_scores.tokenizer
    assert set(java_scores.values) == WITHOUT_JAVA | {"METEOR"}
    assert java_scores.values["METEOR"] == pytest.approx(1, abs=1e-6)
    assert java_scores.values["BLEU-4"] == pytest.approx(1, abs=1e-6), "case and the exclamation mark do not count"


def test_without_its_models_spice_is_left_out_and_says_what_it_needs(java_scores):
    assert set(java_scores.left_out) == {"SPICE"}
    assert "CoreNLP" in java_scores.left_out["SPICE"]


def test_spice_models_are_there_when_their_jars_are(monkeypatch, tmp_path):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: spec)
    assert not metrics._spice_models_there()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    assert metrics._spice_models_there()


def test_a_java_that_does_not_run_costs_its_metrics_and_nothing_else(monkeypatch, tmp_path):
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = []
    scoring = threading.Thread(target=lambda: found.append(score_captions(PERFECT, REFERENCES)), daemon=True)
    scoring.start()
    scoring.join(15)  # so that a hang fails this test instead of stopping all
    assert found, "score_captions never came back"
    assert set(found[0].values) == WITHOUT_JAVA
    assert found[0].values["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert set(found[0].left_out) == {"METEOR", "SPICE"}


def test_a_java_that_does_not_run_does_not_empty_the_captions_of_a_single_image(monkeypatch, tmp_path):
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    name, (_, ours) = metrics._tokenize_both({1: ["a dog"]}, {1: ["a dog"]})
    assert ours == {1: ["a dog"]}
    assert "gridcap" in name
