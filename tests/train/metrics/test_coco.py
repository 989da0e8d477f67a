import gc
import math
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from gridcap.train.metrics import java
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
def test_without_java_metrics_that_need_it_have_a_reason():
    scores = score_captions({i: f"{text}." for i, text in PERFECT.items()}, REFERENCES)
    assert set(scores.values) == WITHOUT_JAVA
    assert scores.values["BLEU-4"] == pytest.approx(1, abs=1e-6), "the full stop is not a token"
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


def test_with_java_meteor_is_computed(java_scores):
    assert java_scores.tokenizer == "PTB, in Python"
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
    collecting = threading.Thread(target=gc.collect, daemon=True)  # runs Meteor.__del__ in another thread
    collecting.start()
    collecting.join(15)
    assert not collecting.is_alive(), "the scorer waits for a lock of a thread that has ended"


def test_separators_of_meteor_in_references_are_removed(java_scores):
    references = {i: [f"{texts[0]} ||| {texts[0]}", *texts[1:]] for i, texts in REFERENCES.items()}
    assert "METEOR" in score_captions(PERFECT, references).values


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


@pytest.mark.usefixtures("java_scores")
def test_java_changes_no_score(monkeypatch):
    monkeypatch.setattr(java, "spice_models_installed", lambda: False)
    with_java = score_captions(GOOD, REFERENCES).values
    monkeypatch.setenv("PATH", "")
    assert score_captions(GOOD, REFERENCES).values.items() <= with_java.items()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x0b", "\x85", "\u2028", "\u2029"])
@pytest.mark.usefixtures("no_java")
def test_line_breaks_in_captions_are_spaces(end):
    captions = {**GOOD, 1: f"{GOOD[1][:7]}{end}{GOOD[1][8:]}"}
    scores = score_captions(captions, {**REFERENCES, 1: [f"A{end}brown dog", *REFERENCES[1]]})
    assert scores.per_image == score_captions(GOOD, {**REFERENCES, 1: ["a brown dog", *REFERENCES[1]]}).per_image
