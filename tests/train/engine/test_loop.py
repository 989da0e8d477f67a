import gc
import json
import math
import re
import threading

import pytest
import torch

import gridcap.train.engine.loop as train_loop
from gridcap.common.captions.records import ImageRecord
from gridcap.common.errors import CheckpointError, MismatchError, TrainingError, UserError
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.engine.checkpoint import find_checkpoint, load_checkpoint, load_training_state
from gridcap.train.engine.job import Runtime
from gridcap.train.engine.loop import fit
from gridcap.train.engine.validation import validate


def timeless(history):
    """Return the rows without measured times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in history]


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights_of(output, which="last"):
    return load_checkpoint(output, which).decoder.state_dict()


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(config, data, val=None, resume=False):
    return fit(config, data, val, resume, progress=False)


# --- learning ---


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_training_reduces_loss_and_produces_correct_captions(
    tmp_path, family, new_config, tiny_decoders, train_data, val_data
):
    config = new_config(tmp_path / "run", epochs=9, batch_size=3, decoder=tiny_decoders[family], learning_rate=0.02)
    history = train(config, train_data, val_data)
    assert history[-1]["train_loss"] < 0.4 * history[0]["train_loss"]
    decoder, vocabulary = load_checkpoint(tmp_path / "run").decoder, load_checkpoint(tmp_path / "run").vocabulary
    for data in (train_data, val_data):
        grids = torch.from_numpy(data.store.rows(data.rows)).float().reshape(len(data), 4, 8)
        for hypothesis, captions in zip(beam_search(decoder, grids, BeamOptions(1, 8)), data.captions, strict=True):
            _, color, shape = captions[0].split()
            right = {f"a {color} {shape}", f"a {shape} that is {color}", f"one {color} {shape} here"}
            assert vocabulary.decode(hypothesis.tokens) in right
    assert history[-1]["val_cider"] > history[0]["val_cider"]


def test_one_row_per_epoch_is_returned_and_logged(tmp_path, new_config, train_data, val_data):
    history = train(new_config(tmp_path / "run", epochs=2), train_data, val_data)
    assert [row["epoch"] for row in history] == [1, 2]
    for row in history:
        assert set(row) - {"warnings"} == {
            "epoch",
            "step",
            "train_loss",
            "val_loss",
            "val_perplexity",
            "val_cider",
            "val_duplicate_share",
            "val_attention_entropy",
            "seconds",
            "data_wait",
        }
        assert row["step"] == 5 * row["epoch"]
        assert row["val_duplicate_share"] == 0 or 2 / 9 <= row["val_duplicate_share"] <= 1
        assert any("got the same caption" in text for text in row.get("warnings", [])) == (
            row["val_duplicate_share"] > 0.3
        )
        assert 0 < row["val_attention_entropy"] <= 1
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        assert 0 <= row["data_wait"] <= 1
    assert logged(tmp_path / "run") == history


def test_initial_loss_is_close_to_uniform_prediction(tmp_path, new_config, train_data):
    history = train(new_config(tmp_path / "run", epochs=1, learning_rate=1e-9, batch_size=24), train_data)
    size = len(load_checkpoint(tmp_path / "run").vocabulary)
    assert history[0]["train_loss"] == pytest.approx(math.log(size), abs=0.5), "nats per token"


def test_best_checkpoint_has_highest_cider_then_lowest_loss(tmp_path, monkeypatch, new_config, train_data, val_data):
    ciders = iter([0.1, 0.7, 0.7, 0.3])
    monkeypatch.setattr("gridcap.train.engine.validation.cider", lambda *_: next(ciders))
    history = train(new_config(tmp_path / "run", epochs=4), train_data, val_data)
    best = min(history[1:3], key=lambda row: row["val_loss"])["step"]
    assert find_checkpoint(tmp_path / "run", "best").name == f"step-{best:08}"
    assert find_checkpoint(tmp_path / "run", "last").name == "step-00000020"


def test_last_checkpoint_is_best_without_validation(tmp_path, new_config, train_data):
    history = train(new_config(tmp_path / "run", epochs=3), train_data)
    assert all(set(row) == {"epoch", "step", "train_loss", "seconds", "data_wait"} for row in history)
    assert find_checkpoint(tmp_path / "run", "best").name == "step-00000015"


def test_vocabulary_excludes_words_of_validation_captions(tmp_path, new_config, train_data, new_store):
    grids = train_data.store.rows(range(3))
    records = [ImageRecord(900 + i, f"{900 + i}.jpg", ("a purple square",)) for i in range(3)]
    store = new_store(tmp_path / "val.h5", grids, [900, 901, 902])
    val = CaptionedImages.join(store, records, tmp_path / "v.json")
    train(new_config(tmp_path / "run", epochs=1), train_data, val)
    words = load_checkpoint(tmp_path / "run").vocabulary.tokens
    assert "purple" not in words
    assert {"red", "green", "blue", "circle", "here"} <= set(words)


def test_vocabulary_settings_are_applied(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1, vocabulary={"max_size": 6}), train_data)
    assert len(load_checkpoint(tmp_path / "run").vocabulary) == 6


def test_validation_does_not_change_training(tmp_path, new_config, train_data, val_data):
    with_it = train(new_config(tmp_path / "a", epochs=3), train_data, val_data)
    without = train(new_config(tmp_path / "b", epochs=3), train_data)
    assert [row["train_loss"] for row in with_it] == [row["train_loss"] for row in without]
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_validation_loss_covers_all_references_at_any_batch_size(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    loaded = load_checkpoint(tmp_path / "run")
    results = [
        validate(
            loaded.decoder,
            val_data,
            loaded.vocabulary,
            new_config(tmp_path / "run", batch_size=size).train,
            Runtime(torch.device("cpu")),
        )
        for size in (1, 4, 50)
    ]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    total, num_tokens = 0.0, 0
    for image, captions in enumerate(val_data.captions):
        grid = torch.from_numpy(val_data.store[int(val_data.rows[image])]).float().reshape(1, 4, 8)
        for text in captions:
            tokens = torch.tensor(loaded.vocabulary.encode(text, 8))
            with torch.no_grad():
                logits = loaded.decoder(loaded.decoder.encode(grid), tokens[None, None, :-1])[0][0, 0]
            total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
            num_tokens += len(tokens) - 1
    assert results[0]["val_loss"] == pytest.approx(total / num_tokens, rel=1e-5)


@pytest.mark.parametrize("max_grad_norm", [5.0, 0.575])
def test_step_equals_adam_on_clipped_gradient_of_mean_token_loss(
    tmp_path, max_grad_norm, new_config, tiny_decoders, train_data
):
    decoder_config = tiny_decoders["attention"].model_copy(update={"dropout": 0.0})
    config = new_config(
        tmp_path / "run",
        epochs=4,
        batch_size=24,
        captions_per_image=3,
        decoder=decoder_config,
        max_grad_norm=max_grad_norm,
    )
    train(config, train_data)
    loaded = load_checkpoint(tmp_path / "run")
    torch.manual_seed(config.seed)
    decoder = build_decoder(decoder_config, len(loaded.vocabulary), (2, 2, 8))
    adam = torch.optim.Adam(decoder.parameters(), 0.01)
    grids = torch.from_numpy(train_data.store.rows(train_data.rows)).float().reshape(24, 4, 8)
    norms = []
    for _ in range(4):
        losses = []
        for grid, captions in zip(grids, train_data.captions, strict=True):
            for text in captions:
                tokens = torch.tensor(loaded.vocabulary.encode(text, 8))
                logits = decoder(decoder.encode(grid[None]), tokens[None, None, :-1])[0][0, 0]
                losses += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), max_grad_norm).item())
        adam.step()
    assert max_grad_norm == 5 > max(norms) or norms[3] < max_grad_norm < norms[0], f"nothing is clipped: {norms}"
    ours, expected = dict(loaded.decoder.named_parameters()), dict(decoder.named_parameters())
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_bfloat16_training_keeps_float32_weights(tmp_path, family, new_config, tiny_decoders, train_data, val_data):
    config = new_config(tmp_path / "run", epochs=3, precision="bfloat16", decoder=tiny_decoders[family])
    history = train(config, train_data, val_data)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert {value.dtype for value in weights_of(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_grid_is_projected_once_for_all_captions(tmp_path, family, new_config, tiny_decoders, train_data):
    config = new_config(tmp_path / "run", epochs=1, captions_per_image=3, decoder=tiny_decoders[family])
    projected = []
    kind = type(build_decoder(config.train.decoder, 9, (2, 2, 8)))
    with pytest.MonkeyPatch.context() as patch:
        real = kind._project
        patch.setattr(kind, "_project", lambda self, grid: (projected.append(tuple(grid.shape)), real(self, grid))[1])
        train(config, train_data)
    assert projected == [(5, 4, 8)] * 4 + [(4, 4, 8)]


def test_interrupted_epoch_leaves_no_thread(tmp_path, new_config, train_data, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gridcap.train.objectives.cross_entropy.smoothed_cross_entropy", interrupt)
    try:
        train(new_config(tmp_path / "run"), train_data)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("was not interrupted")
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# --- reproducibility ---


def test_weights_depend_only_on_the_seed(tmp_path, new_config, train_data):
    a, b, other = (
        train(new_config(tmp_path / name, seed=seed), train_data) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert timeless(a) == timeless(b) != timeless(other)
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


def test_incomplete_training_state_is_rejected_by_name(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    torch.save({"another": "file"}, find_checkpoint(tmp_path / "run") / "training_state.pt")
    with pytest.raises(CheckpointError, match="step-00000005"):
        train(new_config(tmp_path / "run"), train_data, resume=True)


def test_item_16_running_out_of_memory_on_resume_is_not_blamed_on_the_checkpoint(
    tmp_path, new_config, train_data, monkeypatch
):
    def exhaust(*_):
        raise RuntimeError("CUDA error: out of memory")

    train(new_config(tmp_path / "run", epochs=1), train_data)
    monkeypatch.setattr("gridcap.train.engine.state.RunState.load_training_state", exhaust)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(new_config(tmp_path / "run"), train_data, resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path, new_config, train_data):
    config = new_config(tmp_path / "run", epochs=1)
    history = train(config, train_data)
    before = weights_of(tmp_path / "run")
    assert train(config, train_data, resume=True) == history == logged(tmp_path / "run")
    assert same_bits(before, weights_of(tmp_path / "run"))


def test_moved_run_can_be_resumed(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "old", epochs=1), train_data)
    (tmp_path / "old").rename(tmp_path / "new")
    history = train(new_config(tmp_path / "new", epochs=2), train_data, resume=True)
    assert [row["epoch"] for row in history] == [1, 2]


# --- rejected inputs ---


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 0.5}, r"train\.learning_rate: 0\.01 then, 0\.5 now"),
        ({"batch_size": 3}, r"train\.batch_size: 5 then, 3 now"),
        ({"seed": 8}, r"seed: 0 then, 8 now"),
        ({"captions_per_image": 1}, r"train\.captions_per_image"),
        ({"vocabulary": {"min_count": 2}}, r"train\.vocabulary"),
    ],
)
def test_resume_with_other_settings_is_rejected_by_name(tmp_path, new_config, train_data, changed, named):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(MismatchError, match=named):
        train(new_config(tmp_path / "run", **changed), train_data, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_resume_with_another_decoder_is_rejected(tmp_path, new_config, train_data, tiny_decoders):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    with pytest.raises(MismatchError) as caught:
        train(new_config(tmp_path / "run", decoder=tiny_decoders["lstm"]), train_data, resume=True)
    assert caught.value.message.endswith("configuration: train.decoder.family: 'attention' then, 'lstm' now")
    wider = tiny_decoders["attention"].model_copy(update={"dropout": 0.25})
    with pytest.raises(MismatchError) as caught:
        train(new_config(tmp_path / "run", decoder=wider), train_data, resume=True)
    assert re.search(r"configuration: train\.decoder\.dropout: [0-9.]+ then, 0\.25 now$", caught.value.message)


def test_resume_with_other_features_is_rejected_with_the_difference(tmp_path, new_config, train_data, new_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    other = new_data(tmp_path / "other.h5", encoder="resnet50")
    with pytest.raises(MismatchError, match=r"inception_v3.*resnet50"):
        train(new_config(tmp_path / "run"), other, resume=True)


def test_second_run_in_the_same_output_is_rejected_without_side_effects(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="already contains a run") as caught:
        train(new_config(tmp_path / "run", seed=2), train_data)
    assert "--resume" in caught.value.hint
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_resume_without_a_run_is_rejected_and_nothing_is_written(tmp_path, new_config, train_data):
    with pytest.raises(CheckpointError, match="no such folder"):
        train(new_config(tmp_path / "nowhere"), train_data, resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_validation_features_with_other_provenance_are_rejected(tmp_path, new_config, train_data, new_data):
    val = new_data(tmp_path / "other.h5", 6, weights={"name": "other", "sha256": "ff" * 32, "random": False})
    with pytest.raises(MismatchError, match=r"weights: .*0cc3c7bd.*ffffffff"):
        train(new_config(tmp_path / "run"), train_data, val)
    assert not (tmp_path / "run").exists()


def test_validation_features_may_come_from_other_library_versions(tmp_path, new_config, train_data, new_data):
    val = new_data(tmp_path / "other.h5", 6, 500, versions={"torch": "2.9.9"}, precision="bfloat16")
    assert len(train(new_config(tmp_path / "run", epochs=1), train_data, val)) == 1


@pytest.fixture
def nan_steps(monkeypatch):
    """Return a function that makes every optimizer step after the first good ones set all weights to NaN."""

    def call(good_steps=0):
        real, left = torch.optim.Adam.step, [good_steps]

        def step(optimizer, *args):
            real(optimizer, *args)
            left[0] -= 1
            if left[0] < 0:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.data.fill_(torch.nan)

        monkeypatch.setattr(torch.optim.Adam, "step", step)

    return call


def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, new_config, train_data, nan_steps):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    good = weights_of(tmp_path / "run")
    nan_steps()
    with pytest.raises(TrainingError, match=r"became NaN or inf \(epoch 2") as caught:
        train(new_config(tmp_path / "run", epochs=5), train_data, resume=True)
    assert caught.value.exit_status == 1
    assert same_bits(good, weights_of(tmp_path / "run"))
    assert [row["epoch"] for row in logged(tmp_path / "run")] == [1]


def test_huge_learning_rate_raises_training_error(tmp_path, new_config, train_data):
    with pytest.raises(TrainingError, match="became NaN or inf"):
        train(new_config(tmp_path / "run", learning_rate=1e30), train_data)


def test_nan_weights_after_the_last_step_of_an_epoch_are_not_saved(tmp_path, new_config, train_data, nan_steps):
    config = new_config(tmp_path / "run", epochs=1, batch_size=24)
    nan_steps()
    with pytest.raises(TrainingError, match="became NaN or inf"):
        train(config, train_data)
    assert not (tmp_path / "run" / "checkpoints.json").exists()


def test_diverged_validation_loss_does_not_crash(tmp_path, new_config, train_data, val_data):
    history = train(new_config(tmp_path / "run", learning_rate=1e4, epochs=1), train_data, val_data)
    assert history[0]["val_loss"] > 710, "exp overflows"
    assert history[0]["val_perplexity"] in (math.inf, None)
    assert len(logged(tmp_path / "run")) == 1


def test_hint_for_a_diverged_run_is_valid(tmp_path, new_config, train_data):
    with pytest.raises(TrainingError) as caught:
        train(new_config(tmp_path / "run", learning_rate=1e30), train_data)
    assert "resume" not in caught.value.hint, "resuming with another learning rate is rejected"


def test_validation_added_on_resume_selects_the_best(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=3), train_data)
    history = train(new_config(tmp_path / "run", epochs=5), train_data, val_data, resume=True)
    by_cider = max(history[3:], key=lambda row: row["val_cider"])
    assert find_checkpoint(tmp_path / "run", "best").name == f"step-{by_cider['step']:08}"


def test_validation_omitted_on_resume_keeps_the_best_by_cider(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=2), train_data, val_data)
    best = find_checkpoint(tmp_path / "run", "best").name
    train(new_config(tmp_path / "run", epochs=5), train_data, resume=True)
    assert find_checkpoint(tmp_path / "run", "best").name == best


def test_nan_loss_stops_the_run_within_20_steps(tmp_path, new_config, train_data, nan_steps):
    nan_steps(good_steps=5)
    config = new_config(tmp_path / "run", batch_size=1, epochs=3, checkpoint_steps=4)
    with pytest.raises(TrainingError, match=r"epoch 1, step (\d+)") as caught:
        train(config, train_data)
    assert 6 <= int(caught.value.message.rpartition("step ")[2].rstrip(")")) <= 20
    assert load_checkpoint(tmp_path / "run", "last").path.name == "step-00000004"
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


def test_nan_weights_are_detected_before_a_checkpoint_is_written(tmp_path, new_config, train_data, nan_steps):
    nan_steps(good_steps=5)
    with pytest.raises(TrainingError, match="step 6"):
        train(new_config(tmp_path / "run", batch_size=1, checkpoint_steps=1), train_data)
    assert find_checkpoint(tmp_path / "run", "last").name == "step-00000005"


# --- early stopping ---


def scripted(monkeypatch, ciders):
    """Make successive validations return these CIDEr values."""
    left = iter(ciders)
    monkeypatch.setattr("gridcap.train.engine.validation.cider", lambda *_: next(left))


def test_training_stops_when_patience_runs_out(tmp_path, monkeypatch, new_config, train_data, val_data):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.45, 0.9, 0.9])
    history = train(new_config(tmp_path / "run", epochs=6, patience=2), train_data, val_data)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert find_checkpoint(tmp_path / "run", "best").name == "step-00000010"
    assert find_checkpoint(tmp_path / "run", "last").name == "step-00000020"
    before = (tmp_path / "run" / "checkpoints.json").read_bytes()
    again = train(new_config(tmp_path / "run", epochs=6, patience=2), train_data, val_data, resume=True)
    assert again == history, "resuming finds that patience has run out"
    assert (tmp_path / "run" / "checkpoints.json").read_bytes() == before


def test_improvement_resets_patience(tmp_path, monkeypatch, new_config, train_data, val_data):
    scripted(monkeypatch, [0.1, 0.05, 0.2, 0.15, 0.3])
    assert len(train(new_config(tmp_path / "run", epochs=5, patience=2), train_data, val_data)) == 5


def test_patience_can_be_raised_on_resume(tmp_path, monkeypatch, new_config, train_data, val_data):
    scripted(monkeypatch, [0.5, 0.4, 0.6])
    assert len(train(new_config(tmp_path / "run", epochs=3, patience=1), train_data, val_data)) == 2
    assert len(train(new_config(tmp_path / "run", epochs=3, patience=3), train_data, val_data, resume=True)) == 3


def test_patience_has_no_effect_without_validation(tmp_path, new_config, train_data):
    assert len(train(new_config(tmp_path / "run", epochs=3, patience=1), train_data)) == 3


# --- EMA ---


def test_ema_weights_are_saved_and_validated_and_raw_weights_are_in_the_training_state(
    tmp_path, new_config, train_data, val_data
):
    averaged = train(new_config(tmp_path / "ema", epochs=2, ema_decay=0.9), train_data, val_data)
    plain = train(new_config(tmp_path / "plain", epochs=2), train_data, val_data)
    assert [r["train_loss"] for r in averaged] == [r["train_loss"] for r in plain], (
        "EMA does not change the training steps"
    )
    assert [r["val_loss"] for r in averaged] != [r["val_loss"] for r in plain]
    raw = load_training_state(find_checkpoint(tmp_path / "ema", "last"))["weights"]
    assert same_bits(raw, weights_of(tmp_path / "plain"))
    assert not same_bits(raw, weights_of(tmp_path / "ema"))
    assert load_training_state(find_checkpoint(tmp_path / "plain", "last"))["weights"] is None
    loaded, settings = load_checkpoint(tmp_path / "ema", "last"), new_config(tmp_path).train
    results = validate(loaded.decoder, val_data, loaded.vocabulary, settings, Runtime(torch.device("cpu")))
    assert results == {name: value for name, value in averaged[-1].items() if name.startswith("val_")}


def test_saved_ema_averages_the_weights_after_each_step(tmp_path, new_config, train_data):
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.optim.Adam.step

        def step(optimizer, *args):
            real(optimizer, *args)
            steps.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

        patch.setattr(torch.optim.Adam, "step", step)
        config = new_config(tmp_path / "run", epochs=1, ema_decay=0.5)
        train(config, train_data)
    kept = load_checkpoint(tmp_path / "run", "last")
    torch.manual_seed(config.seed)
    expected = [p.detach() for p in build_decoder(config.train.decoder, len(kept.vocabulary), (2, 2, 8)).parameters()]
    for number, weights in enumerate(steps, 1):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights, strict=True)]
    assert len(steps) == 5
    torch.testing.assert_close(list(kept.decoder.parameters()), expected)


# --- init_from ---


@pytest.fixture
def start(tmp_path, new_config, train_data):
    """A run with a vocabulary of 9 tokens to start from."""
    train(new_config(tmp_path / "start", epochs=4, seed=5, vocabulary={"max_size": 9}), train_data)
    return tmp_path / "start"


def test_init_from_takes_decoder_and_vocabulary_and_validates_them_first(
    tmp_path, new_config, train_data, val_data, start
):
    config = new_config(tmp_path / "run", init_from=start, epochs=2)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = train_loop.validate
        patch.setattr(
            "gridcap.train.engine.loop.validate", lambda decoder, *a: (seen.append(bits(decoder)), real(decoder, *a))[1]
        )
        history = train(config, train_data, val_data)
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert [row["step"] for row in history] == [0, 5, 10]
    assert not {"train_loss", "seconds"} & history[0].keys()
    assert same_bits(seen[0], weights_of(start)), "validated before the first step"
    assert not same_bits(seen[1], seen[0])
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.vocabulary.tokens == load_checkpoint(start).vocabulary.tokens
    assert len(loaded.vocabulary) == 9
    assert logged(tmp_path / "run") == history


def bits(decoder):
    return {name: value.clone() for name, value in decoder.state_dict().items()}


def test_no_epoch_0_without_validation(tmp_path, new_config, train_data, start):
    history = train(new_config(tmp_path / "run", init_from=start, epochs=1, learning_rate=1e-12), train_data)
    assert [row["epoch"] for row in history] == [1]
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(start), atol=1e-9, rtol=0)


def test_initial_decoder_stays_best_if_no_epoch_improves_on_it(
    tmp_path, monkeypatch, new_config, train_data, val_data, start, capsys
):
    scripted(monkeypatch, [0.8, 0.3, 0.5])
    config = new_config(tmp_path / "run", init_from=start, epochs=2)
    fit(config, train_data, val_data, False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert "before the first step" in lines[0]
    assert "CIDEr 0.300 (below the initial 0.800)" in lines[1]
    assert "CIDEr 0.500 (below the initial 0.800)" in lines[2]
    assert find_checkpoint(tmp_path / "run", "best").name == "step-00000000"
    assert same_bits(weights_of(tmp_path / "run", "best"), weights_of(start))


def test_improving_run_reports_the_best_epoch(tmp_path, monkeypatch, new_config, train_data, val_data, start, capsys):
    scripted(monkeypatch, [0.3, 0.8, 0.5])
    fit(new_config(tmp_path / "run", init_from=start, epochs=2), train_data, val_data, False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["(best so far)" in line for line in lines] == [True, True, False]
    assert "below" not in "".join(lines)
    assert find_checkpoint(tmp_path / "run", "best").name == "step-00000005"


def test_validation_added_on_mid_run_resume_adds_no_epoch_0(tmp_path, new_config, train_data, val_data, start):
    config = new_config(tmp_path / "run", init_from=start, epochs=1, checkpoint_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.check_finite", stop_at_step(3))
        with pytest.raises(KeyboardInterrupt):
            train(config.model_copy(), train_data)
    history = train(config, train_data, val_data, resume=True)
    assert [row["epoch"] for row in history] == [1]
    assert load_checkpoint(tmp_path / "run", "best").path.name == "step-00000005"


def stop_at_step(step):
    def check(job, run, stats):
        if run.step >= step:
            raise KeyboardInterrupt

    return check


def test_init_from_with_another_decoder_is_rejected(tmp_path, new_config, train_data, tiny_decoders, start):
    config = new_config(tmp_path / "run", init_from=start, decoder=tiny_decoders["lstm"])
    with pytest.raises(MismatchError, match="its decoder differs"):
        train(config, train_data)
    assert not (tmp_path / "run").exists()


def test_init_from_with_other_features_is_rejected(tmp_path, new_config, new_data, start):
    other = new_data(tmp_path / "other.h5", encoder="resnet50")
    with pytest.raises(MismatchError, match=r"inception_v3.*resnet50"):
        train(new_config(tmp_path / "run", init_from=start), other)
    assert not (tmp_path / "run").exists()


def test_scst_requires_init_from(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    for output in ("run", "new"):  # takes precedence over "already contains a run"
        with pytest.raises(UserError, match=r"--scst.*starts from a trained decoder, but --init-from") as caught:
            train(new_config(tmp_path / output, objective="scst"), train_data)
        assert "--init-from" in caught.value.hint
    assert not (tmp_path / "new").exists()


def test_scst_increases_the_reward(tmp_path, new_config, train_data, val_data, start):
    config = new_config(
        tmp_path / "run", init_from=start, objective="scst", epochs=6, learning_rate=0.005, captions_per_image=3
    )
    history = train(config, train_data, val_data)
    assert history[-1]["reward"] > history[1]["reward"] + 0.3
    for row in history[1:]:
        assert row["baseline"] == pytest.approx(row["reward"], rel=1e-4), "the mean baseline equals the mean reward"
        assert row["advantage"] >= 0
        assert "train_loss" not in row


# --- logs and curves ---


def test_run_writes_curves_and_valid_logs(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=2, batch_size=1), train_data, val_data)
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture[-8:-4] == b"IEND"
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 20, 25, 40], "the first step of an epoch and every 20th"
    assert [row["epoch"] for row in steps] == [1, 1, 2, 2]
    for row in steps:
        assert set(row) == {"step", "epoch", "loss", "learning_rate", "grad_norm"}


def events_of(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_matches_the_logs(tmp_path, new_config, train_data, val_data):
    history = train(new_config(tmp_path / "run", epochs=2), train_data, val_data)
    train(new_config(tmp_path / "run", epochs=3), train_data, val_data, resume=True)
    history = logged(tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    events = events_of(tmp_path / "run")
    assert set(events) == {f"epoch/{name}" for name in history[0].keys() - {"step", "epoch"}} | {
        f"step/{name}" for name in steps[0].keys() - {"step", "epoch"}
    }
    for group, rows in (("epoch", history), ("step", steps)):
        for tag in [tag for tag in events if tag.startswith(group)]:
            expected = [(row["step"], row[tag.partition("/")[2]]) for row in rows]
            assert [step for step, _ in events[tag]] == [step for step, _ in expected]
            assert [value for _, value in events[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_logs_of_a_diverged_run_are_valid_json(tmp_path, new_config, train_data, val_data):
    def reject_constant(name):
        pytest.fail(f"{name} is not valid JSON")

    history = train(new_config(tmp_path / "run", learning_rate=1e4, epochs=1), train_data, val_data)
    assert history[0]["val_perplexity"] in (math.inf, None)
    for name in ("metrics.jsonl", "steps.jsonl"):
        for line in (tmp_path / "run" / name).read_text().splitlines():
            json.loads(line, parse_constant=reject_constant)
    assert logged(tmp_path / "run")[0]["val_perplexity"] is None
