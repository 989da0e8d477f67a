"""The report as a file: what stands in it, and that no text can break out of it. In a browser: test_report_page.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gridcap.common.errors import UserError
from gridcap.common.report.page import LONGEST, ReportImage, check_is_html, describe_encoder, write_report

NASTY = "</script><script>alert('x')</script> <b>&amp;</b> \u2028 \"quoted\" {{curves}}"


def picture(width=640, height=480, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def looks(words, rows=2, columns=3, seed=0):
    found = np.random.default_rng(seed).random((words, rows, columns)).astype(np.float32)
    return found / found.sum((1, 2), keepdims=True)


def written(path):
    """The images of a report, as its script reads them."""
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


def test_an_image_comes_back_with_all_that_is_said_of_it(tmp_path):
    attention = looks(3)
    image = ReportImage(
        "a/b.jpg", picture(), "a red dog", ["a", "red", "dog"], attention, ["one", "two"], {"CIDEr": 0.51234567}
    )
    write_report(tmp_path / "r.html", "title", {"decoder": "x"}, {"CIDEr": 0.5}, [image])
    (found,) = written(tmp_path / "r.html")
    assert (found["name"], found["caption"], found["words"]) == ("a/b.jpg", "a red dog", ["a", "red", "dog"])
    assert found["references"] == ["one", "two"]
    assert found["scores"] == {"CIDEr": 0.5123}
    assert found["grid"] == [2, 3]
    levels = np.frombuffer(base64.b64decode(found["looks"]), np.uint8).reshape(3, 2, 3)
    assert (levels.reshape(3, -1).max(1) == 255).all(), "relative to each word's strongest cell"
    tops = np.array(found["tops"])[:, None, None]
    np.testing.assert_allclose(levels / 255 * tops, attention, atol=0.002)
    with Image.open(io.BytesIO(base64.b64decode(found["jpeg"]))) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.size == (LONGEST, LONGEST * 3 // 4)


def test_no_text_breaks_out_of_its_place(tmp_path):
    image = ReportImage(NASTY, picture(), NASTY, [NASTY], looks(1), [NASTY], {"CIDEr": 1.0})
    write_report(tmp_path / "r.html", NASTY, {NASTY: NASTY}, {NASTY: 1.0}, [image, image])
    for found in written(tmp_path / "r.html"):
        assert found["name"] == found["caption"] == found["words"][0] == found["references"][0] == NASTY
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "alert('x')</script>" not in text
    assert text.count("</script>") == 2, "that of the data and that of the program"
    assert "{{curves}}" in text, "a text is no part of the template"


def test_nothing_is_asked_from_outside(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, {}, [])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|//[a-z]+\.", text)


def test_without_attention_references_scores_and_picture(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, {}, [ReportImage("x.jpg", "truncated", "a dog", ["a", "dog"])])
    (found,) = written(tmp_path / "r.html")
    assert found["missing"] == "truncated"
    assert found["jpeg"] == ""
    assert found["grid"] is None
    assert found["scores"] == {}


def test_an_empty_caption_has_no_looks(tmp_path):
    image = ReportImage("x.jpg", picture(), "", [], np.zeros((0, 8, 8), np.float32))
    write_report(tmp_path / "r.html", "t", {}, {}, [image])
    assert written(tmp_path / "r.html")[0]["grid"] is None


def test_the_curves_stand_in_it_if_they_are_there(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "curves.png")
    write_report(tmp_path / "with.html", "t", {}, {}, [], tmp_path / "curves.png")
    write_report(tmp_path / "without.html", "t", {}, {}, [], tmp_path / "other.png")
    data = base64.b64encode((tmp_path / "curves.png").read_bytes()).decode()
    assert data in (tmp_path / "with.html").read_text()
    assert "data:image/png" not in (tmp_path / "without.html").read_text()


def test_a_thousand_images_stay_below_60_megabytes(tmp_path):
    """Thumbnails of noise are larger than those of photos."""
    images = (
        ReportImage(f"{i}.jpg", picture(320, 240, i), "word " * 12, ["word"] * 12, looks(12, 8, 8), ["text " * 12] * 5)
        for i in range(100)
    )
    write_report(tmp_path / "r.html", "t", {}, {}, images)
    assert (tmp_path / "r.html").stat().st_size < 6e6


def test_a_report_that_fails_leaves_the_old_one(tmp_path):
    def images():
        yield ReportImage("x.jpg", picture(), "a", ["a"])
        raise OSError("gone")

    (tmp_path / "r.html").write_text("old")
    with pytest.raises(OSError, match="gone"):
        write_report(tmp_path / "r.html", "t", {}, {}, images())
    assert (tmp_path / "r.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_the_file_must_be_html(tmp_path):
    check_is_html(tmp_path / "r.HTML")
    with pytest.raises(UserError, match=r"must end in \.html"):
        check_is_html(tmp_path / "r.png")


def test_random_weights_are_said_loudly():
    weights = {"name": "random:0", "random": True}
    assert "RANDOM" in describe_encoder({"encoder": "inception_v3", "weights": weights})
    assert "RANDOM" not in describe_encoder({"encoder": "inception_v3", "weights": {**weights, "random": False}})
