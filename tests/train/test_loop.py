import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from common.annotations import ImageRecord
from common.errors import CheckpointError, MismatchError, TrainingError
from train.checkpoint import find_checkpoint, load_checkpoint
from train.decoders.build import build_decoder
from train.loop import fit, validate
from train.search import beam_search
from train.stream import CaptionedImages


def timeless(history):
    """The rows without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "waited")} for row in history]


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
def test_the_loss_falls_and_the_captions_become_right(
    tmp_path, family, new_config, tiny_decoders, train_data, val_data
):
    config = new_config(tmp_path / "run", epochs=9, batch_size=3, decoder=tiny_decoders[family], learning_rate=0.02)
    history = train(config, train_data, val_data)
    assert history[-1]["train_loss"] < 0.4 * history[0]["train_loss"]
    decoder, vocabulary = load_checkpoint(tmp_path / "run").decoder, load_checkpoint(tmp_path / "run").vocabulary
    for data in (train_data, val_data):
        grids = torch.from_numpy(data.store.rows(data.rows)).float().reshape(len(data), 4, 8)
        for hypothesis, captions in zip(beam_search(decoder, grids, 1, 8), data.captions, strict=True):
            _, colour, shape = captions[0].split()
            right = {f"a {colour} {shape}", f"a {shape} that is {colour}", f"one {colour} {shape} here"}
            assert vocabulary.decode(hypothesis.tokens) in right
    assert history[-1]["val_cider"] > history[0]["val_cider"]


def test_a_row_an_epoch_is_returned_and_logged(tmp_path, new_config, train_data, val_data):
    history = train(new_config(tmp_path / "run", epochs=2), train_data, val_data)
    assert [row["epoch"] for row in history] == [1, 2]
    for row in history:
        assert set(row) == {
            "epoch", "train_loss", "val_loss", "val_perplexity", "val_cider", "seconds", "waited",
        }  # fmt: skip
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        assert 0 <= row["waited"] <= 1
    assert logged(tmp_path / "run") == history


def test_the_first_loss_is_near_that_of_guessing(tmp_path, new_config, train_data):
    history = train(new_config(tmp_path / "run", epochs=1, learning_rate=1e-9, batch_size=24), train_data)
    size = len(load_checkpoint(tmp_path / "run").vocabulary)
    assert history[0]["train_loss"] == pytest.approx(math.log(size), abs=0.5), "nats a word"


def test_the_best_checkpoint_has_the_highest_cider_and_of_equals_the_lowest_loss(
    tmp_path, monkeypatch, new_config, train_data, val_data
):
    ciders = iter([0.1, 0.7, 0.7, 0.3])
    monkeypatch.setattr("train.loop.cider", lambda *_: next(ciders))
    history = train(new_config(tmp_path / "run", epochs=4), train_data, val_data)
    best = min(history[1:3], key=lambda row: row["val_loss"])["epoch"]
    assert find_checkpoint(tmp_path / "run", "best").name == f"epoch-{best:04}"
    assert find_checkpoint(tmp_path / "run", "last").name == "epoch-0004"


def test_without_validation_the_last_checkpoint_is_the_best(tmp_path, new_config, train_data):
    history = train(new_config(tmp_path / "run", epochs=3), train_data)
    assert all(set(row) == {"epoch", "train_loss", "seconds", "waited"} for row in history)
    assert find_checkpoint(tmp_path / "run", "best").name == "epoch-0003"


def test_the_vocabulary_holds_no_word_of_validation_captions_only(tmp_path, new_config, train_data, new_store):
    grids = train_data.store.rows(range(3))
    records = [ImageRecord(900 + i, f"{900 + i}.jpg", ("a purple square",)) for i in range(3)]
    store = new_store(tmp_path / "val.h5", grids, [900, 901, 902])
    val = CaptionedImages.join(store, records, tmp_path / "v.json")
    train(new_config(tmp_path / "run", epochs=1), train_data, val)
    words = load_checkpoint(tmp_path / "run").vocabulary.words
    assert "purple" not in words
    assert {"red", "green", "blue", "circle", "here"} <= set(words)


def test_the_vocabulary_follows_its_settings(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1, vocabulary={"max_size": 6}), train_data)
    assert len(load_checkpoint(tmp_path / "run").vocabulary) == 6


def test_validation_changes_nothing_in_the_training(tmp_path, new_config, train_data, val_data):
    with_it = train(new_config(tmp_path / "a", epochs=3), train_data, val_data)
    without = train(new_config(tmp_path / "b", epochs=3), train_data)
    assert [row["train_loss"] for row in with_it] == [row["train_loss"] for row in without]
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_validation_loss_counts_every_reference_and_does_not_depend_on_the_batch_size(
    tmp_path, new_config, train_data, val_data
):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    loaded = load_checkpoint(tmp_path / "run")
    found = [
        validate(
            loaded.decoder, val_data, loaded.vocabulary, new_config(tmp_path / "run", batch_size=size),
            torch.device("cpu"), torch.float32,
        )
        for size in (1, 4, 50)
    ]  # fmt: skip
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    total, words = 0.0, 0
    for image, captions in enumerate(val_data.captions):
        grid = torch.from_numpy(val_data.store.row(int(val_data.rows[image]))).float().reshape(1, 4, 8)
        for text in captions:
            tokens = torch.tensor(loaded.vocabulary.encode(text, 8))
            with torch.no_grad():
                logits = loaded.decoder(loaded.decoder.encode(grid), tokens[None, None, :-1])[0, 0]
            total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
            words += len(tokens) - 1
    assert found[0]["val_loss"] == pytest.approx(total / words, rel=1e-5)


@pytest.mark.parametrize("clip_norm", [5.0, 0.31])
def test_a_step_is_adams_on_the_mean_loss_of_a_word_with_the_gradient_clipped(
    tmp_path, clip_norm, new_config, tiny_decoders, train_data
):
    decoder_config = tiny_decoders["attention"].model_copy(update={"dropout": 0.0})
    config = new_config(
        tmp_path / "run", epochs=4, batch_size=24, captions_per_image=3, decoder=decoder_config, clip_norm=clip_norm
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
                logits = decoder(decoder.encode(grid[None]), tokens[None, None, :-1])[0, 0]
                losses += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip_norm).item())
        adam.step()
    assert clip_norm == 5 > max(norms) or norms[0] < clip_norm < norms[3], f"clips nothing: {norms}"
    ours, expected = dict(loaded.decoder.named_parameters()), dict(decoder.named_parameters())
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_training_in_bfloat16_works_and_keeps_float32_weights(
    tmp_path, family, new_config, tiny_decoders, train_data, val_data
):
    config = new_config(tmp_path / "run", epochs=3, precision="bfloat16", decoder=tiny_decoders[family])
    history = train(config, train_data, val_data)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert {value.dtype for value in weights_of(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_each_grid_is_projected_once_for_all_its_captions(tmp_path, family, new_config, tiny_decoders, train_data):
    config = new_config(tmp_path / "run", epochs=1, captions_per_image=3, decoder=tiny_decoders[family])
    projected = []
    kind = type(build_decoder(config.train.decoder, 9, (2, 2, 8)))
    with pytest.MonkeyPatch.context() as patch:
        real = kind._project
        patch.setattr(kind, "_project", lambda self, grid: (projected.append(tuple(grid.shape)), real(self, grid))[1])
        train(config, train_data)
    assert projected == [(5, 4, 8)] * 4 + [(4, 4, 8)]


def test_an_interrupted_epoch_leaves_no_thread(tmp_path, new_config, train_data, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.loop.masked_cross_entropy", interrupt)
    try:
        train(new_config(tmp_path / "run"), train_data)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("was not interrupted")
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# --- the same again ---


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path, new_config, train_data):
    a, b, other = (
        train(new_config(tmp_path / name, seed=seed), train_data) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert timeless(a) == timeless(b) != timeless(other)
    assert same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same_bits(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, new_data, new_config):
    """Data on disk, and a run of 5 epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("world")
    data = new_data(folder / "train.h5", 13), new_data(folder / "val.h5", 5, first_id=500, seed=1)
    config = new_config(folder / "undisturbed", epochs=5)
    history = fit(config, *data, False, progress=False)
    return folder, data, history


def assert_as_undisturbed(world, output, history):
    folder, _, undisturbed = world
    assert timeless(history) == timeless(undisturbed)
    assert timeless(logged(output)) == timeless(undisturbed)
    for which in ("best", "last"):
        assert find_checkpoint(output, which).name == find_checkpoint(folder / "undisturbed", which).name
        assert same_bits(weights_of(output, which), weights_of(folder / "undisturbed", which))


def test_a_run_resumed_after_epoch_2_of_5_ends_as_an_undisturbed_one(world, tmp_path, new_config):
    _, data, _ = world
    train(new_config(tmp_path / "run", epochs=2), *data)
    torch.manual_seed(12345)
    history = train(new_config(tmp_path / "run", epochs=5), *data, resume=True)
    assert_as_undisturbed(world, tmp_path / "run", history)


def test_an_exception_in_an_epoch_can_be_resumed_as_if_it_had_not_been(world, tmp_path, new_config, monkeypatch):
    _, data, _ = world
    config = new_config(tmp_path / "run", epochs=5)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    real = torch.save
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.torch.save", lambda s, f: full() if len(s["history"]) == 4 else real(s, f))
        with pytest.raises(OSError, match="No space"):
            train(config, *data)
    assert find_checkpoint(config.train.output, "last").name == "epoch-0003"
    assert_as_undisturbed(world, config.train.output, train(config, *data, resume=True))


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
import train.checkpoint
import train.loop
from common.annotations import load_annotations
from common.config import PipelineConfig
from common.store import FeatureStore
from train.stream import CaptionedImages, CaptionStream

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def load(name):
    captions = folder / f"{name}.json"
    return CaptionedImages.join(FeatureStore(folder / f"{name}.h5"), load_annotations(captions).records, captions)

def die_when(real, matches):
    return lambda *args, **kwargs: die() if matches(*args) else real(*args, **kwargs)

def batches_until_killed(stream, epoch):
    for number, batch in enumerate(real_epoch(stream, epoch)):
        if (epoch, number) == (2, 1):
            die()
        yield batch

torch.set_num_threads(1)
warm = torch.ones(1, requires_grad=True)
warm.grad = torch.ones(1)
torch.optim.Adam([warm]).step()  # its first step imports for seconds: once here, before the forks
folder = Path(sys.argv[1])
real_epoch = CaptionStream.epoch
for moment in sys.argv[2:]:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(moment, os.waitstatus_to_exitcode(status), flush=True)
        continue
    if moment == "epoch":
        CaptionStream.epoch = batches_until_killed
    elif moment == "rename":
        os.replace = die_when(os.replace, lambda source, target: Path(target).name == "epoch-0003")
    elif moment == "pointers":
        train.checkpoint.write_json = die_when(
            train.checkpoint.write_json, lambda path, value: value.get("last") == "epoch-0003"
        )
    else:
        train.loop._write_history = die_when(train.loop._write_history, lambda output, history: len(history) == 3)
    config = PipelineConfig.model_validate_json((folder / f"{moment}.config.json").read_text())
    train.loop.fit(config, load("train"), load("val"), False, progress=False)
    os._exit(0)
"""
MOMENTS = {"epoch": 2, "rename": 2, "pointers": 2, "between": 3}  # -> the last whole checkpoint


@pytest.fixture(scope="module")
def killed(world, new_config):
    """Runs in processes of their own, each killed by SIGKILL at its moment in or after epoch 3."""
    folder, _, _ = world
    for moment in MOMENTS:
        config = new_config(folder / moment, epochs=5)
        (folder / f"{moment}.config.json").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder), *MOMENTS], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [word for m in MOMENTS for word in (m, str(-signal.SIGKILL))], done.stderr
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_process_is_resumed_to_the_same_weights_to_the_bit(world, killed, new_config, moment):
    _, data, _ = world
    assert find_checkpoint(killed / moment, "last").name == f"epoch-{MOMENTS[moment]:04}"
    history = train(new_config(killed / moment, epochs=5), *data, resume=True)
    assert_as_undisturbed(world, killed / moment, history)
    left = [path for path in (killed / moment).rglob("*") if ".tmp" in path.name]
    assert left == []


def test_a_training_state_without_its_parts_is_refused_by_name(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    torch.save({"another": "file"}, find_checkpoint(tmp_path / "run") / "training_state.pt")
    with pytest.raises(CheckpointError, match="epoch-0001"):
        train(new_config(tmp_path / "run"), train_data, resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path, new_config, train_data):
    config = new_config(tmp_path / "run", epochs=1)
    history = train(config, train_data)
    before = weights_of(tmp_path / "run")
    assert train(config, train_data, resume=True) == history == logged(tmp_path / "run")
    assert same_bits(before, weights_of(tmp_path / "run"))


def test_a_run_is_resumed_where_it_was_moved_to(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "here", epochs=1), train_data)
    (tmp_path / "here").rename(tmp_path / "there")
    history = train(new_config(tmp_path / "there", epochs=2), train_data, resume=True)
    assert [row["epoch"] for row in history] == [1, 2]


# --- refusals ---


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
def test_a_resume_with_other_settings_is_refused_naming_them(tmp_path, new_config, train_data, changed, named):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(MismatchError, match=named):
        train(new_config(tmp_path / "run", **changed), train_data, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_resume_with_another_decoder_is_refused(tmp_path, new_config, train_data, tiny_decoders):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    with pytest.raises(MismatchError, match=r"train\.decoder"):
        train(new_config(tmp_path / "run", decoder=tiny_decoders["lstm"]), train_data, resume=True)


def test_a_resume_on_other_features_is_refused_showing_the_difference(tmp_path, new_config, train_data, new_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    other = new_data(tmp_path / "other.h5", encoder="resnet50")
    with pytest.raises(MismatchError, match=r"inception_v3.*resnet50"):
        train(new_config(tmp_path / "run"), other, resume=True)


def test_a_second_run_into_the_same_output_is_refused_and_harms_nothing(tmp_path, new_config, train_data):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="holds a run already") as caught:
        train(new_config(tmp_path / "run", seed=2), train_data)
    assert "--resume" in caught.value.hint
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_nothing_to_resume_is_refused_and_nothing_is_written(tmp_path, new_config, train_data):
    with pytest.raises(CheckpointError, match="no such folder"):
        train(new_config(tmp_path / "nowhere"), train_data, resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_validation_features_of_another_provenance_are_refused(tmp_path, new_config, train_data, new_data):
    val = new_data(tmp_path / "other.h5", 6, weights={"name": "other", "sha256": "ff" * 32, "random": False})
    with pytest.raises(MismatchError, match=r"weights .*0cc3c7bd.*ffffffff"):
        train(new_config(tmp_path / "run"), train_data, val)
    assert not (tmp_path / "run").exists()


def test_validation_features_may_come_from_other_library_versions(tmp_path, new_config, train_data, new_data):
    val = new_data(tmp_path / "other.h5", 6, versions={"torch": "2.9.9"}, precision="bfloat16")
    assert len(train(new_config(tmp_path / "run", epochs=1), train_data, val)) == 1


@pytest.fixture
def ruined_steps(monkeypatch):
    """Once called, every step of the optimiser leaves weights that are no numbers."""

    def call():
        real = torch.optim.Adam.step

        def step(optimizer, *args):
            real(optimizer, *args)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.data.fill_(torch.nan)

        monkeypatch.setattr(torch.optim.Adam, "step", step)

    return call


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, new_config, train_data, ruined_steps
):
    train(new_config(tmp_path / "run", epochs=1), train_data)
    good = weights_of(tmp_path / "run")
    ruined_steps()
    with pytest.raises(TrainingError, match=r"loss of epoch 2 is not a number") as caught:
        train(new_config(tmp_path / "run", epochs=5), train_data, resume=True)
    assert caught.value.exit_status == 1
    assert same_bits(good, weights_of(tmp_path / "run"))
    assert [row["epoch"] for row in logged(tmp_path / "run")] == [1]


def test_a_huge_learning_rate_stops_with_a_training_error(tmp_path, new_config, train_data):
    with pytest.raises(TrainingError, match="not a number"):
        train(new_config(tmp_path / "run", learning_rate=1e30), train_data)


def test_weights_ruined_by_the_last_step_of_an_epoch_are_not_kept(tmp_path, new_config, train_data, ruined_steps):
    config = new_config(tmp_path / "run", epochs=1, batch_size=24)
    ruined_steps()
    with pytest.raises(TrainingError, match="not a number"):
        train(config, train_data)
    assert not (tmp_path / "run" / "checkpoints.json").exists()


def test_a_diverged_validation_loss_is_no_crash(tmp_path, new_config, train_data, val_data):
    history = train(new_config(tmp_path / "run", learning_rate=1e4, epochs=1), train_data, val_data)
    assert history[0]["val_loss"] > 710, "exp of it is beyond any float"
    assert history[0]["val_perplexity"] in (math.inf, None)
    assert len(logged(tmp_path / "run")) == 1


def test_the_advice_after_a_diverged_run_can_be_followed(tmp_path, new_config, train_data):
    with pytest.raises(TrainingError) as caught:
        train(new_config(tmp_path / "run", learning_rate=1e30), train_data)
    assert "resume" not in caught.value.hint, "a resume with another learning rate is refused"


def test_validation_that_begins_with_a_resume_decides_the_best(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=3), train_data)
    history = train(new_config(tmp_path / "run", epochs=5), train_data, val_data, resume=True)
    by_cider = max(history[3:], key=lambda row: row["val_cider"])
    assert find_checkpoint(tmp_path / "run", "best").name == f"epoch-{by_cider['epoch']:04}"


def test_validation_left_out_of_a_resume_leaves_the_best_by_cider(tmp_path, new_config, train_data, val_data):
    train(new_config(tmp_path / "run", epochs=2), train_data, val_data)
    best = find_checkpoint(tmp_path / "run", "best").name
    train(new_config(tmp_path / "run", epochs=5), train_data, resume=True)
    assert find_checkpoint(tmp_path / "run", "best").name == best
