"""--val-fraction and --test-fraction: one store, one captions file, three splits."""

import json
import shutil

import pytest

from gridcap.common.store.reader import FeatureStore
from gridcap.train.cli import train_decoder
from gridcap.train.evaluate_cli import evaluate_decoder

pytestmark = pytest.mark.usefixtures("no_java")
FRACTIONS = ("--val-fraction", 0.2, "--test-fraction", 0.2, "--epochs", 1)


@pytest.fixture
def one_store(project):
    """A project without a validation store."""
    (project / "features" / "val.h5").unlink()
    shutil.rmtree(project / "features" / "val")
    return project


def test_one_store_is_split_and_each_part_can_be_evaluated(one_store, invoke):
    output = invoke(train_decoder, *FRACTIONS)
    assert "split: 10 train, 4 val, 4 test" in output
    assert "val_cider" in (one_store / "runs/a/metrics.jsonl").read_text()
    assignment = json.loads((one_store / "runs/a/splits.json").read_text())
    with FeatureStore("features/train.h5") as store:
        assert sorted(assignment) == sorted(store.file_name)
    evaluated = ("--checkpoint", "runs/a", "--features", "features/train.h5")
    output = invoke(evaluate_decoder, *evaluated, "--split", "test")
    assert "--split test: 4 images" in output
    (file,) = (one_store / "runs/a/evaluation").glob("train-test.*.scores.csv")
    names = [line.split(",")[1] for line in file.read_text().splitlines()[1:]]
    assert sorted(names) == sorted(name for name, split in assignment.items() if split == "test")
    message = invoke(evaluate_decoder, *evaluated, status=2)
    assert "contains training images of runs/a" in message
    assert "--split test" in message


def test_resuming_uses_the_same_images(one_store, invoke):
    invoke(train_decoder, *FRACTIONS)
    before = (one_store / "runs/a/splits.json").read_text()
    invoke(train_decoder, "--resume", "yes", "--epochs", 2)
    assert (one_store / "runs/a/splits.json").read_text() == before
    assert "val_fraction" in invoke(train_decoder, "--resume", "yes", "--epochs", 2, "--val-fraction", 0.3, status=1)


def test_a_group_column_keeps_near_duplicates_together(one_store, invoke):
    with FeatureStore("features/train.h5") as store:
        names = list(store.file_name)
    captions = [c["caption"] for c in json.loads((one_store / "train.json").read_text())["annotations"]]
    rows = [f"{name},{captions[i]},{i // 3}" for i, name in enumerate(names)]
    (one_store / "captions.csv").write_text("image,caption,scene\n" + "\n".join(rows) + "\n")
    invoke(train_decoder, *FRACTIONS, "--annotations", "captions.csv", "--group-column", "scene")
    assignment = json.loads((one_store / "runs/a/splits.json").read_text())
    for i in range(0, len(names), 3):
        assert len({assignment[name] for name in names[i : i + 3]}) == 1


def test_a_prefix_of_the_names_keeps_near_duplicates_together(one_store, invoke):
    with FeatureStore("features/train.h5") as store:
        names = list(store.file_name)
    separator = names[0].rpartition("/")[2][-5]  # the last digit of the number
    invoke(train_decoder, *FRACTIONS, "--group-prefix", separator)
    assignment = json.loads((one_store / "runs/a/splits.json").read_text())
    groups = {}
    for name, split in assignment.items():
        groups.setdefault(name.rpartition("/")[2].partition(separator)[0], set()).add(split)
    assert all(len(splits) == 1 for splits in groups.values())
    assert len(groups) < len(assignment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-fraction", 0.2, "--val-features", "features/train.h5"], "not with --val-features"),
        (["--val-fraction", 0.5, "--test-fraction", 0.5], "leave no training images"),
        (["--val-fraction", 0.01], "no images are left for val"),
        (["--val-fraction", 1.5], "val_fraction"),
        (["--group-column", "scene"], "--group-column"),
        (["--group-prefix", "_"], "--group-prefix"),
        (["--test-fraction", 0.2, "--patience", 2], "--patience requires a validation store"),
    ],
)
def test_contradictions_are_usage_errors(one_store, invoke, arguments, message):
    assert message in invoke(train_decoder, *arguments, "--epochs", 1, status=2)
    assert not (one_store / "runs/a").exists()


def test_split_needs_a_run_that_split_its_data(project, invoke):
    evaluated = ("--checkpoint", "runs/done", "--features", "features/val.h5", "--split", "test")
    assert "trained without --val-fraction" in invoke(evaluate_decoder, *evaluated, status=2)
