"""evaluate-decoder --report: selection of the images and contents of the page."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from gridcap.common.store.reader import FeatureStore
from gridcap.train.evaluate_cli import evaluate_decoder
from gridcap.train.evaluation import Evaluation
from gridcap.train.metrics.coco import Scores
from gridcap.train.report import MAX_IMAGES, select_images

pytestmark = pytest.mark.usefixtures("no_java")
ARGUMENTS = ("--checkpoint", "runs/done", "--features", "features/test.h5")


@pytest.fixture
def images(project):
    """The images of the test split; the second file is not an image."""
    folder = project / "images"
    folder.mkdir()
    with FeatureStore(project / "features" / "test.h5") as store:
        for i, name in enumerate(store.file_name):
            Image.new("RGB", (60 + i, 40), (30 * i, 90, 200)).save(folder / name)
        (folder / store.file_name[1]).write_text("not an image")
    return folder


def shown(path):
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(data)


def test_report_shows_caption_scores_references_and_attention_of_every_image(project, images, invoke):
    output = invoke(evaluate_decoder, *ARGUMENTS, "--report", "out/r.html", "--output", "out/e.json")
    assert re.search(r"done: .*, out/r\.html", output)
    tree = json.loads((project / "out" / "e.json").read_text())
    entries = shown(project / "out" / "r.html")
    assert [i["name"] for i in entries] == [c["file_name"] for c in tree["captions"]]
    assert [i["caption"] for i in entries] == [c["caption"] for c in tree["captions"]]
    assert [i["references"] for i in entries] == [c["references"] for c in tree["captions"]]
    assert next(iter(entries[0]["scores"])) == "CIDEr"
    assert np.mean([i["scores"]["CIDEr"] for i in entries]) == pytest.approx(tree["metrics"]["CIDEr"], abs=1e-3)
    assert all(i["grid"] == [2, 2] and len(i["peaks"]) == len(i["tokens"]) for i in entries)
    assert [i["missing"] for i in entries] == ["", "not an image", *[""] * 5]
    assert entries[3]["size"] == [63, 40]
    page = (project / "out" / "r.html").read_text(encoding="utf-8")
    for text in ("done on test", "7 images", "beam 2", "attention, embed size 12", "inception_v3"):
        assert text in page
    assert "Training curves" in page


def test_images_are_not_required_without_report(project, invoke):
    assert not (project / "images").exists()
    invoke(evaluate_decoder, *ARGUMENTS)


def test_dry_run_names_the_report_and_writes_nothing(project, images, invoke, files):
    before = files(project)
    assert "and r.html" in invoke(evaluate_decoder, *ARGUMENTS, "--report", "r.html", "--dry-run")
    assert files(project) == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--report", "r.png"], 2, "must end in .html"),
        (["--report", "r.html"], 2, "contains no image of"),
        (["--report", "r.html", "--images", "elsewhere"], 2, "contains no image of"),
        (["--report", "r.html", "--images", "nowhere"], 1, "nowhere: no such folder"),
        (["--images", "elsewhere"], 2, "--images requires --report"),
    ],
)
def test_errors_are_reported_before_any_work(project, arguments, status, message, invoke):
    (project / "elsewhere").mkdir()
    output = invoke(evaluate_decoder, *ARGUMENTS, *arguments, status=status)
    assert message in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_unknown_image_folder_is_a_usage_error(project, images, new_data, invoke):
    """The split of the store is in neither configuration."""
    data = new_data(project / "other.h5", 7, first_id=700, split="other")
    for name in data.store.file_name:
        Image.new("RGB", (60, 40)).save(images / name)
    given = ("--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json", "--report", "r.html")
    assert "pass --images FOLDER" in invoke(evaluate_decoder, *given, status=2)
    invoke(evaluate_decoder, *given, "--images", "images")
    assert len(shown(project / "r.html")) == 7


def test_large_reports_show_best_worst_and_random_images():
    ids = list(range(100, 100 + 3 * MAX_IMAGES))
    scores = dict(zip(ids, np.random.default_rng(0).permutation(len(ids)).tolist(), strict=True))
    result = Evaluation(
        dict.fromkeys(ids, "a"), {}, {}, Scores({}, {i: {"CIDEr": s} for i, s in scores.items()}, ""), {}
    )
    selected = select_images(result, 0)
    assert len(selected) == len(set(selected)) == MAX_IMAGES
    assert selected == sorted(selected), "in the order of the data set"
    ranks = sorted(scores[i] for i in selected)
    assert ranks[:100] == list(range(100))
    assert ranks[-100:] == list(range(3 * MAX_IMAGES - 100, 3 * MAX_IMAGES))
    assert select_images(result, 0) == selected != select_images(result, 1)
