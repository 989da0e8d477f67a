"""The captioner as a library: one call, and what a notebook shows of it."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from gridcap import Caption, Captioner
from gridcap.common.config import CaptionConfig
from gridcap.common.image import InvalidImageError


def test_one_photograph_gives_one_caption(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(str(checkpoint()), device="cpu")
    found = captioner(str(photo))
    (wanted,) = captioner.caption([photo], CaptionConfig())
    assert isinstance(found, Caption)
    assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
    assert found.text == " ".join(found.tokens)
    assert found.log_prob == pytest.approx(wanted.log_prob)
    assert found.attention is not None
    assert found.attention.shape == (len(found.tokens), 8, 8)
    np.testing.assert_array_equal(found.image, captioner.view(photo))


def test_many_are_captioned_in_batches_in_their_order(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = sorted(scenes(5).iterdir())
    captioner = Captioner.load(checkpoint(), device="cpu")
    found = captioner(photos, batch_size=2)
    assert [c.text for c in found] == [captioner(photo).text for photo in photos]
    assert captioner([]) == []


def test_options_are_those_of_the_command(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(checkpoint(), device="cpu")
    assert len(captioner(photo, max_length=3).tokens) <= 3
    with pytest.raises(ValidationError, match="beam_width"):
        captioner(photo, beam_width=3)


def test_a_bad_file_is_named_by_its_reason(fake: Any, checkpoint: Any) -> None:
    with pytest.raises(InvalidImageError, match="missing"):
        Captioner.load(checkpoint(), device="cpu")("nowhere.jpg")


@pytest.mark.parametrize("family", ["attention", "lstm"])
def test_a_notebook_shows_image_caption_and_looks(fake: Any, scenes: Any, checkpoint: Any, family: str) -> None:
    found = Captioner.load(checkpoint(family), device="cpu")(sorted(scenes(1).iterdir())[0])
    page = found._repr_html_()
    assert found.text in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert found.image is not None
        if family == "lstm":
            np.testing.assert_array_equal(np.asarray(picture), found.image)
        else:
            assert picture.width > found.image.shape[1], "the image and a panel a word"


def test_a_caption_without_its_image_is_shown_as_text_and_escaped() -> None:
    page = Caption("<b> & a dog", ["<b>", "&", "a", "dog"], -1.5, None)._repr_html_()
    assert page == "<p>&lt;b&gt; &amp; a dog <small>(log-probability -1.50)</small></p>"


def test_the_package_loads_torch_only_when_it_is_asked_for_more() -> None:
    code = "import sys, caption; print('torch' in sys.modules); caption.Captioner; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(ImportError, match="nothing"):
        from gridcap.caption import nothing  # type: ignore[attr-defined]  # noqa: F401
