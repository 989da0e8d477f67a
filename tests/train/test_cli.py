import json
import shutil

import pytest
import yaml
from click.testing import CliRunner

from train.checkpoint import load_checkpoint
from train.cli import evaluate_decoder, train_decoder

TINY = {
    "seed": 1,
    "data": {
        "features": "features",
        "splits": {
            "train": {"images": "images", "annotations": "train.json"},
            "val": {"images": "images", "annotations": "val.json"},
            "test": {"images": "images", "annotations": "test.json"},
        },
    },
    "train": {
        "decoder": {"family": "attention", "embed_size": 12, "hidden_size": 24, "attention_size": 8},
        "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "captions_per_image": 2, "max_length": 8,
        "precision": "float32", "device": "cpu", "output": "runs/a",
    },
    "caption": {"beam_size": 2, "max_length": 8, "batch_size": 4},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_java")


@pytest.fixture(scope="module")
def template(tmp_path_factory, new_data):
    """A project folder: three stores, their captions, pipeline.yaml, and a finished run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "features").mkdir()
    sizes = {"train": (18, 100), "val": (6, 500), "test": (7, 700)}
    for seed, (split, (count, first)) in enumerate(sizes.items()):
        new_data(folder / "features" / f"{split}.h5", count, first_id=first, seed=seed, split=split)
        (folder / "features" / f"{split}.json").rename(folder / f"{split}.json")
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(train_decoder, ["--output", "runs/done"])
    assert done.exit_code == 0, done.output
    (folder / "train-output.txt").write_text(done.output)
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """A copy of the template, and the current folder."""
    shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def invoke(command, *arguments, status=0):
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    if status:
        assert "Traceback" not in done.output
        assert "what to do:" in done.output or "Usage:" in done.output
    return done.output


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- train-decoder ---


def test_training_writes_the_run_and_says_what_it_did(project):
    run = project / "runs" / "done"
    assert [row["epoch"] for row in logged(run)] == [1, 2]
    assert "val_cider" in logged(run)[0]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["output"] == "runs/done"
    assert load_checkpoint(run, "last").path.name == "epoch-0002"
    output = (project / "train-output.txt").read_text()
    assert "configuration" in output
    assert "hidden_size: 24" in output
    assert "18 images, 36 captions from train.json" in output
    assert "6 images, 12 captions from val.json" in output
    assert "done: runs/done: 2 epochs, best is epoch" in output


def test_captions_are_found_by_the_stores_split_whatever_its_file_is_called(project):
    shutil.move("features/val.h5", "features/renamed.h5")
    output = invoke(
        train_decoder, "--val-features", "features/renamed.h5", "--epochs", 1, "--set", "train.learning_rate=0.02"
    )
    assert "renamed.h5: 6 images, 12 captions from val.json" in output
    assert "learning_rate: 0.02" in output


def test_captions_can_be_given_without_any_configuration(project):
    (project / "pipeline.yaml").unlink()
    output = invoke(
        train_decoder, "--features", "features/train.h5", "--annotations", "train.json", "--val-features",
        "features/val.h5", "--val-annotations", "val.json", "--decoder", "lstm", "--epochs", 1, "--device", "cpu",
        "--output", "runs/flags", "--set", "train.decoder.hidden_size=16", "--set", "train.decoder.embed_size=8",
    )  # fmt: skip
    assert "family: lstm" in output
    assert load_checkpoint(project / "runs/flags").config.train.decoder.family == "lstm"


def test_without_a_validation_store_training_says_so_and_works(project):
    (project / "features" / "val.h5").unlink()
    shutil.rmtree(project / "features" / "val")
    output = invoke(train_decoder, "--epochs", 1)
    assert "no validation store" in output
    assert "done: runs/a: 1 epochs, best is epoch 1" in output
    assert "CIDEr" not in output.splitlines()[-1]


def test_a_dry_run_of_training_prints_and_writes_nothing(project):
    before = files(project)
    output = invoke(train_decoder, "--dry-run", "--epochs", 7)
    assert "epochs: 7" in output
    assert "dry run: would train attention for 7 epochs into runs/a" in output
    assert files(project) == before
    assert not (project / "runs" / "a").exists()


def test_problems_of_the_captions_file_and_images_left_out_are_told(project):
    tree = json.loads((project / "train.json").read_text())
    tree["images"].append({"id": 9999, "file_name": "9999.jpg"})
    tree["annotations"].append({"id": 800, "image_id": 9999, "caption": "a cat"})
    tree["annotations"].append({"id": 801, "image_id": 100, "caption": "  "})
    (project / "train.json").write_text(json.dumps(tree))
    output = invoke(train_decoder, "--dry-run")
    assert "1 x empty caption (annotation 801)" in output
    assert "1 images not in the feature store" in output


def test_too_many_problems_are_refused_also_in_a_captions_file_given_by_its_flag(project):
    tree = json.loads((project / "train.json").read_text())
    for annotation in tree["annotations"][::2]:
        annotation["caption"] = ""
    (project / "bad.json").write_text(json.dumps(tree))
    for given in (["--annotations", "bad.json"], ["--set", "data.splits.train.annotations=bad.json"]):
        output = invoke(train_decoder, "--dry-run", *given, status=2)
        assert "bad.json" in output
        assert "more than 20%" in output


def test_missing_captions_are_a_users_error_that_names_the_flag(project, new_data):
    (project / "pipeline.yaml").unlink()
    new_data(project / "odd.h5", 6, split="odd")
    output = invoke(train_decoder, "--features", "odd.h5", status=2)
    assert "no captions known for its split 'odd'" in output
    assert "--annotations" in output
    output = invoke(
        train_decoder, "--features", "odd.h5", "--annotations", "odd.json", "--val-features", "odd.h5", status=2
    )
    assert "--val-annotations" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--features", "nowhere.h5"], "nowhere.h5: no such file"),
        (["--annotations", "nowhere.json"], "nowhere.json: No such file"),
        (["--annotations", "val.json"], "no usable image in common"),
        (["--decoder", "transformer9"], "transformer9"),
        (["--epochs", "0"], "train.epochs"),
        (["--set", "train.learning_rte=1"], "did you mean learning_rate?"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_use_of_training_is_a_users_error_and_writes_nothing(project, arguments, said):
    assert said in invoke(train_decoder, *arguments, status=2)
    assert not (project / "runs" / "a").exists()


def test_validation_captions_without_validation_features_are_refused(project):
    (project / "features" / "val.h5").unlink()
    assert "--val-features" in invoke(train_decoder, "--val-annotations", "val.json", status=2)


def test_a_second_run_into_the_same_output_points_to_resume(project):
    output = invoke(train_decoder, "--output", "runs/done", status=2)
    assert "holds a run already" in output
    assert "--resume" in output


def test_resume_goes_on_with_the_runs_own_settings(project):
    (project / "pipeline.yaml").unlink()
    output = invoke(train_decoder, "--output", "runs/done", "--resume", "--epochs", 3)
    assert "hidden_size: 24" in output
    assert [row["epoch"] for row in logged(project / "runs/done")] == [1, 2, 3]


def test_resume_with_another_learning_rate_is_refused_naming_it(project):
    output = invoke(train_decoder, "--output", "runs/done", "--resume", "--learning-rate", 0.5, status=2)
    assert "train.learning_rate: 0.01 then, 0.5 now" in output


def test_resume_on_nothing_is_a_users_error_and_writes_nothing(project):
    output = invoke(train_decoder, "--output", "runs/nothing", "--resume", status=2)
    assert "runs/nothing: no such folder" in output
    assert not (project / "runs" / "nothing").exists()


def test_validation_may_begin_with_a_resume(project):
    invoke(train_decoder, "--output", "runs/b", "--set", "data.features=elsewhere", "--features", "features/train.h5")
    output = invoke(train_decoder, "--output", "runs/b", "--resume", "--epochs", 3, "--val-features", "features/val.h5")
    assert "best is epoch 3, validation CIDEr" in output


def test_a_run_stopped_before_its_first_checkpoint_begins_again_with_resume(project):
    folder = project / "runs" / "early"
    folder.mkdir(parents=True)
    shutil.copy(project / "runs/done/config.yaml", folder)
    assert "done: runs/early: 2 epochs" in invoke(train_decoder, "--output", "runs/early", "--resume")


def test_images_of_the_training_store_may_not_validate(project):
    output = invoke(train_decoder, "--output", "runs/x", "--val-features", "features/train.h5", status=2)
    assert "18 images are both in features/train.h5 and in features/train.h5" in output
    assert not (project / "runs" / "x").exists()


def test_the_store_is_the_subset_whatever_seed_the_training_has(project):
    """Extraction cut the subset with its seed; cutting again with another would leave a part of it out."""
    tree = json.loads(json.dumps(TINY))
    tree["data"]["splits"]["val"]["limit"] = 3
    (project / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    output = invoke(train_decoder, "--output", "runs/x", "--seed", 9, "--dry-run")
    assert "features/val.h5: 6 images" in output


def test_karpathys_training_split_is_validated_on_karpathys_validation_split(project, new_data):
    for split, first in (("karpathy-train", 100), ("karpathy-val", 500)):
        new_data(project / "features" / f"{split}.h5", 6, first_id=first, split=split)
    output = invoke(
        train_decoder, "--features", "features/karpathy-train.h5", "--annotations", "features/karpathy-train.json",
        "--val-annotations", "features/karpathy-val.json", "--output", "runs/x", "--dry-run",
    )  # fmt: skip
    assert "features/karpathy-val.h5: 6 images" in output


RANDOM = {"name": "random:0", "sha256": "ab" * 32, "random": True}


def test_features_from_random_weights_are_warned_of(project, new_data):
    new_data(project / "random.h5", 6, weights=RANDOM)
    output = invoke(
        train_decoder, "--features", "random.h5", "--annotations", "random.json", "--output", "runs/random",
        "--epochs", 1, "--set", "data.features=elsewhere",
    )  # fmt: skip
    assert "WARNING: random.h5 was made with random encoder weights" in output
    output = invoke(
        evaluate_decoder, "--checkpoint", "runs/random", "--features", "random.h5", "--annotations", "random.json"
    )
    assert "WARNING: random.h5" in output


def test_features_from_real_weights_are_not_warned_of(project):
    assert "WARNING" not in (project / "train-output.txt").read_text()
    assert "WARNING" not in invoke(
        evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run"
    )


# --- evaluate-decoder ---


def test_evaluation_prints_the_scores_and_writes_them_with_every_caption(project):
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5")
    assert "7 images, 13 captions from test.json" in output
    written = project / "runs" / "done" / "evaluation"
    assert {p.name for p in written.iterdir()} == {"test.json", "test.coco-results.json"}
    tree = json.loads((written / "test.json").read_text())
    assert set(tree["metrics"]) == {
        "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "perplexity",
    }  # fmt: skip
    for name, value in tree["metrics"].items():
        assert f"{name:<11} {value:8.4f}" in output
    for name, why in tree["left_out"].items():
        assert f"{name:<11} left out: {why}" in output
    assert [c["image_id"] for c in tree["captions"]] == list(range(700, 707))
    results = json.loads((written / "test.coco-results.json").read_text())
    assert all(set(entry) == {"image_id", "caption"} for entry in results)
    assert results == [{k: c[k] for k in ("image_id", "caption")} for c in tree["captions"]]


def test_evaluation_goes_where_it_is_told(project):
    output = invoke(
        evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--output", "out/e.json",
        "--beam-size", 1,
    )  # fmt: skip
    assert {p.name for p in (project / "out").iterdir()} == {"e.json", "e.coco-results.json"}
    assert "beam 1" in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_a_single_checkpoint_is_evaluated_into_its_run(project):
    folder = load_checkpoint(project / "runs/done").path
    before = files(folder)
    invoke(evaluate_decoder, "--checkpoint", folder, "--features", "features/test.h5")
    assert (project / "runs" / "done" / "evaluation" / "test.json").is_file()
    assert files(folder) == before, "a checkpoint's folder holds the checkpoint and nothing else"


def test_captions_for_evaluation_are_found_in_the_runs_configuration(project):
    (project / "pipeline.yaml").unlink()
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "7 images, 13 captions from test.json" in output


def test_the_stores_own_split_in_the_runs_configuration_goes_before_another_split(project):
    tree = {**TINY, "data": {"splits": {"test": {"images": "images", "annotations": "test.json"}}}}
    (project / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/val.h5", "--dry-run")
    assert "6 images, 12 captions from val.json" in output


def test_a_dry_run_of_evaluation_writes_nothing(project):
    before = files(project)
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "dry run: would evaluate runs/done/checkpoints/epoch-" in output
    assert files(project) == before


def test_missing_captions_for_evaluation_are_a_users_error(project, new_data):
    (project / "pipeline.yaml").unlink()
    new_data(project / "odd.h5", 6, split="odd")
    run = project / "runs" / "done"
    for file in [run / "config.yaml", *run.rglob("config.json")]:
        file.write_text(file.read_text().replace("test", "other"))
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "odd.h5", status=2)
    assert "no captions known for its split 'odd'" in output
    assert "--annotations" in output


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("features", "features: holds no checkpoint"),
        ("train.json", "train.json"),
    ],
)
def test_a_wrong_checkpoint_path_is_a_users_error(project, checkpoint, said):
    output = invoke(evaluate_decoder, "--checkpoint", checkpoint, "--features", "features/test.h5", status=2)
    assert said in output


def test_a_damaged_checkpoint_is_a_users_error(project):
    weights = load_checkpoint(project / "runs/done").path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", status=2)
    assert "damaged checkpoint" in output


def test_mismatched_features_are_refused_with_the_difference(project, new_data):
    new_data(project / "other.h5", 6, encoder="resnet50", layer="layer4")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json"]
    output = invoke(evaluate_decoder, *arguments, status=2)
    assert 'encoder "inception_v3" there, "resnet50" here' in output
    assert 'layer "Mixed_7c" there, "layer4" here' in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_a_dry_run_of_evaluation_refuses_mismatched_features_too(project, new_data):
    new_data(project / "other.h5", 6, encoder="resnet50")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json", "--dry-run"]
    assert "resnet50" in invoke(evaluate_decoder, *arguments, status=2)


def test_evaluation_needs_a_checkpoint_and_features(project):
    assert "--checkpoint" in invoke(evaluate_decoder, "--features", "features/test.h5", status=2)
    assert "--features" in invoke(evaluate_decoder, "--checkpoint", "runs/done", status=2)


@pytest.mark.parametrize("command", [train_decoder, evaluate_decoder])
def test_help_names_the_flags_their_keys_and_examples(command):
    output = invoke(command, "--help")
    assert "--features" in output
    assert "--device" in output
    assert "train.device" in output
    assert "Examples:" in output
    assert command.name in output
