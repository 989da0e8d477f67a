"""Captioner as a library: the call interface and the notebook representation."""

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


def test_one_image_returns_one_caption(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(str(checkpoint()), device="cpu")
    caption = captioner(str(photo))
    (expected,) = captioner.caption([photo], CaptionConfig())
    assert isinstance(caption, Caption)
    assert (caption.text, caption.tokens) == (expected.text, expected.tokens)
    assert caption.text == " ".join(caption.tokens)
    assert caption.log_prob == pytest.approx(expected.log_prob)
    assert caption.attention is not None
    assert caption.attention.shape == (len(caption.tokens), 8, 8)
    np.testing.assert_array_equal(caption.image, captioner.display_image(photo))


def test_several_images_return_captions_in_order(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = sorted(scenes(5).iterdir())
    captioner = Captioner.load(checkpoint(), device="cpu")
    captions = captioner(photos, batch_size=2)
    assert [c.text for c in captions] == [captioner(photo).text for photo in photos]
    assert captioner([]) == []


def test_options_are_validated_like_the_flags(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(checkpoint(), device="cpu")
    assert len(captioner(photo, max_length=3).tokens) <= 3
    with pytest.raises(ValidationError, match="beam_width"):
        captioner(photo, beam_width=3)


def test_missing_file_raises_with_the_reason(fake: Any, checkpoint: Any) -> None:
    with pytest.raises(InvalidImageError, match="missing"):
        Captioner.load(checkpoint(), device="cpu")("nowhere.jpg")


@pytest.mark.parametrize("family", ["attention", "lstm"])
def test_notebook_shows_image_caption_and_attention_maps(fake: Any, scenes: Any, checkpoint: Any, family: str) -> None:
    caption = Captioner.load(checkpoint(family), device="cpu")(sorted(scenes(1).iterdir())[0])
    page = caption._repr_html_()
    assert caption.text in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert caption.image is not None
        if family == "lstm":
            np.testing.assert_array_equal(np.asarray(picture), caption.image)
        else:
            assert picture.width > caption.image.shape[1], "the image and one panel per token"


def test_caption_without_image_is_shown_as_escaped_text() -> None:
    page = Caption("<b> & a dog", ["<b>", "&", "a", "dog"], -1.5, None)._repr_html_()
    assert page == "<p>&lt;b&gt; &amp; a dog <small>(log-probability -1.50)</small></p>"


def test_captions_with_attention_can_be_compared() -> None:
    first, second = (Caption("a ring", ["a", "ring"], -1.5, np.ones((2, 8, 8), np.float32)) for _ in range(2))
    assert first == second
    assert first != Caption("a cross", ["a", "cross"], -1.5, None)


def test_load_requires_a_folder() -> None:
    with pytest.raises(TypeError, match="path"):
        Captioner.load()  # type: ignore[call-arg]


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, gridcap; print('torch' in sys.modules); gridcap.Captioner; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(ImportError, match="nothing"):
        from gridcap import nothing  # type: ignore[attr-defined]  # noqa: F401
