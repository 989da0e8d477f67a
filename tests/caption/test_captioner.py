"""The captioner says what the decoder says of what the encoder makes of the photo, and refuses other weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gridcap.caption.captioner import Caption, Captioner
from gridcap.common.config import CaptionConfig
from gridcap.common.errors import CheckpointError, MismatchError, WeightsError
from gridcap.common.image import InvalidImageError, load_image
from gridcap.common.store.quantize import as_stored
from gridcap.extract.encoders.grid_encoder import EncoderOptions, GridEncoder
from gridcap.extract.encoders.provenance import describe_features
from gridcap.extract.encoders.specs import ENCODERS
from gridcap.extract.encoders.weights import identify_weights
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.decoding.generate import generate_captions
from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.ensemble import load_ensemble

SEARCH = CaptionConfig(beam_size=3, max_length=9, length_penalty=0.7)


def by_hand(encoder: Any, run: Path, photo: Path, search: CaptionConfig, resize_mode: str = "stretch") -> Caption:
    """Decode, resize, encode, search: one image at a time."""
    checkpoint = load_checkpoint(run)
    grid = encoder.encode(np.stack([load_image(photo, 299, resize_mode)]))
    cells = torch.from_numpy(grid).float().reshape(1, 64, 2048)
    (found,) = beam_search(
        checkpoint.decoder, cells, BeamOptions(search.beam_size, search.max_length, search.length_penalty)
    )
    attention = None if found.attention is None else found.attention.reshape(-1, 8, 8)
    words = [checkpoint.vocabulary.tokens[t] for t in found.tokens]
    return Caption(" ".join(words), words, found.log_prob, attention)


def assert_same(found: Caption, wanted: Caption) -> None:
    assert found.text == wanted.text
    assert found.tokens == wanted.tokens
    assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-3)
    if wanted.attention is None:
        assert found.attention is None
    else:
        np.testing.assert_allclose(found.attention, wanted.attention, atol=1e-4)


@pytest.mark.parametrize("family", ["attention", "lstm"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_are_those_of_encoding_and_searching_by_hand(
    fake: Any, scenes: Any, checkpoint: Any, family: str, beam_size: int
) -> None:
    run, photos = checkpoint(family), sorted(scenes(4).iterdir())
    search = SEARCH.model_copy(update={"beam_size": beam_size})
    captions = Captioner.load(run, device="cpu").caption(photos, search)
    assert len({c.text for c in captions}) > 1, "the fixture's captions must depend on the photo"
    for photo, caption in zip(photos, captions, strict=True):
        assert_same(caption, by_hand(fake("", None, EncoderOptions()), run, photo, search))


def test_the_length_penalty_reaches_the_search(fake: Any, scenes: Any, checkpoint: Any) -> None:
    run, photos = checkpoint("lstm", seed=2), sorted(scenes(4).iterdir())
    captioner, words = Captioner.load(run, device="cpu"), []
    for penalty in (0.0, 2.0):
        search = SEARCH.model_copy(update={"length_penalty": penalty})
        captions = captioner.caption(photos, search)
        for photo, caption in zip(photos, captions, strict=True):
            assert_same(caption, by_hand(fake("", None, EncoderOptions()), run, photo, search))
        words.append(sum(len(c.tokens) for c in captions))
    assert words[0] < words[1], "a penalty favors longer captions"


def test_the_real_encoder_and_the_decoder_are_joined_in_the_same_way(
    scenes: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ENCODERS["inception_v3"]
    built: list[GridEncoder] = []

    class Noted(GridEncoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            built.append(self)

    monkeypatch.setattr("gridcap.extract.encoders.weights.CALIBRATION_IMAGES", 4)  # seconds instead of ten
    monkeypatch.setattr("gridcap.caption.captioner.GridEncoder", Noted)
    identity = identify_weights("inception_v3", "random:5")
    provenance = describe_features("inception_v3", identity, EncoderOptions("float32", "cpu"), "crop", "pillow 1")
    run, photos = checkpoint(provenance=provenance), sorted(scenes(2, size=(80, 60)).iterdir())
    captions = Captioner.load(run, device="cpu").caption(photos, SEARCH)
    assert built[0].spec == spec
    for photo, caption in zip(photos, captions, strict=True):
        assert_same(caption, by_hand(built[0], run, photo, SEARCH, "crop"))


def test_a_caption_does_not_depend_on_its_batch(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captioner, photos = Captioner.load(checkpoint(), device="cpu"), sorted(scenes(5).iterdir())
    together = captioner.caption(photos, SEARCH)
    for photo, caption in zip(photos, together, strict=True):
        assert_same(captioner.caption([photo], SEARCH)[0], caption)


def test_blocked_trigrams_reach_the_search(fake: Any, scenes: Any, checkpoint: Any) -> None:
    run, photos = checkpoint("lstm", end_bias=-50), sorted(scenes(3).iterdir())
    captioner, repeated = Captioner.load(run, device="cpu"), []
    for block in (False, True):
        search = CaptionConfig(beam_size=1, max_length=30, block_trigrams=block)
        words = [c.tokens for c in captioner.caption(photos, search)]
        trigrams = [list(zip(w, w[1:], w[2:], strict=False)) for w in words]
        repeated.append(any(len(set(t)) < len(t) for t in trigrams))
    assert repeated == [True, False]


SAMPLE = CaptionConfig(decoding="sample", max_length=9, temperature=1.5)


def test_sampled_captions_depend_on_the_generator_and_not_on_the_batch(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captioner, photos = Captioner.load(checkpoint(), device="cpu"), sorted(scenes(5).iterdir())
    first = captioner.caption(photos, SAMPLE, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    alone = [captioner.caption([photo], SAMPLE, generator)[0] for photo in photos]
    for a, b in zip(alone, first, strict=True):
        assert_same(a, b)
    other = captioner.caption(photos, SAMPLE, torch.Generator().manual_seed(4))
    assert [c.text for c in other] != [c.text for c in first]
    assert all(c.attention is not None and c.attention.shape == (len(c.tokens), 8, 8) for c in first)


def test_several_checkpoints_decode_together(fake: Any, scenes: Any, checkpoint: Any) -> None:
    runs, photos = [checkpoint("attention", name="a"), checkpoint("lstm", seed=2, name="b")], [*scenes(4).iterdir()]
    captioner = Captioner.load(*runs, device="cpu")
    assert captioner.has_attention
    grids = torch.from_numpy(fake("", None, EncoderOptions()).encode(np.stack([captioner.square(p) for p in photos])))
    found = generate_captions(load_ensemble(runs).decoder, grids.float().reshape(4, 64, 2048), SEARCH)
    together = captioner.caption(photos, SEARCH)
    vocabulary = captioner.checkpoint.vocabulary
    assert [c.text for c in together] == [vocabulary.decode(h.tokens) for h in found]
    for run in runs:
        assert together != Captioner.load(run, device="cpu").caption(photos, SEARCH)


def test_attention_sums_to_one_over_the_grid_for_every_word(fake: Any, scenes: Any, checkpoint: Any) -> None:
    captions = Captioner.load(checkpoint(end_bias=-5), device="cpu").caption(sorted(scenes(2).iterdir()), SEARCH)
    for caption in captions:
        assert caption.attention is not None
        assert caption.attention.shape == (len(caption.tokens), 8, 8)
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)


def test_a_caption_without_words_still_has_its_attention_if_the_decoder_has_one(
    fake: Any, scenes: Any, checkpoint: Any
) -> None:
    """None means a decoder without attention; a decoder that ends at once has looked nowhere."""
    (caption,) = Captioner.load(checkpoint(end_bias=1e4), device="cpu").caption(list(scenes(1).iterdir()), SEARCH)
    assert caption.tokens == []
    assert caption.text == ""
    assert caption.attention is not None
    assert caption.attention.shape == (0, 8, 8)


@pytest.mark.parametrize("resize_mode", ["stretch", "crop", "letterbox"])
def test_photos_are_made_square_as_the_training_images_were(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, resize_mode: str
) -> None:
    made = provenance_of()
    made["preprocessing"] = {**made["preprocessing"], "resize_mode": resize_mode}
    (photo,) = scenes(1, size=(90, 30)).iterdir()
    captioner = Captioner.load(checkpoint(provenance=made), device="cpu")
    np.testing.assert_array_equal(captioner.square(photo), load_image(photo, 299, resize_mode))


def test_the_view_shows_just_what_the_grid_covers(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, tmp_path: Path
) -> None:
    photo = tmp_path / "wide.png"
    Image.new("RGB", (1200, 400), (10, 200, 30)).save(photo)
    stretched = Captioner.load(checkpoint(), device="cpu").view(photo)
    assert stretched.shape == (160, 480, 3), "the whole photo in its own proportions"
    assert (stretched == (10, 200, 30)).all()
    made = provenance_of()
    made["preprocessing"] = {**made["preprocessing"], "resize_mode": "crop"}
    cut = Captioner.load(checkpoint(provenance=made, name="cut"), device="cpu")
    np.testing.assert_array_equal(cut.view(photo), cut.square(photo))


def test_a_bad_photo_is_refused_with_its_reason(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(2, bad=(1,))
    with pytest.raises(InvalidImageError, match="not an image"):
        Captioner.load(checkpoint(), device="cpu").caption(sorted(folder.iterdir()), SEARCH)


# ------------------------------------------------------------------------------------------------- the right encoder


def test_the_seed_of_random_weights_is_found_in_the_checkpoint(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    run = checkpoint(provenance=provenance_of("random:41"))
    assert Captioner.load(run, device="cpu").provenance["weights"]["name"] == "random:41"


def test_weights_that_the_checkpoint_does_not_know_are_refused(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    """The same name is not enough: the SHA-256 decides."""
    made = provenance_of()
    made["weights"] = {**made["weights"], "sha256": "0" * 64}
    run = checkpoint(provenance=made)
    with pytest.raises(MismatchError) as caught:
        Captioner.load(run, device="cpu")
    assert "weights" in caught.value.message
    assert "00000000" in caught.value.message
    assert str(run) in caught.value.message


@pytest.fixture
def local_weights(tmp_path: Path) -> Path:
    """Any file: the fake encoder does not read it."""
    (tmp_path / "mine.pth").write_bytes(b"my weights")
    return tmp_path / "mine.pth"


def test_a_local_weights_file_must_be_given_again(
    fake: Any, checkpoint: Any, provenance_of: Any, local_weights: Path
) -> None:
    run = checkpoint(provenance=provenance_of(str(local_weights)))
    with pytest.raises(WeightsError) as caught:
        Captioner.load(run, device="cpu")
    assert "mine.pth" in caught.value.message
    assert "--weights" in caught.value.hint
    moved = local_weights.rename(local_weights.with_name("moved.pth"))
    assert Captioner.load(run, device="cpu", weights=moved).provenance["weights"]["name"] == "mine.pth"


def test_another_weights_file_under_the_same_name_is_refused(
    fake: Any, checkpoint: Any, provenance_of: Any, local_weights: Path, tmp_path: Path
) -> None:
    run = checkpoint(provenance=provenance_of(str(local_weights)))
    other = tmp_path / "other" / "mine.pth"
    other.parent.mkdir()
    other.write_bytes(b"other weights")
    with pytest.raises(MismatchError, match=r"mine\.pth"):
        Captioner.load(run, device="cpu", weights=other)


def test_a_local_file_whose_name_begins_with_imagenet_is_not_taken_for_torchvisions(
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
    [("layer", "Mixed_7b"), ("grid_shape", [7, 7, 2048]), ("decoder", "opencv"), ("resize", "nearest")],
)
def test_features_that_this_encoder_does_not_make_are_refused(
    fake: Any, checkpoint: Any, provenance_of: Any, sign: Any, key: str, value: Any
) -> None:
    made = provenance_of()
    if key in made:
        made[key] = value
    else:
        made["preprocessing"] = {**made["preprocessing"], key: value}
    run = checkpoint()
    file = next(run.glob("checkpoints/*/provenance.json"))
    file.write_text(json.dumps(made))
    sign(file.parent)
    with pytest.raises((MismatchError, CheckpointError)):
        Captioner.load(run, device="cpu")


def test_features_of_an_encoder_that_is_not_ours_need_a_decoder_of_our_own(
    fake: Any, checkpoint: Any, provenance_of: Any
) -> None:
    run = checkpoint(provenance=provenance_of(encoder="someone's network"))
    with pytest.raises(WeightsError, match="someone's network"):
        Captioner.load(run, device="cpu")


def test_another_pillow_or_torch_version_is_not_another_encoder(fake: Any, checkpoint: Any, provenance_of: Any) -> None:
    Captioner.load(checkpoint(provenance=provenance_of(versions={"pillow": "1.0", "torch": "0.4"})), device="cpu")


def test_a_folder_without_a_checkpoint_is_named(fake: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing_here"):
        Captioner.load(tmp_path / "nothing_here", device="cpu")


@pytest.mark.parametrize("search", ["beam", "sample"])
def test_alternatives_differ_and_the_best_comes_first(fake: Any, scenes: Any, checkpoint: Any, search: str) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    captioner = Captioner.load(checkpoint(end_bias=2.0), device="cpu")
    settings = CaptionConfig(decoding=search, beam_size=4, max_length=9)  # type: ignore[arg-type]
    found = captioner.alternatives(photo, settings)
    assert 2 <= len(found) <= 4
    assert len({c.text for c in found}) == len(found)
    if search == "beam":
        assert found[0].text == captioner.caption([photo], settings)[0].text
    else:
        assert [c.log_prob for c in found] == sorted((c.log_prob for c in found), reverse=True)
        assert [c.text for c in captioner.alternatives(photo, settings, seed=1)] != [c.text for c in found]
    assert all(c.image is not None and c.attention is not None for c in found)


def test_captions_are_plain_values() -> None:
    caption = Caption("a ring", ["a", "ring"], -1.0, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        caption.text = "b"  # type: ignore[misc]


# ---------------------------------------------------------------------------------------- stores of other makes


def test_a_decoder_of_8_bit_features_is_given_their_rounding(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fake.encode
    monkeypatch.setattr(fake, "encode", lambda self, images: np.abs(real(self, images)))  # a ReLU's outputs
    seen: list[np.ndarray] = []

    def search(decoder: Any, grids: torch.Tensor, *more: Any) -> Any:
        seen.append(grids.numpy().copy())
        return generate_captions(decoder, grids, *more)

    monkeypatch.setattr("gridcap.caption.captioner.generate_captions", search)
    captioner = Captioner.load(checkpoint(provenance=provenance_of(dtype="uint8")))
    photos = sorted(scenes(2).iterdir())
    squares = np.stack([captioner.square(path) for path in photos])
    captioner.caption_squares(squares, CaptionConfig())
    exact = captioner._encoder.encode(squares)
    assert exact.dtype == np.float16
    want = as_stored(exact, np.dtype(np.uint8)).astype(np.float32).reshape(2, 64, 2048)
    np.testing.assert_array_equal(seen[0], want)
    assert not np.array_equal(want, exact.astype(np.float32).reshape(2, 64, 2048))


def test_a_decoder_of_nvjpegs_pixels_takes_photographs_and_says_so(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any
) -> None:
    other = provenance_of()
    other["preprocessing"] = {**other["preprocessing"], "decoder": "nvjpeg"}
    captioner = Captioner.load(checkpoint(provenance=other))
    assert captioner.foreign_pixels
    assert captioner.caption([next(scenes(1).iterdir())], CaptionConfig())
    assert not Captioner.load(checkpoint(name="other")).foreign_pixels
