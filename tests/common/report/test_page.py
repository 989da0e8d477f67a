"""The content of the report file, and that no text can break out of it. In a browser: test_browser.py."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gridcap.common.errors import UserError
from gridcap.common.report.images import MAX_SIDE, ReportImage
from gridcap.common.report.page import check_is_html, describe_encoder, write_report

NASTY = "</script><script>alert('x')</script> <b>&amp;</b> \u2028 \"quoted\" {{curves}}"


def picture(width=640, height=480, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def random_attention(tokens, rows=2, columns=3, seed=0):
    weights = np.random.default_rng(seed).random((tokens, rows, columns)).astype(np.float32)
    return weights / weights.sum((1, 2), keepdims=True)


def read_images(path):
    """Return the images of a report as its script reads them."""
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


def test_an_image_round_trips(tmp_path):
    attention = random_attention(3)
    image = ReportImage(
        "a/b.jpg", picture(), "a red dog", ["a", "red", "dog"], attention, ["one", "two"], {"CIDEr": 0.51234567}
    )
    write_report(tmp_path / "r.html", "title", {"decoder": "x"}, {"CIDEr": 0.5}, [image])
    (entry,) = read_images(tmp_path / "r.html")
    assert (entry["name"], entry["caption"], entry["tokens"]) == ("a/b.jpg", "a red dog", ["a", "red", "dog"])
    assert entry["references"] == ["one", "two"]
    assert entry["scores"] == {"CIDEr": 0.5123}
    assert entry["grid"] == [2, 3]
    levels = np.frombuffer(base64.b64decode(entry["attention"]), np.uint8).reshape(3, 2, 3)
    assert (levels.reshape(3, -1).max(1) == 255).all(), "relative to the peak weight of each token"
    peaks = np.array(entry["peaks"])[:, None, None]
    np.testing.assert_allclose(levels / 255 * peaks, attention, atol=0.002)
    with Image.open(io.BytesIO(base64.b64decode(entry["jpeg"]))) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.size == (MAX_SIDE, MAX_SIDE * 3 // 4)


def test_text_is_escaped(tmp_path):
    image = ReportImage(NASTY, picture(), NASTY, [NASTY], random_attention(1), [NASTY], {"CIDEr": 1.0})
    write_report(tmp_path / "r.html", NASTY, {NASTY: NASTY}, {NASTY: 1.0}, [image, image])
    for entry in read_images(tmp_path / "r.html"):
        assert entry["name"] == entry["caption"] == entry["tokens"][0] == entry["references"][0] == NASTY
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "alert('x')</script>" not in text
    assert text.count("</script>") == 2, "one ends the data, one the script"
    assert "{{curves}}" in text, "placeholders in data are not replaced"


def test_the_report_makes_no_network_requests(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, {}, [])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|//[a-z]+\.", text)


def test_attention_references_scores_and_picture_are_optional(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, {}, [ReportImage("x.jpg", "truncated", "a dog", ["a", "dog"])])
    (entry,) = read_images(tmp_path / "r.html")
    assert entry["missing"] == "truncated"
    assert entry["jpeg"] == ""
    assert entry["grid"] is None
    assert entry["scores"] == {}


def test_an_empty_caption_has_no_attention_maps(tmp_path):
    image = ReportImage("x.jpg", picture(), "", [], np.zeros((0, 8, 8), np.float32))
    write_report(tmp_path / "r.html", "t", {}, {}, [image])
    assert read_images(tmp_path / "r.html")[0]["grid"] is None


def test_training_curves_are_embedded_if_they_exist(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "curves.png")
    write_report(tmp_path / "with.html", "t", {}, {}, [], tmp_path / "curves.png")
    write_report(tmp_path / "without.html", "t", {}, {}, [], tmp_path / "other.png")
    data = base64.b64encode((tmp_path / "curves.png").read_bytes()).decode()
    assert data in (tmp_path / "with.html").read_text()
    assert "data:image/png" not in (tmp_path / "without.html").read_text()


def test_a_hundred_images_stay_below_6_megabytes(tmp_path):
    """Thumbnails of noise are larger than those of photos, so 1,000 photos stay below 60 MB."""
    images = (
        ReportImage(
            f"{i}.jpg",
            picture(320, 240, i),
            "word " * 12,
            ["word"] * 12,
            random_attention(12, 8, 8),
            ["text " * 12] * 5,
        )
        for i in range(100)
    )
    write_report(tmp_path / "r.html", "t", {}, {}, images)
    assert (tmp_path / "r.html").stat().st_size < 6e6


def test_a_failed_report_leaves_the_old_one(tmp_path):
    def images():
        yield ReportImage("x.jpg", picture(), "a", ["a"])
        raise OSError("gone")

    (tmp_path / "r.html").write_text("old")
    with pytest.raises(OSError, match="gone"):
        write_report(tmp_path / "r.html", "t", {}, {}, images())
    assert (tmp_path / "r.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_other_extensions_are_a_usage_error(tmp_path):
    check_is_html(tmp_path / "r.HTML")
    with pytest.raises(UserError, match=r"must end in \.html"):
        check_is_html(tmp_path / "r.png")


def test_random_weights_are_marked():
    weights = {"name": "random:0", "random": True}
    assert "RANDOM" in describe_encoder({"encoder": "inception_v3", "weights": weights})
    assert "RANDOM" not in describe_encoder({"encoder": "inception_v3", "weights": {**weights, "random": False}})


def test_item_01_two_writers_of_one_report_do_not_mix(tmp_path):
    """The last one wins; each report is complete."""

    def images(name, inner):
        yield ReportImage(name, picture(), "a", ["a"])
        if inner:
            write_report(tmp_path / "r.html", "inner", {}, {}, images("inner.jpg", False))
            assert [entry["name"] for entry in read_images(tmp_path / "r.html")] == ["inner.jpg", "inner.jpg"]
        yield ReportImage(name, picture(), "b", ["b"])

    write_report(tmp_path / "r.html", "outer", {}, {}, images("outer.jpg", True))
    assert [entry["name"] for entry in read_images(tmp_path / "r.html")] == ["outer.jpg", "outer.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
