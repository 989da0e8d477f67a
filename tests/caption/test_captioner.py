"""Captioner combines encoder and decoder exactly as in training, and rejects mismatched weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gridcap.caption.captioner import Captioner
from gridcap.caption.result import Caption
from gridcap.common.config import CaptionConfig
from gridcap.common.errors import CheckpointError, MismatchError, WeightsError
from gridcap.common.image import InvalidImageError, load_image
from gridcap.common.store.codecs import find_codec
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.registry import find_encoder
from gridcap.extract.encoders.weights import identify_weights
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.decoding.generate import generate_captions
from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.ensemble import load_ensemble

BEAM = CaptionConfig(beam_size=3, max_length=9, length_penalty=0.7)


def reference_caption(
    encoder: Any, run: Path, photo: Path, settings: CaptionConfig, resize_mode: str = "stretch"
) -> Caption:
    """Load, encode, and decode one image step by step."""
    checkpoint = load_checkpoint(run)
    grid = encoder.encode(np.stack([load_image(photo, 299, resize_mode)]))
    cells = torch.from_numpy(grid).float().reshape(1, 64, 2048)
    options = BeamOptions(settings.beam_size, settings.max_length, settings.length_penalty)
    (best,) = beam_search(checkpoint.decoder, cells, options)
    attention = None if best.attention is None else best.attention.reshape(-1, 8, 8)
    tokens = [checkpoint.vocabulary.tokens[t] for t in best.tokens]
    return Caption(" ".join(tokens), tokens, best.log_prob, attention)


def assert_same(actual: Caption, expected: Caption) -> None:
    assert actual.text == expected.text
    assert actual.tokens == expected.tokens
    assert actual.log_prob == pytest.approx(expected.log_prob, abs=1e-3)
    if expected.attention is None:
        assert actual.attention is None
    else:
        np.testing.assert_allclose(actual.attention, expected.attention, atol=1e-4)


@pytest.mark.parametrize("family", ["attention", "lstm"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_equal_step_by_step_encoding_and_decoding(
    fake: Any, scenes: Any, checkpoint: Any, family: str, beam_size: int
) -> None:
    run, photos = checkpoint(family), sorted(scenes(4).iterdir())
    settings = BEAM.model_copy(update={"beam_size": beam_size})
    captions = Captioner.load(run, device="cpu").caption(photos, settings)
    assert len({c.text for c in captions}) > 1, "the captions of the fixture must depend on the photo"
    for photo, caption in zip(photos, captions, strict=True):
        assert_same(caption, reference_caption(fake("", None, EncoderOptions()), run, photo, settings))


def test_length_penalty_is_applied(fake: Any, scenes: Any, checkpoint: Any) -> None:
    run, photos = checkpoint("lstm", seed=2), sorted(scenes(4).iterdir())
    captioner, lengths = Captioner.load(run, device="cpu"), []
    for penalty in (0.0, 2.0):
        settings = BEAM.model_copy(update={"length_penalty": penalty})
        captions = captioner.caption(photos, settings)
        for photo, caption in zip(photos, captions, strict=True):
            assert_same(caption, reference_caption(fake("", None, EncoderOptions()), run, photo, settings))
        lengths.append(sum(len(c.tokens) for c in captions))
    assert lengths[0] < lengths[1], "a penalty favors longer captions"


def test_real_encoder_gives_the_same_captions_as_step_by_step_decoding(
    scenes: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_encoder("inception_v3").spec
    built: list[GridEncoder] = []

    class RecordingEncoder(GridEncoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            built.append(self)

    monkeypatch.setattr("gridcap.extract.encoders.weights.CALIBRATION_IMAGES", 4)  # saves several seconds
    monkeypatch.setattr("gridcap.caption.captioner.GridEncoder", RecordingEncoder)
    identity = identify_weights("inception_v3", "random:5")
    provenance = describe_features(
        find_encoder("inception_v3"), identity, EncoderOptions("float32", "cpu"), "crop", "pillow 1"
    )
    run, photos = checkpoint(provenance=provenance), sorted(scenes(2, size=(80, 60)).iterdir())
    captions = Captioner.load(run, device="cpu").caption(photos, BEAM)
    assert built[0].spec == spec
    for photo, caption in zip(photos, captions, strict=True):
        assert_same(caption, reference_caption(built[0], run, photo, BEAM, "crop"))


def test_caption_does_not_depend_on_the_batch(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captioner, photos = Captioner.load(checkpoint(), device="cpu"), sorted(scenes(5).iterdir())
    batched = captioner.caption(photos, BEAM)
    for photo, caption in zip(photos, batched, strict=True):
        assert_same(captioner.caption([photo], BEAM)[0], caption)


def test_block_trigrams_is_applied(fake: Any, scenes: Any, checkpoint: Any) -> None:
    run, photos = checkpoint("lstm", end_bias=-50), sorted(scenes(3).iterdir())
    captioner, repeated = Captioner.load(run, device="cpu"), []
    for block in (False, True):
        settings = CaptionConfig(beam_size=1, max_length=30, block_trigrams=block)
        sequences = [c.tokens for c in captioner.caption(photos, settings)]
        trigrams = [list(zip(s, s[1:], s[2:], strict=False)) for s in sequences]
        repeated.append(any(len(set(t)) < len(t) for t in trigrams))
    assert repeated == [True, False]


SAMPLE = CaptionConfig(decoding="sample", max_length=9, temperature=1.5)


def test_samples_depend_on_the_generator_but_not_on_the_batch(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captioner, photos = Captioner.load(checkpoint(), device="cpu"), sorted(scenes(5).iterdir())
    first = captioner.caption(photos, SAMPLE, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    alone = [captioner.caption([photo], SAMPLE, generator)[0] for photo in photos]
    for a, b in zip(alone, first, strict=True):
        assert_same(a, b)
    other = captioner.caption(photos, SAMPLE, torch.Generator().manual_seed(4))
    assert [c.text for c in other] != [c.text for c in first]
    assert all(c.attention is not None and c.attention.shape == (len(c.tokens), 8, 8) for c in first)


def test_several_checkpoints_form_an_ensemble(fake: Any, scenes: Any, checkpoint: Any) -> None:
    runs, photos = [checkpoint("attention", name="a"), checkpoint("lstm", seed=2, name="b")], [*scenes(4).iterdir()]
    captioner = Captioner.load(*runs, device="cpu")
    assert captioner.has_attention
    grids = torch.from_numpy(
        fake("", None, EncoderOptions()).encode(np.stack([captioner.preprocess(p) for p in photos]))
    )
    expected = generate_captions(load_ensemble(runs).decoder, grids.float().reshape(4, 64, 2048), BEAM)
    captions = captioner.caption(photos, BEAM)
    vocabulary = captioner.checkpoint.vocabulary
    assert [c.text for c in captions] == [vocabulary.decode(h.tokens) for h in expected]
    for run in runs:
        assert captions != Captioner.load(run, device="cpu").caption(photos, BEAM)


def test_attention_sums_to_one_over_the_grid_for_every_token(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captions = Captioner.load(checkpoint(end_bias=-5), device="cpu").caption(sorted(scenes(2).iterdir()), BEAM)
    for caption in captions:
        assert caption.attention is not None
        assert caption.attention.shape == (len(caption.tokens), 8, 8)
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)


def test_empty_caption_has_empty_attention(fake: Any, scenes: Any, checkpoint: Any) -> None:
    """None is reserved for decoders without attention."""
    (caption,) = Captioner.load(checkpoint(end_bias=1e4), device="cpu").caption(list(scenes(1).iterdir()), BEAM)
    assert caption.tokens == []
    assert caption.text == ""
    assert caption.attention is not None
    assert caption.attention.shape == (0, 8, 8)


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_photos_are_resized_like_the_training_images(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, resize_mode: str
) -> None:
    provenance = provenance_of()
    provenance["preprocessing"] = {**provenance["preprocessing"], "resize_mode": resize_mode}
    (photo,) = scenes(1, size=(90, 30)).iterdir()
    captioner = Captioner.load(checkpoint(provenance=provenance), device="cpu")
    np.testing.assert_array_equal(captioner.preprocess(photo), load_image(photo, 299, resize_mode))


@pytest.mark.parametrize("recorded", [None, False, True])
def test_large_photos_are_decoded_like_the_training_images(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, recorded: bool | None
) -> None:
    provenance = provenance_of()
    if recorded is not None:
        provenance["preprocessing"] = {**provenance["preprocessing"], "jpeg_scaled_decoding": recorded}
    (photo,) = scenes(1, size=(1300, 1210)).iterdir()
    full, scaled = (load_image(photo, 299, "stretch", flag) for flag in (False, True))
    assert (full != scaled).any()
    captioner = Captioner.load(checkpoint(provenance=provenance), device="cpu")
    np.testing.assert_array_equal(captioner.preprocess(photo), scaled if recorded else full)


def test_display_image_shows_what_the_grid_covers(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, tmp_path: Path
) -> None:
    photo = tmp_path / "wide.png"
    Image.new("RGB", (1200, 400), (10, 200, 30)).save(photo)
    stretched = Captioner.load(checkpoint(), device="cpu").display_image(photo)
    assert stretched.shape == (160, 480, 3), "the whole photo in its own aspect ratio"
    assert (stretched == (10, 200, 30)).all()
    provenance = provenance_of()
    provenance["preprocessing"] = {**provenance["preprocessing"], "resize_mode": "crop"}
    cropped = Captioner.load(checkpoint(provenance=provenance, name="cropped"), device="cpu")
    np.testing.assert_array_equal(cropped.display_image(photo), cropped.preprocess(photo))


def test_invalid_image_raises_with_the_reason(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(2, invalid=(1,))
    captioner, photos = Captioner.load(checkpoint(), device="cpu"), sorted(folder.iterdir())
    for call in (
        lambda: captioner.caption(photos, BEAM),
        lambda: captioner(photos),
        lambda: captioner.alternatives(photos[1], BEAM),
        lambda: captioner.display_image(photos[1]),
    ):
        with pytest.raises(InvalidImageError, match="not an image") as caught:
            call()
        assert str(caught.value) == f"{photos[1]}: not an image"
        assert caught.value.reason == "not an image"


# ------------------------------------------------------------------------------------------------- encoder weights


def test_seed_of_random_weights_is_read_from_the_checkpoint(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    run = checkpoint(provenance=provenance_of("random:41"))
    assert Captioner.load(run, device="cpu").provenance["weights"]["name"] == "random:41"


def test_weights_with_another_checksum_are_rejected(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    """The name alone is not enough: the SHA-256 is compared."""
    provenance = provenance_of()
    provenance["weights"] = {**provenance["weights"], "sha256": "0" * 64}
    run = checkpoint(provenance=provenance)
    with pytest.raises(MismatchError) as caught:
        Captioner.load(run, device="cpu")
    assert "weights" in caught.value.message
    assert "00000000" in caught.value.message
    assert str(run) in caught.value.message


@pytest.fixture
def local_weights(tmp_path: Path) -> Path:
    """Return a weights file with arbitrary content: the fake encoder does not read it."""
    (tmp_path / "mine.pth").write_bytes(b"my weights")
    return tmp_path / "mine.pth"


def test_local_weights_file_is_required_again(
    fake: Any, checkpoint: Any, provenance_of: Any, local_weights: Path
) -> None:
    run = checkpoint(provenance=provenance_of(str(local_weights)))
    with pytest.raises(WeightsError) as caught:
        Captioner.load(run, device="cpu")
    assert "mine.pth" in caught.value.message
    assert "--weights" in caught.value.hint
    moved = local_weights.rename(local_weights.with_name("moved.pth"))
    assert Captioner.load(run, device="cpu", weights=moved).provenance["weights"]["name"] == "mine.pth"


def test_different_weights_file_of_the_same_name_is_rejected(
    fake: Any, checkpoint: Any, provenance_of: Any, local_weights: Path, tmp_path: Path
) -> None:
    run = checkpoint(provenance=provenance_of(str(local_weights)))
    other = tmp_path / "other" / "mine.pth"
    other.parent.mkdir()
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(MismatchError, match=r"mine\.pth"):
        Captioner.load(run, device="cpu", weights=other)


def test_item_23_a_photo_passed_as_weights_is_not_called_other_features(
    fake: Any, checkpoint: Any, scenes: Any
) -> None:
    photo = next(scenes(1).iterdir())
    with pytest.raises(WeightsError, match=f"{photo}: "):
        Captioner.load(checkpoint(), device="cpu", weights=photo)


def test_local_file_named_like_imagenet_weights_is_not_downloaded(
    fake: Any, checkpoint: Any, provenance_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("tried to download ImageNet weights")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_download)
    (tmp_path / "imagenet_finetuned.pth").write_bytes(b"my weights")
    run = checkpoint(provenance=provenance_of(str(tmp_path / "imagenet_finetuned.pth")))
    with pytest.raises(WeightsError, match=r"imagenet_finetuned\.pth"):
        Captioner.load(run, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [("grid_shape", [7, 7, 2048]), ("decoder", "opencv"), ("resize", "nearest")],
)
def test_features_of_another_layer_shape_or_preprocessing_are_rejected(
    fake: Any, checkpoint: Any, provenance_of: Any, sign: Any, key: str, value: Any
) -> None:
    provenance = provenance_of()
    if key in provenance:
        provenance[key] = value
    else:
        provenance["preprocessing"] = {**provenance["preprocessing"], key: value}
    run = checkpoint()
    file = next(run.glob("checkpoints/*/provenance.json"))
    file.write_text(json.dumps(provenance))
    sign(file.parent)
    with pytest.raises((MismatchError, CheckpointError)):
        Captioner.load(run, device="cpu")


def test_features_of_an_unknown_encoder_are_rejected(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    run = checkpoint(provenance=provenance_of(encoder="someone's network"))
    with pytest.raises(WeightsError, match="someone's network"):
        Captioner.load(run, device="cpu")


def test_other_library_versions_are_accepted(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    Captioner.load(checkpoint(provenance=provenance_of(versions={"pillow": "1.0", "torch": "0.4"})), device="cpu")


def test_missing_checkpoint_folder_is_named(fake: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing_here"):
        Captioner.load(tmp_path / "nothing_here", device="cpu")


@pytest.mark.parametrize("decoding", ["beam", "sample"])
def test_alternatives_are_distinct_and_sorted(fake: Any, scenes: Any, checkpoint: Any, decoding: str) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(checkpoint(end_bias=2.0), device="cpu")
    settings = CaptionConfig(decoding=decoding, beam_size=4, max_length=9)  # type: ignore[arg-type]
    found = captioner.alternatives(photo, settings)
    assert 2 <= len(found) <= 4
    assert len({c.text for c in found}) == len(found)
    if decoding == "beam":
        assert found[0].text == captioner.caption([photo], settings)[0].text
    else:
        assert [c.log_prob for c in found] == sorted((c.log_prob for c in found), reverse=True)
        assert [c.text for c in captioner.alternatives(photo, settings, seed=1)] != [c.text for c in found]
    assert all(c.image is not None and c.attention is not None for c in found)


def test_captions_are_immutable() -> None:
    caption = Caption("a ring", ["a", "ring"], -1.0, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        caption.text = "b"  # type: ignore[misc]


# ---------------------------------------------------------------------------------------- other kinds of features


def test_grids_are_quantized_like_the_training_features(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fake.encode
    monkeypatch.setattr(fake, "encode", lambda self, images: np.abs(real(self, images)))  # like the output of a ReLU
    inputs: list[np.ndarray] = []

    def search(decoder: Any, grids: torch.Tensor, *more: Any) -> Any:
        inputs.append(grids.numpy().copy())
        return generate_captions(decoder, grids, *more)

    monkeypatch.setattr("gridcap.caption.captioner.generate_captions", search)
    captioner = Captioner.load(checkpoint(provenance=provenance_of(dtype="uint8")))
    photos = sorted(scenes(2).iterdir())
    pixels = np.stack([captioner.preprocess(path) for path in photos])
    captioner.caption_pixels(pixels, CaptionConfig())
    exact = captioner._encoder.encode(pixels)
    assert exact.dtype == np.float16
    expected = find_codec("uint8").round_trip(exact).astype(np.float32).reshape(2, 64, 2048)
    np.testing.assert_array_equal(inputs[0], expected)
    assert not np.array_equal(expected, exact.astype(np.float32).reshape(2, 64, 2048))


def test_decoder_trained_on_nvjpeg_images_accepts_photos(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any
) -> None:
    provenance = provenance_of()
    provenance["preprocessing"] = {**provenance["preprocessing"], "decoder": "nvjpeg"}
    captioner = Captioner.load(checkpoint(provenance=provenance))
    assert captioner.trained_on_nvjpeg
    assert captioner.caption([next(scenes(1).iterdir())], CaptionConfig())
    assert not Captioner.load(checkpoint(name="other")).trained_on_nvjpeg
