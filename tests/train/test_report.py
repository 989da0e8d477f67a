"""evaluate-decoder --report: which images are shown, and what is said of them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from gridcap.common.store.reader import FeatureStore
from gridcap.train.evaluate import Evaluation
from gridcap.train.evaluate_cli import evaluate_decoder
from gridcap.train.metrics.coco import Scores
from gridcap.train.report import MOST, choose

pytestmark = pytest.mark.usefixtures("no_java")
ARGUMENTS = ("--checkpoint", "runs/done", "--features", "features/test.h5")


@pytest.fixture
def photos(project):
    """The photos of the test split; the second is no image."""
    folder = project / "images"
    folder.mkdir()
    with FeatureStore(project / "features" / "test.h5") as store:
        for i, name in enumerate(store.file_names):
            Image.new("RGB", (60 + i, 40), (30 * i, 90, 200)).save(folder / name)
        (folder / store.file_names[1]).write_text("not an image")
    return folder


def shown(path):
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(data)


def test_every_image_with_its_caption_scores_references_and_looks(project, photos, invoke):
    output = invoke(evaluate_decoder, *ARGUMENTS, "--report", "out/r.html", "--output", "out/e.json")
    assert re.search(r"done: .*, out/r\.html", output)
    tree = json.loads((project / "out" / "e.json").read_text())
    images = shown(project / "out" / "r.html")
    assert [i["name"] for i in images] == [c["file_name"] for c in tree["captions"]]
    assert [i["caption"] for i in images] == [c["caption"] for c in tree["captions"]]
    assert [i["references"] for i in images] == [c["references"] for c in tree["captions"]]
    assert next(iter(images[0]["scores"])) == "CIDEr"
    assert np.mean([i["scores"]["CIDEr"] for i in images]) == pytest.approx(tree["metrics"]["CIDEr"], abs=1e-3)
    assert all(i["grid"] == [2, 2] and len(i["tops"]) == len(i["words"]) for i in images)
    assert [i["missing"] for i in images] == ["", "not an image", *[""] * 5]
    assert images[3]["size"] == [63, 40]
    page = (project / "out" / "r.html").read_text(encoding="utf-8")
    for said in ("done on test", "7 images", "beam 2", "attention, embed size 12", "inception_v3"):
        assert said in page
    assert "training curves" in page


def test_without_a_report_nothing_of_it_is_needed(project, invoke):
    assert not (project / "images").exists()
    invoke(evaluate_decoder, *ARGUMENTS)


def test_a_dry_run_names_the_report_and_writes_nothing(project, photos, invoke, files):
    before = files(project)
    assert "and r.html" in invoke(evaluate_decoder, *ARGUMENTS, "--report", "r.html", "--dry-run")
    assert files(project) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "r.png"], "must end in .html"),
        (["--report", "r.html"], "holds no image of"),
        (["--report", "r.html", "--images", "elsewhere"], "holds no image of"),
        (["--report", "r.html", "--images", "nowhere"], "nowhere"),
        (["--images", "elsewhere"], "--images is for --report"),
    ],
)
def test_wrong_use_is_told_before_anything_is_done(project, arguments, said, invoke):
    (project / "elsewhere").mkdir()
    output = invoke(evaluate_decoder, *ARGUMENTS, *arguments, status=2)
    assert said in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_a_folder_that_nobody_named_is_asked_for(project, photos, new_data, invoke):
    """A store of a split that neither the configuration nor the run knows."""
    data = new_data(project / "other.h5", 7, first_id=700, split="other")
    for name in data.store.file_names:
        Image.new("RGB", (60, 40)).save(photos / name)
    given = ("--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json", "--report", "r.html")
    assert "give --images FOLDER" in invoke(evaluate_decoder, *given, status=2)
    invoke(evaluate_decoder, *given, "--images", "images")
    assert len(shown(project / "r.html")) == 7


def test_of_too_many_images_the_best_the_worst_and_some_by_chance_are_shown():
    ids = list(range(100, 100 + 3 * MOST))
    scores = dict(zip(ids, np.random.default_rng(0).permutation(len(ids)).tolist(), strict=True))
    result = Evaluation(
        dict.fromkeys(ids, "a"), {}, {}, Scores({}, {i: {"CIDEr": s} for i, s in scores.items()}, ""), {}
    )
    chosen = choose(result, 0)
    assert len(chosen) == len(set(chosen)) == MOST
    assert chosen == sorted(chosen), "in the order of the data set"
    found = sorted(scores[i] for i in chosen)
    assert found[:100] == list(range(100))
    assert found[-100:] == list(range(3 * MOST - 100, 3 * MOST))
    assert choose(result, 0) == chosen != choose(result, 1)
