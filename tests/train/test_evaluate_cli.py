"""evaluate-decoder: inputs, outputs, and errors."""

import json
import re

import pytest
import yaml

from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.evaluate_cli import evaluate_decoder

pytestmark = pytest.mark.usefixtures("no_java")


def test_scores_are_printed_and_written_with_all_captions(project, invoke):
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
        low, high = tree["intervals"][name]
        assert low <= value <= high or name.startswith("BLEU"), name
        assert f"{name:<17} {value:8.4f}   [{low:.4f}, {high:.4f}]" in output
    for name, reason in tree["unavailable"].items():
        assert f"{name:<17} not available: {reason}" in output
    assert [c["image_id"] for c in tree["captions"]] == list(range(700, 707))
    results = json.loads((written / "test.beam-2.coco-results.json").read_text())
    assert all(set(entry) == {"image_id", "caption"} for entry in results)
    assert results == [{k: c[k] for k in ("image_id", "caption")} for c in tree["captions"]]


def test_output_selects_the_json_file(project, invoke):
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
    settings = json.loads((project / "out" / "e.json").read_text())["settings"]
    assert settings["decoding"]["beam_size"] == 1
    assert settings["data"]["splits"]["test"]["annotations"] == "test.json"
    assert (settings["device"], settings["seed"]) == ("cpu", 1)
    assert "beam 1" in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_default_output_of_a_checkpoint_is_in_its_run(project, invoke, files):
    folder = load_checkpoint(project / "runs/done").path
    before = files(folder)
    invoke(evaluate_decoder, "--checkpoint", folder, "--features", "features/test.h5")
    assert (project / "runs" / "done" / "evaluation" / "test.beam-2.json").is_file()
    assert files(folder) == before, "nothing is written into the checkpoint folder"


def test_captions_are_looked_up_in_the_configuration_of_the_run(project, invoke):
    (project / "pipeline.yaml").unlink()
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "7 images, 13 captions from test.json" in output


def test_split_of_the_store_takes_precedence_over_the_test_split(project, invoke):
    tree = {
        **yaml.safe_load((project / "pipeline.yaml").read_text()),
        "data": {"splits": {"test": {"images": "images", "annotations": "test.json"}}},
    }
    (project / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/val.h5", "--dry-run")
    assert "6 images, 12 captions from val.json" in output


def test_dry_run_writes_nothing(project, invoke, files):
    before = files(project)
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "dry run: would evaluate runs/done/checkpoints/step-" in output
    assert files(project) == before


def test_unwritable_output_is_reported_before_decoding(project, invoke, monkeypatch):
    monkeypatch.setattr("gridcap.train.evaluate.evaluate", lambda *_, **__: pytest.fail("captions were decoded"))
    command = (evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5")
    assert "a file exists where a folder is needed" in invoke(*command, "--output", "test.json/e.json", status=1)
    (project / "e.scores.csv").mkdir()
    assert "e.scores.csv: " in invoke(*command, "--output", "e.json", status=1)


@pytest.mark.parametrize("output", ["out", "features", "e.csv"])
def test_output_must_be_a_json_file(project, invoke, output):
    given = (evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5")
    assert "must end in .json" in invoke(*given, "--output", output, status=2)


def test_missing_captions_are_a_usage_error(project, new_data, invoke, sign):
    (project / "pipeline.yaml").unlink()
    new_data(project / "odd.h5", 6, split="odd")
    run = project / "runs" / "done"
    for file in [run / "config.yaml", *run.rglob("config.json")]:
        file.write_text(re.sub(r"\btest\b", "other", file.read_text()))
    for checkpoint in (run / "checkpoints").iterdir():
        sign(checkpoint)
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "odd.h5", status=2)
    assert "no captions configured for its split 'odd'" in output
    assert "--annotations" in output


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("features", "features: contains no checkpoint"),
        ("train.json", "train.json"),
    ],
)
def test_wrong_checkpoint_path_is_an_error(project, checkpoint, message, invoke):
    output = invoke(evaluate_decoder, "--checkpoint", checkpoint, "--features", "features/test.h5", status=1)
    assert message in output


def test_corrupted_checkpoint_is_an_error(project, invoke):
    weights = load_checkpoint(project / "runs/done").path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", status=1)
    assert "corrupted checkpoint" in output


def test_mismatched_features_are_rejected_with_the_difference(project, new_data, invoke):
    new_data(project / "other.h5", 6, encoder="resnet50", layer="layer4")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json"]
    output = invoke(evaluate_decoder, *arguments, status=1)
    assert 'encoder: expected "inception_v3", got "resnet50"' in output
    assert 'layer: expected "Mixed_7c", got "layer4"' in output
    assert not (project / "runs" / "done" / "evaluation").exists()


def test_dry_run_rejects_mismatched_features(project, new_data, invoke):
    new_data(project / "other.h5", 6, encoder="resnet50")
    arguments = ["--checkpoint", "runs/done", "--features", "other.h5", "--annotations", "other.json", "--dry-run"]
    assert "resnet50" in invoke(evaluate_decoder, *arguments, status=1)


def test_checkpoint_and_features_are_required(project, invoke):
    assert "--checkpoint" in invoke(evaluate_decoder, "--features", "features/test.h5", status=2)
    assert "--features" in invoke(evaluate_decoder, "--checkpoint", "runs/done", status=2)


def test_random_encoder_weights_print_a_warning(project, new_data, invoke):
    weights = {"name": "random:0", "sha256": "ab" * 32, "random": True}
    new_data(project / "random.h5", 6, weights=weights)
    arguments = ["--checkpoint", "runs/done", "--features", "random.h5", "--annotations", "random.json", "--dry-run"]
    assert "WARNING: random.h5" in invoke(evaluate_decoder, *arguments, status=1)
    output = invoke(evaluate_decoder, "--checkpoint", "runs/done", "--features", "features/test.h5", "--dry-run")
    assert "WARNING" not in output


def test_help_lists_flags_keys_and_examples(invoke):
    output = invoke(evaluate_decoder, "--help")
    for expected in ("--features", "--device", "train.device", "Examples:", evaluate_decoder.name):
        assert expected in output


def test_item_23_evaluation_from_another_folder_suggests_annotations(project, invoke, monkeypatch):
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    given = ("--checkpoint", project / "runs" / "done", "--features", project / "features" / "test.h5")
    output = invoke(evaluate_decoder, *given, status=1)
    assert "test.json: no such file" in output
    assert "pass --annotations FILE" in output


def test_item_19_beam_settings_are_rejected_when_captions_are_sampled(project, invoke):
    given = ("--checkpoint", "runs/done", "--features", "features/test.h5", "--decoding", "sample")
    assert "--beam-size: has no effect with" in invoke(evaluate_decoder, *given, "--beam-size", 4, status=2)
