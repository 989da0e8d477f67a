"""extract-features as its users meet it: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import numpy as np
import pytest
import yaml
from PIL import Image

from gridcap.common.command import PipelineCommand
from gridcap.common.store.reader import FeatureStore
from gridcap.extract.cli import main
from gridcap.extract.cluster.share import Share


def run(*arguments: object, command: PipelineCommand = main) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(command, [str(a) for a in arguments])
    assert "internal error" not in result.output, result.output
    return result


RANDOM = ("--weights", "random", "--precision", "float32")


@pytest.fixture
def pipeline(tmp_path: Path):
    """Write pipeline.yaml into the current folder."""

    def write(**splits: dict[str, Any]) -> None:
        values = {n: {k: str(v) if isinstance(v, Path) else v for k, v in s.items()} for n, s in splits.items()}
        tree = {"data": {"splits": values}, "extract": {"weights": "random", "precision": "float32"}}
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(tree))

    return write


def coco(path: Path, images: dict[int, str]) -> Path:
    """A captions file of these images."""
    annotations = [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in images]
    path.write_text(
        json.dumps({"images": [{"id": i, "file_name": n} for i, n in images.items()], "annotations": annotations})
    )
    return path


def test_a_folder_alone_is_a_split_of_its_own_name(fake: Any, photos: Any, tmp_path: Path) -> None:
    result = run("--images", photos(5), *RANDOM)
    assert result.exit_code == 0, result.output
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        assert len(store) == 5
        assert store.split == "photos"
        assert store.valid.all()
    assert re.search(r"done: features/photos\.h5: 5 images, 1 shard written", result.stdout)


def test_the_current_folder_may_be_the_folder_of_images(
    fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos(2))
    result = run("--images", ".", *RANDOM)
    assert result.exit_code == 0, result.output
    assert Path("features", "photos.h5").exists()


def test_output_names_the_store_and_the_split(fake: Any, photos: Any, tmp_path: Path) -> None:
    result = run("--images", photos(3), "--output", tmp_path / "elsewhere" / "mine.h5", *RANDOM)
    assert result.exit_code == 0, result.output
    assert FeatureStore(tmp_path / "elsewhere" / "mine.h5").split == "mine"
    assert not (tmp_path / "features").exists()


def test_a_split_of_the_configuration_needs_no_other_flag(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path
) -> None:
    folder = photos(6)
    captions = coco(tmp_path / "captions.json", {70: "0003.png", 7: "0001.png"})
    pipeline(train={"images": folder, "annotations": captions})
    result = run("--split", "train")
    assert result.exit_code == 0, result.output
    store = FeatureStore(tmp_path / "features" / "train.h5")
    assert store.image_ids.tolist() == [70, 7]
    want = fake.grids(np.asarray(Image.open(folder / "0001.png")))[0].astype(np.float16)
    np.testing.assert_array_equal(store.by_image_id(7), want)


def test_images_given_for_a_known_split_leave_its_captions_and_its_subset(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path
) -> None:
    captions = coco(tmp_path / "captions.json", {70: "0003.png", 7: "0001.png"})
    pipeline(train={"images": tmp_path / "moved", "annotations": captions, "limit": 1})
    result = run("--split", "train", "--images", photos(6))
    assert result.exit_code == 0, result.output
    assert set(FeatureStore(tmp_path / "features" / "train.h5").image_ids) < {70, 7}


def test_a_name_from_output_is_no_split_of_the_configuration(
    fake: Any, photos: Any, pipeline: Any, tmp_path: Path
) -> None:
    pipeline(train={"images": tmp_path / "elsewhere", "annotations": coco(tmp_path / "c.json", {1: "other.png"})})
    result = run("--images", photos(3), "--output", "features/train.h5")
    assert result.exit_code == 0, result.output
    assert len(FeatureStore(tmp_path / "features" / "train.h5")) == 3


def test_what_is_kept_of_a_begun_store_and_what_is_there_is_said(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(6)
    arguments = ("--images", folder, "--output", "s.h5", *RANDOM)
    run(*arguments, "--shard-size", 2, "--batch-size", 2)
    (tmp_path / "s.h5").unlink()
    (tmp_path / "s" / "00001.h5").unlink()
    result = run(*arguments, "--shard-size", 4, "--batch-size", 1, "--dry-run")
    assert "started with shard size 2 and batch size 2" in result.output
    assert "already complete: 2 of 3 shards" in result.output
    assert not (tmp_path / "s.h5").exists()


def test_images_and_annotations_can_be_given_as_flags(fake: Any, photos: Any, tmp_path: Path) -> None:
    captions = coco(tmp_path / "captions.json", {3: "0002.png"})
    result = run("--images", photos(4), "--annotations", captions, "--output", "x.h5", *RANDOM)
    assert result.exit_code == 0, result.output
    assert FeatureStore(tmp_path / "x.h5").image_ids.tolist() == [3]


def test_limit_takes_a_random_subset_that_is_the_same_every_time(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(20)
    names = []
    for output in ("a.h5", "b.h5"):
        result = run("--images", folder, "--limit", 6, "--output", output, "--split", "some", *RANDOM)
        assert result.exit_code == 0, result.output
        names.append(FeatureStore(tmp_path / output).file_names)
    assert names[0] == names[1]
    assert len(set(names[0])) == 6
    assert names[0] == sorted(names[0]), "in the order of the folder"
    assert names[0] != [f"{i:04}.png" for i in range(6)], "not just the first ones"


def test_a_split_with_a_dot_in_its_name_can_be_chosen(fake: Any, photos: Any, pipeline: Any) -> None:
    pipeline(**{"coco.2017": {"images": photos(2)}})
    result = run("--split", "coco.2017", "--output", "c.h5")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "bad", [{"limit": "0"}, {"limit": "-3"}, {"batch-size": "0"}, {"max-invalid": "many"}, {"weights": "random:x"}]
)
def test_a_senseless_value_is_wrong_use_and_writes_nothing(
    fake: Any, photos: Any, tmp_path: Path, bad: dict[str, str]
) -> None:
    ((flag, value),) = bad.items()
    result = run("--images", photos(3), "--weights", "random", f"--{flag}", value)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "features").exists()


# --------------------------------------------------------------------------------------------------------- what it says


def test_random_weights_are_warned_of_loudly(fake: Any, photos: Any) -> None:
    result = run("--images", photos(2), *RANDOM)
    assert "WARNING: random weights" in result.stderr
    assert "--weights imagenet for real captions" in result.stderr


def test_a_local_weights_file_gives_no_such_warning(fake: Any, photos: Any, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"the fake encoder does not read it")
    result = run("--images", photos(2), "--weights", tmp_path / "w.pth")
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.output
    assert FeatureStore(tmp_path / "features" / "photos.h5").provenance["weights"]["random"] is False


def test_the_resolved_configuration_is_printed_and_kept_beside_the_shards(
    fake: Any, photos: Any, tmp_path: Path
) -> None:
    result = run("--images", photos(2), *RANDOM, "--batch-size", 7, "--set", "extract.num_workers=2")
    printed = yaml.safe_load(re.search(r"configuration\n((?:  .*\n)+)", result.stdout)[1])
    kept = yaml.safe_load((tmp_path / "features" / "photos" / "config.yaml").read_text())
    assert printed == kept
    assert kept["extract"]["batch_size"] == 7
    assert kept["extract"]["num_workers"] == 2
    assert list(kept["data"]["splits"]) == ["photos"]


def test_rejects_are_listed_by_reason_and_end_with_status_3(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(12, bad={2: "", 5: "text", 9: "text"})
    result = run("--images", folder, *RANDOM, "--max-invalid", 3)
    assert result.exit_code == 3
    assert "invalid images: 3" in result.stdout
    assert re.search(r"^ +2  not an image  ", result.stdout, re.M)
    assert re.search(r"^ +1  empty file  \(0002\.png\)$", result.stdout, re.M)
    assert FeatureStore(tmp_path / "features" / "photos.h5").valid.sum() == 9

    again = run("--images", folder, *RANDOM, "--max-invalid", 3)
    assert again.exit_code == 3, "still so when there is nothing to do"
    assert "nothing to do" in again.stdout
    assert "invalid images: 3" in again.stdout


def test_rejects_can_be_allowed(fake: Any, photos: Any) -> None:
    folder = photos(12, bad={2: ""})
    result = run("--images", folder, *RANDOM, "--allow-invalid")
    assert result.exit_code == 0
    assert "invalid images: 1" in result.stdout
    assert run("--images", folder, *RANDOM, "--allow-invalid").exit_code == 0


def test_a_complete_store_is_said_to_be_so(fake: Any, photos: Any) -> None:
    folder = photos(4)
    first = run("--images", folder, *RANDOM)
    assert "nothing to do" not in first.stdout
    second = run("--images", folder, *RANDOM)
    assert second.exit_code == 0
    assert re.search(r"nothing to do: features/photos\.h5 is complete \(4 images, 1 shard\)", second.stdout)


def test_what_is_wrong_in_a_captions_file_is_noted(fake: Any, photos: Any, tmp_path: Path) -> None:
    captions = coco(tmp_path / "captions.json", {1: "0001.png", 2: "0002.png", 3: "0003.png"})
    tree = json.loads(captions.read_text())
    tree["annotations"].append({"id": 9, "image_id": 777, "caption": "of nothing"})
    captions.write_text(json.dumps(tree))
    result = run("--images", photos(4), "--annotations", captions, *RANDOM, "--max-invalid", "50%")
    assert result.exit_code == 0, result.output
    assert re.search(r"note: .*captions\.json: 1 x annotation for an unknown image \(777\)", result.stderr)


# ----------------------------------------------------------------------------------------------------------- dry run


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(fake: Any, photos: Any, tmp_path: Path) -> None:
    folder = photos(10)
    before = files(tmp_path)
    result = run("--images", folder, *RANDOM, "--shard-size", 4, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "plan: 10 images -> features/photos.h5 (3 shards" in result.stdout
    assert "nothing was written" in result.stdout
    assert files(tmp_path) == before
    assert fake.built == 0


def test_a_dry_run_downloads_no_weights(
    fake: Any, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = photos(3)
    before = files(tmp_path)
    result = run("--images", folder, "--weights", "imagenet", "--dry-run")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- wrong use


def fails(status: int, *arguments: object) -> str:
    """Run a command that must fail; what it prints for the user, who gets no traceback."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    if "Usage:" not in result.stderr:
        assert re.search(r"^error: .+\n  what to do: .+$", result.stderr, re.M), result.stderr
    return result.stderr


def test_neither_split_nor_images_is_wrong_use(fake: Any) -> None:
    assert "--images" in fails(2)


def test_an_unknown_split_is_wrong_use_and_the_known_ones_are_named(fake: Any, photos: Any, pipeline: Any) -> None:
    folder = photos(2)
    pipeline(train={"images": folder}, val={"images": folder})
    said = fails(2, "--split", "tset")
    assert "tset" in said
    assert "train, val" in said


def test_an_unknown_split_is_called_unknown_with_limit_too(fake: Any, photos: Any, pipeline: Any) -> None:
    pipeline(train={"images": photos(2)})
    assert "no such split" in fails(2, "--split", "tset", "--limit", 5)


def test_a_missing_folder_of_images_is_named(fake: Any, tmp_path: Path) -> None:
    assert "no/such/place" in fails(2, "--images", "no/such/place", *RANDOM)
    (tmp_path / "file.jpg").touch()
    assert "file.jpg" in fails(2, "--images", "file.jpg", *RANDOM)


def test_a_folder_without_images_is_named(fake: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert "empty: contains no images" in fails(2, "--images", "empty", *RANDOM)


@pytest.mark.parametrize("output", ["features", "features.hdf5", "features.h5.gz"])
def test_an_output_that_is_no_h5_file_is_wrong_use(fake: Any, photos: Any, tmp_path: Path, output: str) -> None:
    assert "must end in .h5" in fails(2, "--images", photos(2), "--output", output, *RANDOM)
    assert not (tmp_path / output).exists()


def test_a_missing_captions_file_is_named(fake: Any, photos: Any) -> None:
    assert "no.json" in fails(2, "--images", photos(2), "--annotations", "no.json", *RANDOM)


def test_a_missing_weights_file_is_named(fake: Any, photos: Any) -> None:
    assert "no.pth" in fails(2, "--images", photos(2), "--weights", "no.pth")


def test_an_unknown_encoder_is_wrong_use(fake: Any, photos: Any) -> None:
    assert "vgg16" in fails(2, "--images", photos(2), "--encoder", "vgg16")


def test_half_precision_on_a_cpu_is_wrong_use(fake: Any, photos: Any) -> None:
    said = fails(2, "--images", photos(2), "--weights", "random", "--precision", "float16", "--device", "cpu")
    assert "GPU" in said


def test_a_store_of_other_features_is_not_overwritten(fake: Any, photos: Any) -> None:
    folder = photos(3)
    assert run("--images", folder, *RANDOM).exit_code == 0
    before = Path("features/photos.h5").read_bytes()
    said = fails(2, "--images", folder, "--weights", "random:1", "--precision", "float32")
    assert "planned differently" in said
    assert "random:0" in said
    assert "random:1" in said
    assert Path("features/photos.h5").read_bytes() == before


def test_too_many_bad_images_are_a_failure(fake: Any, photos: Any) -> None:
    said = fails(1, "--images", photos(4, bad={0: "", 1: "", 2: ""}), *RANDOM)
    assert "3 of 4 images are invalid" in said
    assert not Path("features/photos.h5").exists()


def test_a_full_disk_is_a_failure_with_advice(fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, images: np.ndarray) -> np.ndarray:
        raise OSError(28, "No space left on device", "features/photos/00000.h5")

    monkeypatch.setattr(fake, "encode", full)
    said = fails(1, "--images", photos(4), *RANDOM)
    assert "No space left" in said
    assert "run the same command again" in said


def test_control_c_ends_with_status_130(fake: Any, photos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, images: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "encode", interrupt)
    result = run("--images", photos(4), *RANDOM)
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr


def test_help_names_the_exit_statuses_and_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Exit status" in result.stdout
    assert "extract-features --split train" in result.stdout


# ------------------------------------------------------------------------------------------------------ several workers


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As a process that nobody numbered, wherever these tests run."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "JOB_COMPLETION_INDEX"):
            monkeypatch.delenv(name)
    return monkeypatch


SMALL = (*RANDOM, "--shard-size", 2, "--batch-size", 2)


def test_workers_make_their_shares_and_the_last_writes_the_index(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path
) -> None:
    folder = photos(10)
    first = run("--images", folder, *SMALL, "--rank", 0, "--world-size", 2)
    assert first.exit_code == 0, first.output
    assert "rank 0 of 2 (flags): 3 of 5 shards" in first.stdout
    assert "share done: 3 shards written (0 already complete)" in first.stdout
    assert "2 shards of other processes are still missing" in first.stdout
    assert not (tmp_path / "features" / "photos.h5").exists()
    last = run("--images", folder, *SMALL, "--rank", 1, "--world-size", 2)
    assert last.exit_code == 0, last.output
    assert re.search(r"done: features/photos\.h5: 10 images, 2 shards written", last.stdout)
    assert len(FeatureStore(tmp_path / "features" / "photos.h5")) == 10


def test_the_environment_numbers_the_workers(fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_ARRAY_TASK_ID", "2")
    no_launcher.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    result = run("--images", photos(10), *SMALL)
    assert "rank 2 of 3 (Slurm array): 1 of 5 shards" in result.stdout


def test_only_whoever_completes_the_store_ends_with_the_status_of_rejects(
    fake: Any, photos: Any, no_launcher: Any
) -> None:
    folder = photos(10, bad={0: "text"})
    first = run("--images", folder, *SMALL, "--rank", 0, "--world-size", 2)
    assert first.exit_code == 0, "torchrun would kill the others for anything else"
    assert "invalid images: 1" in first.stdout
    last = run("--images", folder, *SMALL, "--rank", 1, "--world-size", 2)
    assert last.exit_code == 3
    assert "invalid images: 1" in last.stdout, "of the whole store, not of its own share"


def test_a_worker_without_shards_has_nothing_to_do_and_is_no_error(fake: Any, photos: Any, no_launcher: Any) -> None:
    result = run("--images", photos(2), *SMALL, "--rank", 3, "--world-size", 4)
    assert result.exit_code == 0, result.output
    assert "0 of 1 shard" in result.stdout
    assert fake.built == 0


def test_other_processes_of_one_machine_do_not_repeat_the_configuration(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    for rank in (0, 1):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            no_launcher.setenv(name, str(value))
        result = run("--images", folder, *SMALL)
        assert result.exit_code == 0, result.output
        assert ("configuration" in result.stdout) == (rank == 0)
        assert f"rank {rank} of 2 (torchrun)" in result.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--rank", 2, "--world-size", 2), "--rank 2"),
        (("--world-size", 2), "--rank"),
        (("--devices", "none"), "--devices"),
        (("--devices", 0), "--devices"),
        (("--devices", 2, "--device", "cuda:1"), "cuda:1"),
        (("--partition", "gpu"), "--partition: only with --submit"),
        (("--gpus-per-task", 1, "--wait"), "--gpus-per-task, --wait: only with --submit"),
        (("--submit", "slurm"), "--num-jobs"),
        (("--submit", "slurm", "--num-jobs", 0), "--num-jobs"),
        (("--submit", "slurm", "--num-jobs", 2, "--rank", 1), "--rank"),
        (("--submit", "pbs", "--num-jobs", 2), "pbs"),
    ],
)
def test_what_makes_no_sense_about_workers_is_wrong_use_and_makes_nothing(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path, flags: tuple[object, ...], named: str
) -> None:
    said = fails(2, "--images", photos(4), *SMALL, *flags)
    assert named in said
    assert not (tmp_path / "features" / "photos.h5").exists()


def test_several_processes_of_one_machine_divide_the_work_and_the_whole_store_is_reported(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The processes themselves run in tests/extract/test_slurm.py; here they are this one, called again."""

    class HereAndNow:
        def __init__(self, command: list[str], share: Share, workers: int, threads: int | None) -> None:
            assert command[2:] == [*(str(word) for word in given), "--brief"]
            assert threads is not None, "on a CPU they divide the cores"
            parts = [share.subdivide(i, workers, "") for i in range(workers)]
            self.statuses = [run(*command[2:], "--rank", p.rank, "--world-size", p.world_size).exit_code for p in parts]

        def running(self) -> bool:
            return False

        def wait(self) -> list[int]:
            return self.statuses

    no_launcher.setattr("gridcap.extract.cluster.launch.LocalProcesses", HereAndNow)
    folder = photos(10, bad={3: "text"})
    # In the order in which the command declares them.
    given = (
        "--images",
        folder,
        "--weights",
        "random",
        "--precision",
        "float32",
        "--shard-size",
        2,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--max-invalid",
        "50%",
    )
    result = run(*given, "--devices", 3)
    assert result.exit_code == 3, result.output
    assert "10 images, 5 shards written (0 already complete)" in result.stdout
    assert "invalid images: 1" in result.stdout
    again = run(*given, "--devices", 3)
    assert "nothing to do" in again.stdout


# ------------------------------------------------------------------------------------------------------------- --submit

SUBMIT = ("--submit", "slurm", "--num-jobs", 3)


@pytest.fixture
def slurm(tmp_path: Path, no_launcher: pytest.MonkeyPatch) -> Path:
    """Stand-ins for sbatch and squeue on the PATH; the file to which sbatch copies the script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\nshift\ncp \"$1\" '{tmp_path}/submitted'\necho 42\n")
    (folder / "squeue").write_text("#!/bin/sh\necho 'Invalid job id specified' >&2\nexit 1\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    no_launcher.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "submitted"


def test_a_dry_submission_shows_the_whole_script_and_writes_nothing(
    fake: Any, photos: Any, slurm: Path, tmp_path: Path
) -> None:
    folder = photos(10)
    before = files(tmp_path)
    result = run("--images", folder, *SMALL, *SUBMIT, "--time", "1:00:00", "--partition", "main", "--dry-run")
    assert result.exit_code == 0, result.output
    assert files(tmp_path) == before
    script = result.stdout[result.stdout.index("#!/usr/bin/env bash") :]
    for line in (
        "#SBATCH --array=0-2",
        "#SBATCH --time=1:00:00",
        "#SBATCH --partition=main",
        f"cd {tmp_path} || exit 2",
    ):
        assert line in script.splitlines()
    assert sys.executable in script
    words = [line.strip() for line in script[script.index("command=(") : script.index("\n)\n")].splitlines()[2:]]
    assert words == [
        f"--images {folder}",
        "--weights random",
        "--shard-size 2",
        "--batch-size 2",
        "--precision float32",
    ], "what was asked, and nothing about the submission"


def test_submitting_writes_the_plan_and_says_how_to_watch_and_cancel(
    fake: Any, photos: Any, slurm: Path, tmp_path: Path
) -> None:
    result = run("--images", photos(10), *SMALL, *SUBMIT)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "features" / "photos" / "plan.json").exists(), "so that the workers agree"
    assert slurm.read_text() == (tmp_path / "features" / "photos.slurm" / "job.sh").read_text()
    for text in ("job 42", "squeue --jobs=42", "scancel 42"):
        assert text in result.stdout
    assert fake.built == 0


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ((), "float32"),
        (("--gpus-per-task", 1), "bfloat16"),
        (("--precision", "bfloat16"), "bfloat16"),
        (("--gpus-per-task", 1, "--precision", "float16"), "float16"),
    ],
)
def test_the_jobs_arithmetic_is_settled_when_they_are_submitted(
    fake: Any, photos: Any, slurm: Path, flags: tuple[object, ...], precision: str
) -> None:
    """Whatever this machine could compute in: it is not the one that will."""
    result = run("--images", photos(10), "--weights", "random", "--shard-size", 2, *SUBMIT, *flags)
    assert result.exit_code == 0, result.output
    assert f"  --precision {precision}\n" in slurm.read_text()
    assert json.loads(Path("features/photos/plan.json").read_text())["provenance"]["precision"] == precision


def test_a_task_with_several_gpus_uses_them_all(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(10)
    for flags, devices in (((), "auto"), (("--devices", 2), "2")):
        result = run("--images", folder, *SMALL, *SUBMIT, "--gpus-per-task", 4, *flags)
        assert result.exit_code == 0, result.output
        assert f"  --devices {devices}\n" in slurm.read_text()


def test_no_more_jobs_than_shards_are_submitted(fake: Any, photos: Any, slurm: Path) -> None:
    result = run("--images", photos(4), *SMALL, *SUBMIT)
    assert "2 shards need only 2 jobs" in result.stderr
    assert "#SBATCH --array=0-1\n" in slurm.read_text()


def test_a_complete_store_is_not_submitted_again(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(10, bad={1: "text"})
    assert run("--images", folder, *SMALL).exit_code == 3
    result = run("--images", folder, *SMALL, *SUBMIT, "--wait")
    assert "nothing to do" in result.stdout
    assert result.exit_code == 3
    assert not slurm.exists()


def test_another_plan_on_disk_is_refused_before_anything_is_submitted(fake: Any, photos: Any, slurm: Path) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL).exit_code == 0
    said = fails(2, "--images", folder, "--weights", "random:1", "--precision", "float32", *SUBMIT)
    assert "planned differently" in said
    assert not slurm.exists()


def test_waiting_for_jobs_that_are_gone_is_a_failure(fake: Any, photos: Any, slurm: Path) -> None:
    said = fails(1, "--images", photos(10), *SMALL, *SUBMIT, "--wait")
    assert "5 of 5 shards are missing" in said
    assert "photos.slurm/42_*.log" in said


def test_control_c_ends_the_waiting_and_not_the_jobs(
    fake: Any, photos: Any, slurm: Path, no_launcher: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    no_launcher.setattr("gridcap.extract.cluster.slurm.follow", interrupt)
    result = run("--images", photos(10), *SMALL, *SUBMIT, "--wait")
    assert result.exit_code == 130
    assert "the jobs continue" in result.stderr
    assert "scancel 42" in result.stderr


def test_without_slurm_submitting_is_wrong_use_that_says_so(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_launcher.setenv("PATH", str(tmp_path))
    assert "sbatch" in fails(2, "--images", photos(10), *SMALL, *SUBMIT)


# ------------------------------------------------------------------------------------ append, retry, views, arithmetic


def test_appending_says_what_is_new_and_a_dry_run_of_it_writes_nothing(
    fake: Any, photos: Any, no_launcher: Any, tmp_path: Path
) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL).exit_code == 0
    shutil.copy(folder / "0000.png", folder / "later.png")
    assert "--append" in fails(2, "--images", folder, *SMALL)
    before = files(tmp_path)
    dry = run("--images", folder, *SMALL, "--append", "--dry-run")
    assert "to append: 1 image to the existing 4" in dry.stdout, dry.output
    assert files(tmp_path) == before
    done = run("--images", folder, *SMALL, "--append")
    assert done.exit_code == 0, done.output
    assert "already complete: 2 of 3 shards" in done.stdout
    assert "5 images, 1 shard written (2 already complete)" in done.stdout
    assert "nothing to do" in run("--images", folder, *SMALL).stdout
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        np.testing.assert_array_equal(store.row(0), store.row(4))


def test_retrying_says_how_many_are_good_now(fake: Any, photos: Any, no_launcher: Any) -> None:
    folder = photos(6, bad={1: "text", 2: "text"})
    assert run("--images", folder, *SMALL, "--max-invalid", "50%").exit_code == 3
    shutil.copy(folder / "0000.png", folder / "0001.png")
    again = run("--images", folder, *SMALL, "--max-invalid", "50%", "--retry-invalid")
    assert again.exit_code == 3, again.output
    assert "retried: 1 image valid now" in again.stdout
    assert "invalid images: 1" in again.stdout
    assert "--submit" in fails(2, "--images", folder, *SMALL, "--retry-invalid", "--submit", "slurm", "--num-jobs", 2)


def test_views_are_a_list_and_begin_with_the_original(fake: Any, photos: Any, no_launcher: Any, tmp_path: Path) -> None:
    folder = photos(3)
    result = run("--images", folder, *SMALL, "--views", "original,hflip")
    assert result.exit_code == 0, result.output
    assert "views original and hflip" in result.stdout
    with FeatureStore(tmp_path / "features" / "photos.h5") as store:
        assert store.views == ("original", "hflip")
    for wrong in ("hflip", "original,upside-down", "original,original"):
        assert "views" in fails(2, "--images", folder, *SMALL, "--views", wrong, "--output", "x.h5")


def test_nvjpeg_without_a_gpu_is_wrong_use(fake: Any, photos: Any, no_launcher: Any, tmp_path: Path) -> None:
    assert "nvjpeg" in fails(2, "--images", photos(2), *SMALL, "--jpeg-decoder", "nvjpeg")
    assert not (tmp_path / "features").exists()


def test_what_was_begun_compiled_goes_on_compiled_and_is_refused_uncompiled(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch
) -> None:
    folder = photos(4)
    assert run("--images", folder, *SMALL, "--compile", "on").exit_code == 0
    assert "nothing to do" in run("--images", folder, *SMALL).stdout, "auto follows the plan on disk"
    assert "compile true there, false here" in fails(2, "--images", folder, *SMALL, "--compile", "off")


def test_room_on_the_disk_is_shown_and_a_lack_of_it_refused_before_the_first_image(
    fake: Any, photos: Any, no_launcher: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = photos(4)
    assert "to write: 2 shards, 0 MiB" in run("--images", folder, *SMALL, "--dry-run").stdout
    no_launcher.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert "GiB are free" in fails(1, "--images", folder, *SMALL)
    assert not list((tmp_path / "features").rglob("*.h5"))
