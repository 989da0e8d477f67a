"""caption-images: printed captions, invalid images, outputs, and exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
from PIL import Image

import gridcap.caption.captioner as captioner_module
from gridcap.caption.captioner import Captioner
from gridcap.caption.cli import main
from gridcap.caption.result import Caption
from gridcap.common import retry
from gridcap.common.config import CaptionConfig


def run(*arguments: object) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(main, [*(str(a) for a in arguments), "--device", "cpu"])
    assert "internal error" not in result.output, result.output
    assert "Traceback" not in result.output
    return result


def lines(result: click.testing.Result) -> dict[str, str]:
    """Return the printed captions by path."""
    return dict(line.split("\t") for line in result.stdout.splitlines())


def test_prints_path_and_caption_of_each_image(fake: Any, scenes: Any, checkpoint: Any) -> None:
    checkpoint_folder, photos = checkpoint(), sorted(scenes(3).iterdir())
    result = run("--checkpoint", checkpoint_folder, photos[2], photos[0])
    assert result.exit_code == 0, result.output
    printed = lines(result)
    assert list(printed) == [str(photos[2]), str(photos[0])], "in the order given"
    captions = Captioner.load(checkpoint_folder, device="cpu").caption([photos[2], photos[0]], CaptionConfig())
    assert list(printed.values()) == [c.text for c in captions]
    assert all(printed.values())


def test_folders_are_searched_and_images_are_captioned_once(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(3)
    (folder / "deep").mkdir()
    (folder / "1.jpg").rename(folder / "deep" / "1.JPG")
    (folder / "notes.txt").write_text("not an image, and no image suffix")
    result = run("--checkpoint", checkpoint(), folder / "2.jpg", folder)
    assert result.exit_code == 0, result.output
    assert list(lines(result)) == [str(folder / n) for n in ("2.jpg", "0.jpg", "deep/1.JPG")]


@pytest.mark.parametrize("suffix", [".svg", ".txt"])
def test_item_18_files_of_unsupported_formats_are_reported(
    fake: Any, scenes: Any, checkpoint: Any, suffix: str
) -> None:
    folder = scenes(2)
    (folder / f"photo{suffix}").write_bytes(b"a photo")
    result = run("--checkpoint", checkpoint(), folder)
    assert result.exit_code == 0, result.output
    assert len(lines(result)) == 2
    assert f"note: {folder}: skipped, not a supported image file: 1 {suffix}" in result.stderr


def test_item_18_jfif_files_are_captioned(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(2)
    (folder / "1.jpg").rename(folder / "1.jfif")
    result = run("--checkpoint", checkpoint(), folder)
    assert result.exit_code == 0, result.output
    assert list(lines(result)) == [f"{folder}/0.jpg", f"{folder}/1.jfif"]


def test_item_18_folder_without_supported_images_is_an_error(fake: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.svg").write_bytes(b"a photo")
    result = run("--checkpoint", checkpoint(), "photos")
    assert result.exit_code != 0
    assert "photos: " in result.stderr


def test_item_26_control_characters_in_names_are_escaped(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(3)
    (folder / "1.jpg").rename(folder / "tab\tbreak\n.jpg")
    (folder / "2.jpg").write_text("not an image")
    (folder / "2.jpg").rename(folder / "broken\r.jpg")
    result = run("--checkpoint", checkpoint(), folder)
    assert list(lines(result)) == [f"{folder}/0.jpg", rf"{folder}/tab\tbreak\n.jpg"]
    assert rf"{folder}/broken\r.jpg: invalid image" in result.stderr


@pytest.mark.parametrize(("flag", "name"), [("--output", "c.json"), ("--attention", "a.png"), ("--report", "r.html")])
def test_unwritable_output_is_reported_before_captioning(
    fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: pytest.fail("the checkpoint was loaded"))
    (tmp_path / "file").touch()
    result = run("--checkpoint", checkpoint(), scenes(1), flag, tmp_path / "file" / name)
    assert result.exit_code == 1
    assert "a file exists where a folder is needed" in result.stderr


@pytest.mark.parametrize(("failures", "status"), [(retry.ATTEMPTS - 1, 0), (retry.ATTEMPTS, 1)])
def test_a_failed_read_is_retried_and_names_the_image(
    fake: Any, scenes: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, failures: int, status: int
) -> None:
    real, reads = captioner_module.load_image, []

    def load(path: Path, *arguments: Any) -> np.ndarray:
        if path.name == "1.jpg":
            reads.append(path)
            if len(reads) <= failures:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *arguments)

    monkeypatch.setattr(captioner_module, "load_image", load)
    monkeypatch.setattr(retry, "DELAY", 0)
    folder = scenes(3)
    result = run("--checkpoint", checkpoint(), folder)
    assert result.exit_code == status
    if status:
        assert f"{folder / '1.jpg'}: cannot be read: stale file handle (5 attempts)" in result.stderr
    else:
        assert len(lines(result)) == 3


def test_captions_do_not_depend_on_batch_size_or_workers(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder, checkpoint_folder = scenes(5), checkpoint()
    one = run("--checkpoint", checkpoint_folder, folder, "--batch-size", 1)
    two = run("--checkpoint", checkpoint_folder, folder, "--batch-size", 2, "--num-workers", 1)
    assert len(lines(one)) == 5
    assert lines(one) == lines(two)


def test_beam_size_and_max_length_are_applied(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(end_bias=-50), scenes(2), "--max-length", 4, "--beam-size", 1)
    assert all(len(caption.split()) == 4 for caption in lines(result).values())


def test_samples_depend_on_the_seed_but_not_on_batches_or_invalid_images(
    fake: Any, scenes: Any, checkpoint: Any
) -> None:
    folder = scenes(7, invalid=(1,))
    sample = ("--checkpoint", checkpoint(), folder, "--decoding", "sample", "--max-length", 9)
    first = lines(run(*sample, "--seed", 1))
    assert len(first) == 6
    assert lines(run(*sample, "--seed", 1, "--batch-size", 2)) == first
    assert lines(run(*sample, "--seed", 2)) != first


def test_sampling_from_one_token_equals_greedy_search(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint(), scenes(3), "--max-length", 9)
    greedy = lines(run(*photos, "--beam-size", 1))
    for options in (("--top-k", 1), ("--top-p", 1e-6), ("--temperature", 1e-6)):
        assert lines(run(*photos, "--decoding", "sample", *options)) == greedy


@pytest.mark.parametrize(
    "options",
    [("--top-k", 3), ("--top-p", 0.9), ("--temperature", 2), ("--decoding", "sample", "--block-trigrams")],
    ids=str,
)
def test_option_of_the_other_decoding_is_a_usage_error(fake: Any, scenes: Any, checkpoint: Any, options: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), *options)
    assert result.exit_code == 2
    assert "decoding: " in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 1),
        ("--decoding", "sample", "--beam-size", 5),
        ("--decoding", "sample", "--set", "caption.length_penalty=1"),
    ],
    ids=str,
)
def test_item_19_setting_that_the_decoding_ignores_is_a_usage_error(
    fake: Any, scenes: Any, checkpoint: Any, options: Any
) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), *options)
    assert result.exit_code == 2
    assert "has no effect with" in result.stderr


def test_block_trigrams_flag(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint("lstm", end_bias=-50), scenes(2), "--beam-size", 1)

    def repeats(caption: str) -> bool:
        tokens = caption.split()
        trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        return len(set(trigrams)) < len(trigrams)

    assert any(map(repeats, lines(run(*photos)).values()))
    assert not any(map(repeats, lines(run(*photos, "--block-trigrams")).values()))


def test_length_penalty_flag(fake: Any, scenes: Any, checkpoint: Any) -> None:
    photos = ("--checkpoint", checkpoint("lstm", seed=2), scenes(4), "--max-length", 9)
    short, long = (
        sum(len(caption.split()) for caption in lines(run(*photos, "--length-penalty", penalty)).values())
        for penalty in (0, 2)
    )
    assert short < long


def test_several_checkpoints_form_an_ensemble(fake: Any, scenes: Any, checkpoint: Any) -> None:
    first, second, folder = checkpoint(name="a"), checkpoint("lstm", seed=2, name="b"), scenes(3)
    result = run("--checkpoint", first, "--checkpoint", second, folder)
    assert result.exit_code == 0, result.output
    captions = Captioner.load(first, second, device="cpu").caption(sorted(folder.iterdir()), CaptionConfig())
    assert list(lines(result).values()) == [c.text for c in captions]
    dry_run = run("--checkpoint", first, "--checkpoint", second, folder, "--dry-run").stdout
    assert f"with {first}/checkpoints/" in dry_run
    assert f", {second}/checkpoints/" in dry_run


def test_ensemble_of_different_features_is_rejected(
    fake: Any, scenes: Any, checkpoint: Any, provenance_of: Any
) -> None:
    first, second = checkpoint(name="a"), checkpoint(provenance=provenance_of("random:1"), name="b")
    result = run("--checkpoint", first, "--checkpoint", second, scenes(1))
    assert result.exit_code == 1
    assert re.search(
        rf"^error: {first}\S* was trained on other features than {second}\S* .*weights", result.stderr, re.M
    )


def test_invalid_image_is_skipped_with_status_3(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(4, invalid=(1,))
    result = run("--checkpoint", checkpoint(), folder, "--batch-size", 2)
    assert result.exit_code == 3
    assert f"{folder / '1.jpg'}: invalid image, skipped: not an image" in result.stderr
    assert list(lines(result)) == [str(folder / f"{i}.jpg") for i in (0, 2, 3)]


def test_only_invalid_images_is_status_3(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run(
        "--checkpoint", checkpoint(), scenes(2, invalid=(0, 1)), "--attention", "a.png", "--output", "captions.json"
    )
    assert result.exit_code == 3
    assert result.stdout == ""
    assert json.loads(Path("captions.json").read_text())["captions"] == []
    assert not Path("a.png").exists()


def test_figure_and_report_without_valid_images_are_mentioned(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1, invalid=(0,)), "--report", "r.html")
    assert result.exit_code == 3
    assert "no report are written" in result.stderr
    assert not Path("r.html").exists()


def test_link_out_of_a_given_folder_is_an_invalid_image(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder, checkpoint_folder = scenes(2), checkpoint()
    (folder / "1.jpg").rename("secret.jpg")
    (folder / "1.jpg").symlink_to(Path("secret.jpg").resolve())
    result = run("--checkpoint", checkpoint_folder, folder)
    assert result.exit_code == 3
    assert f"{folder}/1.jpg: invalid image, skipped: link leads out of the image folder" in result.stderr
    assert list(lines(result)) == [f"{folder}/0.jpg"]
    for arguments in ((folder, "--set", "data.follow_links=true"), (folder / "0.jpg", folder / "1.jpg")):
        assert len(lines(run("--checkpoint", checkpoint_folder, *arguments))) == 2


def test_file_name_that_is_not_utf8_is_reported_before_captioning(fake: Any, scenes: Any, checkpoint: Any) -> None:
    """Such a name cannot be written to --output."""
    name = os.fsdecode(b"caf\xe9.jpg")
    next(scenes(1).iterdir()).rename(name)
    result = run("--checkpoint", checkpoint(), name, "--output", "captions.json")
    assert result.exit_code == 2
    assert r"caf\udce9.jpg: the name is not UTF-8" in result.stderr


def test_item_23_image_with_features_out_of_range_is_invalid_and_named(
    fake: Any, scenes: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fake.encode

    def encode(self: Any, images: np.ndarray) -> np.ndarray:
        grids = real(self, images)
        grids[1, 0, 0, 0] = np.inf
        return grids

    monkeypatch.setattr(fake, "encode", encode)
    folder = scenes(3)
    result = run("--checkpoint", checkpoint(), folder)
    assert result.exit_code == 3
    assert [Path(path).name for path in lines(result)] == ["0.jpg", "2.jpg"]
    assert f"{folder}/1.jpg: invalid image, skipped: a feature value exceeds the range of float16" in result.stderr


def test_attention_is_kept_only_for_the_figure_and_the_report(
    fake: Any, scenes: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def write(captioner: Any, captions: dict[Path, Caption], *_: Any) -> None:
        kept.extend(caption.attention is not None for caption in captions.values())

    monkeypatch.setattr("gridcap.caption.cli._write_outputs", write)
    photos = ("--checkpoint", checkpoint(), scenes(1))
    for options in ((), ("--report", "r.html"), ("--attention", "a.png")):
        run(*photos, *options)
    assert kept == [False, True, True]


def test_output_file_contains_the_printed_captions(fake: Any, scenes: Any, checkpoint: Any) -> None:
    folder = scenes(3, invalid=(1,))
    result = run("--checkpoint", checkpoint(), folder, "--output", "new/captions.json")
    written = json.loads(Path("new/captions.json").read_text())
    assert written["settings"]["seed"] == 0
    assert written["settings"]["decoding"]["beam_size"] == 3
    entries = written["captions"]
    assert {e["file_name"]: e["caption"] for e in entries} == lines(result)
    assert all(e["log_prob"] < 0 for e in entries)


def test_warns_of_random_encoder_weights(
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
def test_attention_maps_of_captions_of_any_length(
    fake: Any, scenes: Any, checkpoint: Any, end_bias: float, length: int
) -> None:
    folder = scenes(1)
    result = run(
        "--checkpoint", checkpoint(end_bias=end_bias), folder, "--attention", "maps.png", "--max-length", length
    )
    assert result.exit_code == 0, result.output
    assert "maps.png" in result.stderr
    with Image.open("maps.png") as picture:
        picture.load()
        assert min(picture.size) > 200


def test_invalid_images_are_not_in_the_figure(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(3, invalid=(0,)), "--attention", "maps.png", "--max-length", 3)
    assert result.exit_code == 3
    assert Image.open("maps.png").size[0] > 200


def test_attention_of_a_decoder_without_attention_is_a_usage_error(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint("lstm"), scenes(1), "--attention", "maps.png")
    assert result.exit_code == 2
    assert re.search(
        r"^error: .*has no attention\n  what to do: .*--recipe soft-attention, top-down, transformer.*$",
        result.stderr,
        re.M,
    )
    assert not Path("maps.png").exists()


@pytest.mark.parametrize(
    ("name", "suggestion"), [("maps.bmp", "maps.png"), ("maps", "maps.png"), ("maps.tar.gz", "maps.tar.png")]
)
def test_item_23_unsupported_figure_format_suggests_a_supported_one(
    fake: Any, scenes: Any, checkpoint: Any, name: str, suggestion: str
) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "--attention", name)
    assert result.exit_code == 2
    assert ".png, .pdf, .svg, .jpg" in result.stderr
    assert re.search(rf"--attention {suggestion}$", result.stderr, re.M)


@pytest.mark.parametrize("name", ["maps.jpg", "maps.pdf"])
def test_item_23_jpeg_and_pdf_figures_are_written(fake: Any, scenes: Any, checkpoint: Any, name: str) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "--attention", name, "--max-length", 2)
    assert result.exit_code == 0, result.output
    assert Path(name).stat().st_size > 0


def test_too_many_images_for_one_figure_is_a_usage_error(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(41), "--attention", "maps.png")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "41 images" in result.stderr


# --------------------------------------------------------------------------------------------------------- usage errors


def test_missing_path_is_reported_before_captioning(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "no/such/photo.jpg")
    assert result.exit_code == 1
    assert "no/such/photo.jpg: no such file or folder" in result.stderr
    assert result.stdout == ""


def test_folder_without_images_is_named(fake: Any, checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("--checkpoint", checkpoint(), "empty")
    assert result.exit_code == 1
    assert "empty: contains no images" in result.stderr


def test_missing_checkpoint_is_named(fake: Any, scenes: Any) -> None:
    result = run("--checkpoint", "runs/none", scenes(1))
    assert result.exit_code == 1
    assert "runs/none: no such folder" in result.stderr


def test_no_images_is_a_usage_error(fake: Any, checkpoint: Any) -> None:
    assert run("--checkpoint", checkpoint()).exit_code == 2


def test_other_weights_than_in_training_are_rejected(fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    result = run("--checkpoint", checkpoint(), scenes(1), "--weights", "other.pth")
    assert result.exit_code == 1
    assert "was trained on other features" in result.stderr
    assert "random:0" in result.stderr
    assert "other.pth" in result.stderr


def test_dry_run_writes_nothing(fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path) -> None:
    folder, checkpoint_folder = scenes(3), checkpoint()
    before = set(tmp_path.rglob("*"))
    result = run("--checkpoint", checkpoint_folder, folder, "--output", "c.json", "--attention", "a.png", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would caption 3 images" in result.stdout
    assert set(tmp_path.rglob("*")) == before


# --- the report


def test_report_contains_every_image_with_caption_and_attention(
    fake: Any, scenes: Any, checkpoint: Any, tmp_path: Path
) -> None:
    result = run("--checkpoint", checkpoint(), scenes(3), "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    (data,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "r.html").read_text(encoding="utf-8"), re.S)
    images = json.loads(data)
    assert {image["name"]: image["caption"] for image in images} == lines(result)
    assert all(image["grid"] == [8, 8] and image["jpeg"] for image in images)
    assert "RANDOM weights" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_report_must_be_html(fake: Any, scenes: Any, checkpoint: Any) -> None:
    result = run("--checkpoint", checkpoint(), scenes(1), "--report", "r.pdf")
    assert result.exit_code == 2
    assert "must end in .html" in result.output
