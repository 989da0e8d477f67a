"""caption-images as its users meet it: a line a photo, bad photos named, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click.testing
import pytest
from PIL import Image

from gridcap.caption.captioner import Captioner
from gridcap.caption.cli import main
from gridcap.common.config import CaptionConfig


def run(*arguments: object) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(main, [*(str(a) for a in arguments), "--device", "cpu"])
    assert "defect in gridcap" not in result.output, result.output
    assert "Traceback" not in result.output
    return result


def lines(result: click.testing.Result) -> dict[str, str]:
    """Path -> caption, as printed."""
    return dict(line.split("\t") for line in result.stdout.splitlines())


def test_a_line_a_photo_with_path_tab_and_caption(fake: Any, scenes: Any, checkpoint: Any) -> None:
    checkpoint_folder, photos = checkpoint(), sorted(scenes(3).iterdir())
    result = run("--checkpoint", checkpoint_folder, photos[2], photos[0])
    assert result.exit_code == 0, result.output
    found = lines(result)
    assert list(found) == [str(photos[2]), str(photos[0])], "in the order given"
    captions = Captioner.load(checkpoint_folder, device="cpu").caption([photos[2], photos[0]], CaptionConfig())
    assert list(found.values()) == [c.text for c in captions]
    assert all(found.values())


def test_a_folder_is_the_images_in_it_and_nothing_is_captioned_twice(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(3)
    (folder / "deep").mkdir()
    (folder / "1.jpg").rename(folder / "deep" / "1.JPG")
    (folder / "notes.txt").write_text("not an image, and not named like one")
    result = run("--checkpoint", checkpoint(), folder / "2.jpg", folder)
    assert result.exit_code == 0, result.output
    assert list(lines(result)) == [str(folder / n) for n in ("2.jpg", "0.jpg", "deep/1.JPG")]


@pytest.mark.parametrize(("flag", "name"), [("--output", "c.json"), ("--attention", "a.png"), ("--report", "r.html")])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_captioned(
    fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: pytest.fail("the checkpoint was loaded"))
    (tmp_path / "file").touch()
    result = run("--checkpoint", checkpoint(), scenes(1), flag, tmp_path / "file" / name)
    assert result.exit_code == 1
    assert "a file stands where a folder is needed" in result.stderr


def test_batches_do_not_change_the_captions(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder, checkpoint_folder = scenes(5), checkpoint()
    one = run("--checkpoint", checkpoint_folder, folder, "--batch-size", 1)
    two = run("--checkpoint", checkpoint_folder, folder, "--batch-size", 2)
    assert len(lines(one)) == 5
    assert lines(one) == lines(two)


def test_beam_size_and_length_reach_the_search(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(end_bias=-50), scenes(2), "--max-length", 4, "--beam-size", 1)
    assert all(len(caption.split()) == 4 for caption in lines(result).values())


def test_sampling_is_decided_by_the_seed_and_not_by_batches_or_bad_photos(
    fake: Any, scenes: Any, checkpoint: Any
) -> None:
    folder = scenes(7, bad=(1,))
    sample = ("--checkpoint", checkpoint(), folder, "--decoding", "sample", "--max-length", 9)
    first = lines(run(*sample, "--seed", 1))
    assert len(first) == 6
    assert lines(run(*sample, "--seed", 1, "--batch-size", 2)) == first
    assert lines(run(*sample, "--seed", 2)) != first


def test_the_narrowest_sampling_is_greedy_search(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint(), scenes(3), "--max-length", 9)
    greedy = lines(run(*photos, "--beam-size", 1))
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--temperature", 1e-6)):
        assert lines(run(*photos, "--decoding", "sample", *narrow)) == greedy


@pytest.mark.parametrize(
    "wrong",
    [("--top-k", 3), ("--top-p", 0.9), ("--temperature", 2), ("--decoding", "sample", "--block-trigrams")],
    ids=str,
)
def test_an_option_of_the_other_search_is_wrong_use(fake: Any, scenes: Any, checkpoint: Any, wrong: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), *wrong)
    assert result.exit_code == 2
    assert "decoding: " in result.stderr


def test_trigrams_are_blocked_by_a_switch(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint("lstm", end_bias=-50), scenes(2), "--beam-size", 1)

    def repeats(caption: str) -> bool:
        words = caption.split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        return len(set(trigrams)) < len(trigrams)

    assert any(map(repeats, lines(run(*photos)).values()))
    assert not any(map(repeats, lines(run(*photos, "--block-trigrams")).values()))


def test_the_length_penalty_is_a_flag(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint("lstm", seed=2), scenes(4), "--max-length", 9)
    short, long = (
        sum(len(caption.split()) for caption in lines(run(*photos, "--length-penalty", penalty)).values())
        for penalty in (0, 2)
    )
    assert short < long


def test_several_checkpoints_decode_together(fake: Any, scenes: Any, checkpoint: Any) -> None:
    first, second, folder = checkpoint(name="a"), checkpoint("lstm", seed=2, name="b"), scenes(3)
    result = run("--checkpoint", first, "--checkpoint", second, folder)
    assert result.exit_code == 0, result.output
    captions = Captioner.load(first, second, device="cpu").caption(sorted(folder.iterdir()), CaptionConfig())
    assert list(lines(result).values()) == [c.text for c in captions]
    shown = run("--checkpoint", first, "--checkpoint", second, folder, "--dry-run").stdout
    assert f"with {first}/checkpoints/" in shown
    assert f", {second}/checkpoints/" in shown


def test_checkpoints_of_other_features_do_not_decode_together(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any
) -> None:
    first, second = checkpoint(name="a"), checkpoint(provenance=provenance_of("random:1"), name="b")
    result = run("--checkpoint", first, "--checkpoint", second, scenes(1))
    assert result.exit_code == 2
    assert re.search(
        rf"^error: {first}\S* was trained on other features than {second}\S* .*weights", result.stderr, re.M
    )


def test_a_bad_photo_is_named_left_out_and_ends_with_status_3(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(4, bad=(1,))
    result = run("--checkpoint", checkpoint(), folder, "--batch-size", 2)
    assert result.exit_code == 3
    assert f"{folder / '1.jpg'}: left out: not an image" in result.stderr
    assert list(lines(result)) == [str(folder / f"{i}.jpg") for i in (0, 2, 3)]


def test_nothing_but_bad_photos_is_status_3_too(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run(
        "--checkpoint", checkpoint(), scenes(2, bad=(0, 1)), "--attention", "a.png", "--output", "captions.json"
    )
    assert result.exit_code == 3
    assert result.stdout == ""
    assert json.loads(Path("captions.json").read_text()) == []
    assert not Path("a.png").exists()


def test_output_is_the_same_captions_as_json(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(3, bad=(1,))
    result = run("--checkpoint", checkpoint(), folder, "--output", "new/captions.json")
    entries = json.loads(Path("new/captions.json").read_text())
    assert {e["file_name"]: e["caption"] for e in entries} == lines(result)
    assert all(e["log_prob"] < 0 for e in entries)


def test_random_encoder_weights_are_warned_of(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any, tmp_path: Path
) -> None:
    folder = scenes(1)
    assert "WARNING" in run("--checkpoint", checkpoint(), folder).stderr
    (tmp_path / "w.pth").write_bytes(b"weights")
    trained = checkpoint(provenance=provenance_of("w.pth"), name="trained")
    result = run("--checkpoint", trained, folder, "--weights", "w.pth")
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.output


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("end_bias", "length"), [(1e4, 5), (-50, 1), (-50, 25)], ids=["none", "one", "twenty-five"])
def test_attention_is_drawn_for_captions_of_any_length(
    fake: Any, scenes: Any, checkpoint: Any, end_bias: float, length: int
) -> None:
    folder = scenes(1)
    result = run(
        "--checkpoint", checkpoint(end_bias=end_bias), folder, "--attention", "look.png", "--max-length", length
    )
    assert result.exit_code == 0, result.output
    assert "look.png" in result.stderr
    with Image.open("look.png") as picture:
        picture.load()
        assert min(picture.size) > 200


def test_bad_photos_are_left_out_of_the_picture(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(3, bad=(0,)), "--attention", "look.png", "--max-length", 3)
    assert result.exit_code == 3
    assert Image.open("look.png").size[0] > 200


def test_a_decoder_without_attention_cannot_be_drawn(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint("lstm"), scenes(1), "--attention", "look.png")
    assert result.exit_code == 2
    assert re.search(
        r"^error: .*has no attention\n  what to do: .*--recipe soft-attention, top-down, transformer.*$",
        result.stderr,
        re.M,
    )
    assert not Path("look.png").exists()


@pytest.mark.parametrize("name", ["look.jpg", "look", "look.png.gz"])
def test_a_picture_of_another_kind_is_wrong_use(fake: Any, scenes: Any, checkpoint: Any, name: str) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "--attention", name)
    assert result.exit_code == 2
    assert ".png, .pdf or .svg" in result.stderr


def test_too_many_photos_for_one_picture_are_refused_before_any_work(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(41), "--attention", "look.png")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "41 images" in result.stderr


# --------------------------------------------------------------------------------------------------------- wrong use


def test_a_missing_path_is_wrong_use_and_nothing_is_captioned(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "no/such/photo.jpg")
    assert result.exit_code == 2
    assert "no/such/photo.jpg: no such file or folder" in result.stderr
    assert result.stdout == ""


def test_a_folder_without_images_is_named(fake: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("--checkpoint", checkpoint(), "empty")
    assert result.exit_code == 2
    assert "empty: contains no images" in result.stderr


def test_a_missing_checkpoint_is_named(fake: Any, scenes: Any) -> None:
    result = run("--checkpoint", "runs/none", scenes(1))
    assert result.exit_code == 2
    assert "runs/none: no such folder" in result.stderr


def test_no_photo_at_all_is_wrong_use(fake: Any, checkpoint: Any) -> None:
    assert run("--checkpoint", checkpoint()).exit_code == 2


def test_other_weights_than_in_training_are_refused(fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"other weights")
    result = run("--checkpoint", checkpoint(), scenes(1), "--weights", "other.pth")
    assert result.exit_code == 2
    assert "was trained on other features" in result.stderr
    assert "random:0" in result.stderr
    assert "other.pth" in result.stderr


def test_a_dry_run_captions_nothing(fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path) -> None:
    folder, checkpoint_folder = scenes(3), checkpoint()
    before = set(tmp_path.rglob("*"))
    result = run("--checkpoint", checkpoint_folder, folder, "--output", "c.json", "--attention", "a.png", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would caption 3 images" in result.stdout
    assert set(tmp_path.rglob("*")) == before


# --- the report


def test_the_report_shows_every_photo_with_its_caption_and_looks(
    fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path
) -> None:
    result = run("--checkpoint", checkpoint(), scenes(3), "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    (data,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "r.html").read_text(encoding="utf-8"), re.S)
    images = json.loads(data)
    assert {image["name"]: image["caption"] for image in images} == lines(result)
    assert all(image["grid"] == [8, 8] and image["jpeg"] for image in images)
    assert "RANDOM weights" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_report_must_be_html(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "--report", "r.pdf")
    assert result.exit_code == 2
    assert "must end in .html" in result.output
