import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import gridcap.train.engine.loop
from gridcap.common.config import load_config
from gridcap.train.cli import train_decoder
from gridcap.train.engine.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("no_java")


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_the_run_and_prints_a_summary(project):
    run = project / "runs" / "done"
    assert [row["epoch"] for row in logged(run)] == [1, 2]
    assert "val_cider" in logged(run)[0]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["output"] == "runs/done"
    assert load_checkpoint(run, "last").path.name == "step-00000006"
    output = (project / "train-output.txt").read_text()
    assert "configuration" in output
    assert "hidden_size=24" in output
    assert "18 images, 36 captions from train.json" in output
    assert "6 images, 12 captions from val.json" in output
    assert "done: runs/done: 2 epochs, best is epoch" in output


def test_captions_are_found_by_the_split_of_the_store(project, invoke):
    shutil.move("features/val.h5", "features/renamed.h5")
    output = invoke(
        train_decoder, "--val-features", "features/renamed.h5", "--epochs", 1, "--set", "train.learning_rate=0.02"
    )
    assert "renamed.h5: 6 images, 12 captions from val.json" in output
    assert load_checkpoint(project / "runs/a").config.train.learning_rate == 0.02


def test_captions_can_be_passed_without_a_configuration_file(project, invoke):
    (project / "pipeline.yaml").unlink()
    output = invoke(
        train_decoder,
        "--features",
        "features/train.h5",
        "--annotations",
        "train.json",
        "--val-features",
        "features/val.h5",
        "--val-annotations",
        "val.json",
        "--decoder",
        "lstm",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--output",
        "runs/flags",
        "--set",
        "train.decoder.hidden_size=16",
        "--set",
        "train.decoder.embed_size=8",
        "--set",
        "train.min_vocabulary=0",
    )
    assert "train.decoder.family=lstm" in output
    assert load_checkpoint(project / "runs/flags").config.train.decoder.family == "lstm"


def test_training_without_validation_store_prints_a_note(project, invoke):
    (project / "features" / "val.h5").unlink()
    shutil.rmtree(project / "features" / "val")
    output = invoke(train_decoder, "--epochs", 1)
    assert "no validation store" in output
    assert "done: runs/a: 1 epoch, best is epoch 1" in output
    assert "CIDEr" not in output.splitlines()[-1]


def test_dry_run_writes_nothing(project, invoke, files):
    before = files(project)
    output = invoke(train_decoder, "--dry-run", "--epochs", 7)
    assert "epochs: 7" in output
    assert "dry run: would train attention for 7 epochs into runs/a" in output
    assert files(project) == before
    assert not (project / "runs" / "a").exists()


def test_item_21_dry_run_checks_the_vocabulary(project, invoke):
    limit = ("--set", "train.min_vocabulary=20")
    output = invoke(train_decoder, "--dry-run", *limit, status=2)
    assert "fewer than 20 (train.min_vocabulary)" in output
    invoke(train_decoder, "--dry-run", *limit, "--init-from", "runs/done", "--scst")


def test_problems_in_the_captions_file_are_reported(project, invoke):
    tree = json.loads((project / "train.json").read_text())
    tree["images"].append({"id": 9999, "file_name": "9999.jpg"})
    tree["annotations"].append({"id": 800, "image_id": 9999, "caption": "a cat"})
    tree["annotations"].append({"id": 801, "image_id": 100, "caption": "  "})
    (project / "train.json").write_text(json.dumps(tree))
    output = invoke(train_decoder, "--dry-run")
    assert "1 x empty caption (annotation 801)" in output
    assert "1 image not in the feature store" in output


def test_captions_file_with_too_many_problems_is_rejected(project, invoke):
    tree = json.loads((project / "train.json").read_text())
    for annotation in tree["annotations"][::2]:
        annotation["caption"] = ""
    (project / "invalid.json").write_text(json.dumps(tree))
    for given in (["--annotations", "invalid.json"], ["--set", "data.splits.train.annotations=invalid.json"]):
        output = invoke(train_decoder, "--dry-run", *given, status=1)
        assert "invalid.json" in output
        assert "(limit 20%)" in output


def test_missing_captions_error_names_the_flag(project, new_data, invoke):
    (project / "pipeline.yaml").unlink()
    new_data(project / "odd.h5", 6, split="odd")
    output = invoke(train_decoder, "--features", "odd.h5", status=2)
    assert "no captions configured for its split 'odd'" in output
    assert "--annotations" in output
    output = invoke(
        train_decoder, "--features", "odd.h5", "--annotations", "odd.json", "--val-features", "odd.h5", status=2
    )
    assert "--val-annotations" in output


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--features", "nowhere.h5"], "nowhere.h5: no such file", 1),
        (["--annotations", "nowhere.json"], "nowhere.json: No such file", 1),
        (["--annotations", "val.json"], "no usable image in common", 1),
        (["--decoder", "transformer9"], "transformer9", 2),
        (["--epochs", "0"], "train.epochs", 2),
        (["--set", "train.learning_rte=1"], "did you mean train.learning_rate?", 2),
        (["--device", "cuda:99"], "cuda:99", 2),
    ],
)
def test_errors_in_the_arguments_write_nothing(project, arguments, message, status, invoke):
    assert message in invoke(train_decoder, *arguments, status=status)
    assert not (project / "runs" / "a").exists()


def test_validation_captions_require_validation_features(project, invoke):
    (project / "features" / "val.h5").unlink()
    assert "--val-features" in invoke(train_decoder, "--val-annotations", "val.json", status=2)


def test_second_run_in_the_same_output_suggests_resume(project, invoke):
    output = invoke(train_decoder, "--output", "runs/done", status=1)
    assert "already contains a run" in output
    assert "--resume" in output


def test_resume_uses_the_settings_of_the_run(project, invoke):
    (project / "pipeline.yaml").unlink()
    output = invoke(train_decoder, "--output", "runs/done", "--resume", "--epochs", 3)
    assert "hidden_size=24" in output
    assert [row["epoch"] for row in logged(project / "runs/done")] == [1, 2, 3]


def test_resume_with_another_learning_rate_is_rejected_by_name(project, invoke):
    output = invoke(train_decoder, "--output", "runs/done", "--resume", "--learning-rate", 0.5, status=1)
    assert "train.learning_rate: 0.01 then, 0.5 now" in output


def test_resume_without_a_run_is_an_error_and_writes_nothing(project, invoke):
    output = invoke(train_decoder, "--output", "runs/nothing", "--resume", status=1)
    assert "no run to resume in runs/nothing" in output
    assert not (project / "runs" / "nothing").exists()


def test_validation_can_be_added_on_resume(project, invoke):
    invoke(
        train_decoder, "--output", "runs/b", "--set", "data.features_dir=elsewhere", "--features", "features/train.h5"
    )
    output = invoke(train_decoder, "--output", "runs/b", "--resume", "--epochs", 3, "--val-features", "features/val.h5")
    assert "best is epoch 3, validation CIDEr" in output


def test_resume_starts_again_if_there_is_no_checkpoint_yet(project, invoke):
    folder = project / "runs" / "early"
    folder.mkdir(parents=True)
    shutil.copy(project / "runs/done/config.yaml", folder)
    assert "done: runs/early: 2 epochs" in invoke(train_decoder, "--output", "runs/early", "--resume")


def test_training_images_are_rejected_for_validation(project, invoke):
    output = invoke(train_decoder, "--output", "runs/x", "--val-features", "features/train.h5", status=1)
    assert "18 images in both features/train.h5 and features/train.h5" in output
    assert not (project / "runs" / "x").exists()


def test_training_seed_does_not_change_the_subset_of_the_store(project, invoke):
    """The subset was sampled at extraction; sampling again with another seed would drop a part of it."""
    tree = yaml.safe_load((project / "pipeline.yaml").read_text())
    tree["data"]["splits"]["val"]["limit"] = 3
    (project / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    output = invoke(train_decoder, "--output", "runs/x", "--seed", 9, "--dry-run")
    assert "features/val.h5: 6 images" in output


def test_karpathy_training_split_is_validated_on_karpathy_validation_split(project, new_data, invoke):
    for split, first in (("karpathy-train", 100), ("karpathy-val", 500)):
        new_data(project / "features" / f"{split}.h5", 6, first_id=first, split=split)
    output = invoke(
        train_decoder,
        "--features",
        "features/karpathy-train.h5",
        "--annotations",
        "features/karpathy-train.json",
        "--val-annotations",
        "features/karpathy-val.json",
        "--output",
        "runs/x",
        "--dry-run",
    )
    assert "features/karpathy-val.h5: 6 images" in output


def test_features_from_random_weights_cause_a_warning(project, new_data, invoke):
    new_data(project / "random.h5", 6, weights={"name": "random:0", "sha256": "ab" * 32, "random": True})
    output = invoke(
        train_decoder,
        "--features",
        "random.h5",
        "--annotations",
        "random.json",
        "--output",
        "runs/random",
        "--epochs",
        1,
        "--set",
        "data.features_dir=elsewhere",
    )
    assert "WARNING: random.h5 was extracted with random encoder weights" in output
    assert "WARNING: random.h5" not in (project / "train-output.txt").read_text()
    assert "random encoder weights" not in (project / "train-output.txt").read_text()


def test_help_lists_flags_keys_and_examples(invoke):
    output = invoke(train_decoder, "--help")
    assert "--features" in output
    assert "--device" in output
    assert "train.device" in output
    assert "Examples:" in output
    assert train_decoder.name in output


def test_help_lists_examples_and_recipes(invoke):
    output = invoke(train_decoder, "--help")
    examples = output.partition("Examples:")[2]
    for expected in ("--recipe top-down", "--init-from runs/mine --scst", "--resume", "show-and-tell, soft-attention"):
        assert expected in examples
    assert "torchrun --nproc-per-node 4 --no-python train-decoder" in examples, "otherwise, torchrun expects a script"
    assert not re.search(r"\bscst\b", examples.partition("Recipes:")[2]), "it is --scst"


# --- recipes ---

SMALL = ("--set", "train.decoder.embed_size=12", "--set", "train.decoder.hidden_size=16", "--epochs", 1)


def settings_of(run):
    return load_checkpoint(run).config.train


def test_recipe_overrides_the_file_except_for_paths_and_hardware(project, invoke):
    """The decoder, batch size, and learning rate of the file are replaced; its device and precision are kept."""
    recipe = load_config(None, {}, [], "show-and-tell").train
    invoke(train_decoder, "--recipe", "show-and-tell", *SMALL)
    settings = settings_of(project / recipe.output)
    assert (
        (settings.decoder.family, settings.decoder.image_injection)
        == (recipe.decoder.family, recipe.decoder.image_injection)
        != ("lstm", "")
    )
    assert settings.batch_size == recipe.batch_size != 8
    assert (settings.device, settings.precision) == ("cpu", "float32")


def test_flags_override_a_recipe(project, invoke):
    output = invoke(
        train_decoder,
        "--recipe",
        "show-and-tell",
        "--batch-size",
        7,
        "--learning-rate",
        0.25,
        "--output",
        "runs/r",
        "--set",
        "train.captions_per_image=3",
        *SMALL,
        "--dry-run",
    )
    for expected in ("batch_size: 7", "learning_rate: 0.25", "captions_per_image: 3", "hidden_size: 16"):
        assert expected in output
    assert "would train lstm for 1 epoch into runs/r" in output


def test_recipe_can_be_a_file(project, invoke):
    recipe = {"train": {"decoder": {"family": "lstm", "hidden_size": 20, "embed_size": 10}, "epochs": 1}}
    (project / "mine.yaml").write_text(yaml.safe_dump(recipe))
    invoke(train_decoder, "--recipe", "mine.yaml")
    settings = settings_of(project / "runs" / "mine")
    assert (settings.decoder.family, settings.decoder.hidden_size, settings.epochs) == ("lstm", 20, 1)
    assert settings.batch_size == 10, "recipe settings of the file are not mixed in"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("top-donw", "did you mean top-down?"),
        ("zzz", "recipes: att2in"),
        ("nowhere.yaml", "no such recipe or file"),
        ("pipeline.yaml", "a recipe contains only the section train"),
    ],
)
def test_unknown_recipe_error_lists_the_recipes(project, recipe, message, invoke):
    assert message in invoke(train_decoder, "--recipe", recipe, status=2)
    assert not (project / "runs" / "a").exists()


def test_run_of_a_recipe_resumes_with_or_without_the_recipe(project, invoke):
    run = load_config(None, {}, [], "show-and-tell").train.output
    invoke(train_decoder, "--recipe", "show-and-tell", *SMALL)
    for epochs, again in ((2, ["--output", run]), (3, ["--recipe", "show-and-tell"])):
        invoke(train_decoder, *again, "--resume", "--epochs", epochs)
        assert logged(project / run)[-1]["epoch"] == epochs


# --- init_from ---


def test_init_from_takes_decoder_vocabulary_and_max_length(project, invoke):
    invoke(
        train_decoder,
        "--output",
        "runs/small",
        "--set",
        "train.decoder.hidden_size=10",
        "--epochs",
        1,
        "--set",
        "train.vocabulary.max_size=9",
        "--set",
        "train.max_length=5",
    )
    output = invoke(train_decoder, "--init-from", "runs/small", "--output", "runs/on", "--epochs", 1)
    assert "hidden_size=10" in output
    loaded = load_checkpoint(project / "runs/on")
    assert loaded.config.train.decoder == settings_of(project / "runs/small").decoder
    assert loaded.config.train.max_length == 5
    assert loaded.vocabulary.tokens == load_checkpoint(project / "runs/small").vocabulary.tokens
    assert len(loaded.vocabulary) == 9
    assert [row["epoch"] for row in logged(project / "runs/on")] == [0, 1]


def test_then_scst_continues_the_finished_run(project, invoke):
    sets = ("--set", "train.scst.samples=3", "--epochs", 1)
    output = invoke(train_decoder, "--then-scst", *sets)
    assert output.index("done: runs/a: 1 epoch") < output.index("done: runs/a-scst: 6 epochs")
    first, second = settings_of(project / "runs" / "a"), settings_of(project / "runs" / "a-scst")
    assert (first.objective, first.init_from) == ("cross-entropy", None)
    assert (second.objective, second.init_from, second.epochs) == ("scst", Path("runs/a"), 6)
    assert (second.scst.samples, second.scst.temperature) == (3, 0.5), "the recipe, and the command line"
    assert second.decoder == first.decoder
    assert "already complete" in invoke(train_decoder, "--then-scst", "--resume", *sets)


def test_then_scst_is_checked_before_training(project, invoke):
    assert "the run itself trains with SCST" in invoke(
        train_decoder, "--then-scst", "--scst", "--init-from", "runs/done", status=2
    )
    (project / "runs" / "a-scst").mkdir()
    assert "runs/a-scst: already exists" in invoke(train_decoder, "--then-scst", status=1)
    assert not (project / "runs" / "a").exists()


@pytest.mark.parametrize("of_the_run", [True, False])
def test_scst_run_is_written_next_to_its_source(project, of_the_run, invoke, files):
    source = "runs/done" if of_the_run else load_checkpoint(project / "runs/done").path.relative_to(project)
    before = files(project / "runs" / "done")
    output = invoke(train_decoder, "--init-from", source, "--scst", "--epochs", 1)
    assert "objective=scst" in output
    assert "hidden_size=24" in output, "the decoder of the source run"
    assert "done: runs/done-scst: 1 epoch," in output
    assert {path.name for path in (project / "runs").iterdir()} == {"done", "done-scst"}
    assert files(project / "runs" / "done") == before
    rows = logged(project / "runs" / "done-scst")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert "reward" in rows[1]


def test_scst_temperature_is_applied(project, invoke):
    cold = ("--set", "train.scst.temperature=1e-4")
    invoke(train_decoder, "--init-from", "runs/done", "--scst", "--epochs", 1, *cold)
    row = logged(project / "runs" / "done-scst")[1]
    assert row["advantage"] < 0.01, "all samples equal the greedy caption"


def test_scst_output_can_be_set(project, invoke):
    invoke(train_decoder, "--init-from", "runs/done", "--scst", "--epochs", 1, "--output", "runs/custom")
    assert settings_of(project / "runs" / "custom").objective == "scst"
    assert not (project / "runs" / "done-scst").exists()


def test_scst_run_resumes_with_the_same_command(project, invoke):
    command = ["--init-from", "runs/done", "--scst"]
    invoke(train_decoder, *command, "--epochs", 1)
    assert "nothing to do" in invoke(train_decoder, *command, "--resume")
    assert [row["epoch"] for row in logged(project / "runs" / "done-scst")] == [0, 1]


def test_summary_says_if_no_epoch_improved(project, monkeypatch, invoke):
    ciders = iter([0.9, 0.1])
    monkeypatch.setattr("gridcap.train.engine.validation.cider", lambda *_: next(ciders))
    output = invoke(train_decoder, "--init-from", "runs/done", "--scst", "--epochs", 1)
    assert "best is epoch 0, validation CIDEr 0.900" in output
    assert "no epoch improved on the initial decoder (runs/done), which is kept as the best" in output
    assert "try --set train.scst.temperature=0.25, or --learning-rate 0.0001" in output


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--scst", "--recipe", "top-down", "--init-from", "runs/done"], "--scst and --recipe each select a recipe", 2),
        (["--scst"], "SCST (--scst) starts from a trained decoder, but --init-from (init_from) is not given", 2),
        (["--scst", "--output", "runs/done"], "SCST (--scst) starts from a trained decoder", 2),
        (["--scst", "--features", "nowhere.h5"], "SCST (--scst) starts from a trained decoder", 2),
        (["--scst", "--init-from", "runs/nowhere"], "runs/nowhere: no such folder", 1),
        (["--init-from", "features"], "features: contains no checkpoint", 1),
    ],
)
def test_invalid_init_from_is_rejected_and_nothing_is_written(project, arguments, message, status, invoke, files):
    before = files(project)
    assert message in invoke(train_decoder, *arguments, status=status)
    assert files(project) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.scst.samples=3"], "--set train.scst.samples=3: has no effect without SCST"),
        (
            ["--scst", "--init-from", "runs/done", "--set", "train.label_smoothing=0.1"],
            "--set train.label_smoothing=0.1: has no effect with SCST",
        ),
        (
            ["--set", "data.splits.train.limit=3"],
            "--set data.splits.train.limit=3: has no effect after feature extraction",
        ),
        (["--set", "data.splits.val.skip=3"], "--set data.splits.val.skip=3: has no effect after feature extraction"),
    ],
)
def test_item_19_settings_without_effect_are_rejected_and_nothing_is_written(
    project, arguments, message, invoke, files
):
    before = files(project)
    assert message in invoke(train_decoder, *arguments, status=2)
    assert files(project) == before


# --- end of a run ---


def test_summary_reports_early_stopping(project, monkeypatch, invoke):
    ciders = iter([0.5, 0.4])
    monkeypatch.setattr("gridcap.train.engine.validation.cider", lambda *_: next(ciders))
    output = invoke(train_decoder, "--epochs", 9, "--patience", 1)
    assert "done: runs/a: 2 epochs, best is epoch 1 (stopped: validation CIDEr did not improve for 1 epoch)" in output
    assert "curves: runs/a/curves.png" in output


def test_ctrl_c_prints_how_to_resume_and_resuming_works(project, monkeypatch, invoke):
    real = gridcap.train.engine.loop.train_step

    def interrupt(self, run, *args):
        if run.step == 4:
            raise KeyboardInterrupt
        return real(self, run, *args)

    with monkeypatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.train_step", interrupt)
        done = CliRunner().invoke(train_decoder, ["--checkpoint-steps", "1"])
    assert done.exit_code == 130
    assert "rerun the command with --resume to continue" in done.output
    assert load_checkpoint(project / "runs/a", "last").path.name == "step-00000004"
    assert "done: runs/a: 2 epochs" in invoke(train_decoder, "--checkpoint-steps", 1, "--resume")
    assert [row["step"] for row in logged(project / "runs/a")] == [3, 6]


def test_batch_size_smaller_than_accumulation_steps_is_a_usage_error(project, invoke):
    assert "--batch-size 2" in invoke(train_decoder, "--batch-size", 2, "--grad-accum-steps", 3, status=2)
    assert not (project / "runs" / "a").exists()


HOLD_LEASE = """
import sys
from pathlib import Path
from pathlib import Path
from gridcap.common.lease import exclusive_folder
with exclusive_folder(Path("runs/a"), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_item_01_second_trainer_in_the_same_output_is_rejected(project, invoke):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD_LEASE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        output = invoke(train_decoder, status=1)
        assert f"runs/a: in use by process {first.pid}" in output
        assert not (project / "runs" / "a" / "config.yaml").exists()
    finally:
        first.kill()
        first.communicate()
    output = invoke(train_decoder, "--epochs", 1)
    assert f"taking over from process {first.pid}" in output
    assert "done: runs/a" in output


def test_item_25_resume_auto_starts_or_resumes(project, invoke):
    output = invoke(train_decoder, "--resume", "auto", "--epochs", 1)
    assert "--resume auto: starting a new run in runs/a" in output
    output = invoke(train_decoder, "--resume", "auto", "--epochs", 2)
    assert "--resume auto: resuming the run in runs/a" in output
    assert [row["epoch"] for row in logged(project / "runs/a")] == [1, 2]


def test_item_25_slurm_job_resumes_by_default(project, monkeypatch, invoke):
    assert "already contains a run" in invoke(train_decoder, "--output", "runs/done", status=1), "not a Slurm job"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    output = invoke(train_decoder, "--output", "runs/done", "--epochs", 3)
    assert "--resume auto: resuming the run in runs/done" in output
    assert "already contains a run" in invoke(train_decoder, "--output", "runs/done", "--resume", "no", status=1)
