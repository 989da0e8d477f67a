"""evaluate-decoder: what it is given, where its output goes, and what it refuses."""

import json

import pytest
import yaml

from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.evaluate_cli import evaluate_decoder

pytestmark = pytest.mark.usefixtures("no_java")


def test_evaluation_prints_the_scores_and_writes_them_with_every_caption(project, invoke):
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5")
    assert "7 images, 13 captions from test.json" in output
    written = project / "runs" / "done" / "evaluation"
    assert {p.name for p in written.iterdir()} == {
        "test.beam-2.json",
        "test.beam-2.scores.csv",
        "test.beam-2.coco-results.json",
    }
    tree = json.loads((written / "test.beam-2.json").read_text())
    assert set(tree["metrics"]) == {
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "ROUGE-L",
        "CIDEr",
        "CIDEr-D",
        "perplexity",
    }
    for name, value in tree["metrics"].items():
        assert f"{name:<17} {value:8.4f}" in output
    for name, why in tree["left_out"].items():
        assert f"{name:<17} left out: {why}" in output
    assert [c["image_id"] for c in tree["captions"]] == list(range(700, 707))
    results = json.loads((written / "test.beam-2.coco-results.json").read_text())
    assert all(set(entry) == {"image_id", "caption"} for entry in results)
    assert results == [{k: c[k] for k in ("image_id", "caption")} for c in tree["captions"]]


def test_evaluation_goes_where_it_is_told(project, invoke):
    output = invoke(
        evaluate_decoder,
        "--checkpoint",
        "runs/done",
        "--features",
        "features/test.h5",
        "--output",
        "out/e.json",
        "--beam-size",
        1,
    )
    assert {p.name for p in (project / "out").iterdir()} == {"e.json", "e.scores.csv", "e.coco-results.json"}
    assert "beam 1" in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_a_single_checkpoint_is_evaluated_into_its_run(project, invoke, files):
    folder = load_checkpoint(project / "runs/done").path
    before = files(folder)
    invoke(evaluate_decoder, "--checkpoint", folder, "--features", "features/test.h5")
    assert (project / "runs" / "done" / "evaluation" / "test.beam-2.json").is_file()
    assert files(folder) == before, "a checkpoint's folder holds the checkpoint and nothing else"


def test_captions_for_evaluation_are_found_in_the_runs_configuration(project, invoke):
    (project / "pipeline.yaml").unlink()
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "7 images, 13 captions from test.json" in output


def test_the_stores_own_split_in_the_runs_configuration_goes_before_another_split(project, invoke):
    tree = {
        **yaml.safe_load((project / "pipeline.yaml").read_text()),
        "data": {"splits": {"test": {"images": "images", "annotations": "test.json"}}},
    }
    (project / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/val.h5", "--dry-run")
    assert "6 images, 12 captions from val.json" in output


def test_a_dry_run_of_evaluation_writes_nothing(project, invoke, files):
    before = files(project)
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "dry run: would evaluate runs/done/checkpoints/step-" in output
    assert files(project) == before


def test_a_place_that_cannot_be_written_is_said_before_anything_is_decoded(project, invoke, monkeypatch):
    monkeypatch.setattr("gridcap.train.evaluate.evaluate", lambda *_, **__: pytest.fail("the captions were decoded"))
    asked = (evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5")
    assert "a file stands where a folder is needed" in invoke(*asked, "--output", "test.json/e.json", status=1)


def test_missing_captions_for_evaluation_are_a_users_error(project, new_data, invoke, sign):
    (project / "pipeline.yaml").unlink()
    new_data(project / "odd.h5", 6, split="odd")
    run = project / "runs" / "done"
    for file in [run / "config.yaml", *run.rglob("config.json")]:
        file.write_text(file.read_text().replace("test", "other"))
    for checkpoint in (run / "checkpoints").iterdir():
        sign(checkpoint)
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
def test_a_wrong_checkpoint_path_is_a_users_error(project, checkpoint, said, invoke):
    output = invoke(evaluate_decoder, "--checkpoint", checkpoint, "--features", "features/test.h5", status=2)
    assert said in output


def test_a_damaged_checkpoint_is_a_users_error(project, invoke):
    weights = load_checkpoint(project / "runs/done").path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", status=2)
    assert "damaged checkpoint" in output


def test_mismatched_features_are_refused_with_the_difference(project, new_data, invoke):
    new_data(project / "other.h5", 6, encoder="resnet50", layer="layer4")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json"]
    output = invoke(evaluate_decoder, *arguments, status=2)
    assert 'encoder "inception_v3" there, "resnet50" here' in output
    assert 'layer "Mixed_7c" there, "layer4" here' in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_a_dry_run_of_evaluation_refuses_mismatched_features_too(project, new_data, invoke):
    new_data(project / "other.h5", 6, encoder="resnet50")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json", "--dry-run"]
    assert "resnet50" in invoke(evaluate_decoder, *arguments, status=2)


def test_evaluation_needs_a_checkpoint_and_features(project, invoke):
    assert "--checkpoint" in invoke(evaluate_decoder, "--features", "features/test.h5", status=2)
    assert "--features" in invoke(evaluate_decoder, "--checkpoint", "runs/done", status=2)


def test_features_from_random_weights_are_warned_of_and_real_ones_not(project, new_data, invoke):
    random = {"name": "random:0", "sha256": "ab" * 32, "random": True}
    new_data(project / "random.h5", 6, weights=random)
    arguments = ["--checkpoint", "runs/done", "--features", "random.h5", "--annotations", "random.json", "--dry-run"]
    assert "WARNING: random.h5" in invoke(evaluate_decoder, *arguments, status=2)
    real = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "WARNING" not in real


def test_help_names_the_flags_their_keys_and_examples(invoke):
    output = invoke(evaluate_decoder, "--help")
    for expected in ("--features", "--device", "train.device", "Examples:", evaluate_decoder.name):
        assert expected in output
