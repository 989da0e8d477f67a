"""A run that is interrupted at any time and resumed is bit-identical to an uninterrupted run."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

import gridcap.train.engine.loop
from gridcap.common.errors import MismatchError
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.decoders.transformer import TransformerConfig
from gridcap.train.engine.checkpoint import find_checkpoint, load_training_state
from gridcap.train.engine.loop import fit

ROWS, STEPS = 24, 10  # images, and steps of 2 epochs of them
LOG_EVERY = 2  # steps per row of steps.jsonl here, so that some rows come after the last checkpoint
CROSS_ENTROPY = {
    "ema_decay": 0.9,
    "grad_accum_steps": 2,
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "optimizer": "adamw",
    "scheduled_sampling": {"max_prob": 0.5, "prob_step": 0.25, "step_epochs": 1},
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
}
SELF_CRITICAL = {"objective": "scst", "ema_decay": 0.9, "scst": {"samples": 2}, "learning_rate": 0.003}
KINDS = ["cross-entropy", "scst"]


@pytest.fixture(scope="module", autouse=True)
def _log_often():
    """Log often, and skip plotting and fsync, which would take half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.STEPS_PER_ROW", LOG_EVERY)
        patch.setattr("gridcap.train.engine.loop.plot_curves", lambda *_: None)
        patch.setattr("os.fsync", lambda _: None)
        yield


class World:
    """Data on disk, a decoder to start from, and an uninterrupted run per objective."""

    def __init__(self, folder, new_data, new_config):
        self.folder, self._new_config = folder, new_config
        self.data = new_data(folder / "train.h5", ROWS), new_data(folder / "val.h5", 5, first_id=500, seed=1)
        fit(new_config(folder / "start", epochs=3, seed=9), *self.data, False, progress=False)
        self.uninterrupted = {kind: fit(self.config(kind, kind), *self.data, False, progress=False) for kind in KINDS}

    def config(self, kind, name, **train):
        of_kind = CROSS_ENTROPY if kind == "cross-entropy" else SELF_CRITICAL | {"init_from": self.folder / "start"}
        return self._new_config(self.folder / name, **of_kind | train)

    def resume(self, config):
        torch.manual_seed(12345)  # the global random state must not matter
        return fit(config, *self.data, True, progress=False)

    def assert_as_uninterrupted(self, kind, output, history):
        whole = self.folder / kind
        expected = self.uninterrupted[kind]
        assert timeless(history) == timeless(expected)
        assert timeless(rows(output / "metrics.jsonl")) == timeless(rows(whole / "metrics.jsonl"))
        assert rows(output / "steps.jsonl") == rows(whole / "steps.jsonl")
        assert (output / "checkpoints.json").read_bytes() == (whole / "checkpoints.json").read_bytes()
        kept = sorted(path.name for path in (output / "checkpoints").iterdir())
        assert kept == sorted(path.name for path in (whole / "checkpoints").iterdir())
        for name in kept:
            ours, theirs = output / "checkpoints" / name, whole / "checkpoints" / name
            assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
            assert_same(timeless_state(ours), timeless_state(theirs))
        assert not [path for path in output.rglob("*") if ".tmp" in path.name], "no temporary file or folder remains"


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(history):
    """Return the rows without measured times."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in history]


def timeless_state(checkpoint):
    state = load_training_state(checkpoint)
    return state | {"history": timeless(state["history"])}


def assert_same(a, b, where="state"):
    """Assert that two trees of plain values and tensors are bit-identical."""
    if isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(b, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def world(tmp_path_factory, new_data, new_config):
    return World(tmp_path_factory.mktemp("world"), new_data, new_config)


def test_uninterrupted_runs_use_every_stateful_and_random_feature(world):
    """Otherwise, comparing resumed runs with them would prove little."""
    for kind in KINDS:
        state = load_training_state(find_checkpoint(world.folder / kind, "last"))
        assert state["step"] == STEPS
        assert state["weights"] is not None, "the raw weights are saved in addition to the EMA"
        logged = rows(world.folder / kind / "steps.jsonl")
        assert [row["step"] for row in logged] == [1, 2, 4, 6, 8, 10]
        assert all(row["grad_norm"] > 0 and row["learning_rate"] > 0 for row in logged)
    assert [row["epoch"] for row in world.uninterrupted["scst"]] == [0, 1, 2]
    assert all({"reward", "baseline", "advantage"} <= row.keys() for row in world.uninterrupted["scst"][1:])


# --- exceptions at every step ---


class _StopError(Exception):
    pass


def stop_in_step(patch, step):
    """Raise after a step has changed the weights and before anything is written."""
    real = gridcap.train.engine.loop.train_step

    def stopping(self, run, *args):
        row = real(self, run, *args)
        if run.step == step:
            raise _StopError
        return row

    patch.setattr("gridcap.train.engine.loop.train_step", stopping)


def interrupted(world, config, *steps):
    """Start, then resume, stopping in each of the given steps."""
    for number, step in enumerate(steps):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, step)
            with pytest.raises(_StopError):
                fit(config, *world.data, number > 0, progress=False)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_run_stopped_in_any_step_resumes_exactly(world, kind, step):
    every = 1 + step % 3
    config = world.config(kind, f"{kind}-{step}", checkpoint_steps=every)
    interrupted(world, config, step)
    history = world.resume(config)
    world.assert_as_uninterrupted(kind, config.train.output, history)


@pytest.mark.parametrize("family", ["lstm", "transformer"])
def test_other_decoder_families_resume_exactly(world, family, tiny_decoders):
    """Covers fused LSTMs, whose weights are not contiguous after deepcopy, and layers with dropout."""
    transformer = TransformerConfig(embed_size=8, layers=2, heads=2, feedforward_size=16, dropout=0.1)
    decoder = {**tiny_decoders, "transformer": transformer}[family]
    config, whole = (world.config("cross-entropy", f"{family}-{n}", decoder=decoder, checkpoint_steps=2) for n in "ab")
    fit(whole, *world.data, False, progress=False)
    interrupted(world, config, 3, 8)
    world.resume(config)
    ours, theirs = (find_checkpoint(c.train.output, "last") for c in (config, whole))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert_same(timeless_state(ours), timeless_state(theirs))


def test_resume_with_other_validation_captions_is_rejected(world):
    config = world.config("cross-entropy", "revalidated", checkpoint_steps=2)
    interrupted(world, config, 7)
    train, val = world.data
    other = dataclasses.replace(val, captions=[("another caption",)] * len(val))
    with pytest.raises(MismatchError, match="validated on other images or captions"):
        fit(config, train, other, True, progress=False)


def test_resume_with_another_precision_is_rejected(world, monkeypatch):
    """The meaning of "auto" depends on the machine."""
    config = world.config("cross-entropy", "precise", precision="auto", checkpoint_steps=2)
    monkeypatch.setattr("gridcap.train.engine.job.choose_precision", lambda *_: torch.float32)
    interrupted(world, config, 3)
    monkeypatch.setattr("gridcap.train.engine.job.choose_precision", lambda *_: torch.bfloat16)
    with pytest.raises(MismatchError, match=r"started in float32.*selects bfloat16") as caught:
        world.resume(config)
    assert "--precision float32" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_run_stopped_repeatedly_resumes_exactly(world, kind):
    config = world.config(kind, f"{kind}-often", checkpoint_steps=2)
    interrupted(world, config, 1, 4, 4, 7, 10)
    world.assert_as_uninterrupted(kind, config.train.output, world.resume(config))


def test_resume_without_mid_epoch_checkpoints_starts_at_the_epoch(world):
    config = world.config("cross-entropy", "epochs-only")
    interrupted(world, config, 9)
    assert find_checkpoint(config.train.output, "last").name == "step-00000005"
    world.assert_as_uninterrupted("cross-entropy", config.train.output, world.resume(config))


def test_resume_after_full_disk_is_exact(world):
    config = world.config("cross-entropy", "full", checkpoint_steps=3)
    real = torch.save

    def save(state, file):
        if state["step"] == 6:
            raise OSError(28, "No space left on device")
        real(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.engine.checkpoint.torch.save", save)
        with pytest.raises(OSError, match="No space"):
            fit(config, *world.data, False, progress=False)
    assert find_checkpoint(config.train.output, "last").name == "step-00000005"
    world.assert_as_uninterrupted("cross-entropy", config.train.output, world.resume(config))


def test_truncated_line_of_the_step_log_is_rewritten(world):
    config = world.config("cross-entropy", "cut", checkpoint_steps=3)
    interrupted(world, config, 8)
    log = config.train.output / "steps.jsonl"
    with log.open("a") as file:
        file.write(log.read_text().splitlines()[-1][:17])
    world.assert_as_uninterrupted("cross-entropy", config.train.output, world.resume(config))


# --- processes killed by SIGKILL ---

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
import gridcap.train.engine.checkpoint
import gridcap.train.engine.log
import gridcap.train.engine.loop
from gridcap.common.captions.read import read_captions
from gridcap.common.config import PipelineConfig
from gridcap.common.store.reader import FeatureStore
from gridcap.train.data.captioned import CaptionedImages

def load(name):
    captions = folder / f"{name}.json"
    return CaptionedImages.join(FeatureStore(folder / f"{name}.h5"), read_captions(captions).records, captions)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_when(real, matches):
    return lambda *args, **kwargs: die() if matches(*args) else real(*args, **kwargs)

def prepare(moment):
    if moment == "while batches are prefetched":
        real = gridcap.train.engine.loop.train_step
        gridcap.train.engine.loop.train_step = die_when(real, lambda job, run, *rest: run.step == 6)
    elif moment == "between the files of a checkpoint":
        torch.save = die_when(torch.save, lambda state, file: state["step"] == 4)
    elif moment == "before a checkpoint is renamed":
        os.replace = die_when(os.replace, lambda source, target: Path(target).name == "step-00000008")
    elif moment == "between rename and pointer update":
        gridcap.train.engine.checkpoint.write_json = die_when(
            gridcap.train.engine.checkpoint.write_json, lambda path, value: value.get("last") == "step-00000006"
        )
    elif moment == "while the pointers are replaced":
        os.replace = die_when(
            os.replace, lambda source, target: target.name == "checkpoints.json" and "00000003" in source.read_text()
        )
    elif moment == "between the checkpoint of an epoch and its log":
        run_log = gridcap.train.engine.log.RunLog
        run_log.log_epoch = die_when(run_log.log_epoch, lambda log, history: history[-1]["epoch"] == 1)

torch.set_num_threads(1)
warm = torch.ones(1, requires_grad=True)
warm.grad = torch.ones(1)
torch.optim.Adam([warm]).step()  # the first step imports modules for seconds: do it once, before forking
folder, gridcap.train.engine.loop.STEPS_PER_ROW = Path(sys.argv[1]), int(sys.argv[2])
for number, moment in enumerate(sys.argv[3:]):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(moment, os.waitstatus_to_exitcode(status), sep=": ", flush=True)
        continue
    prepare(moment)
    config = PipelineConfig.model_validate_json((folder / f"killed-{number}.json").read_text())
    gridcap.train.engine.loop.fit(config, load("train"), load("val"), False, progress=False)
    os._exit(0)
"""
# moment -> objective, steps between checkpoints, step of the last complete checkpoint
MOMENTS = {
    "while batches are prefetched": ("cross-entropy", 3, 6),
    "between the files of a checkpoint": ("cross-entropy", 2, 2),
    "before a checkpoint is renamed": ("scst", 2, 6),
    "between rename and pointer update": ("cross-entropy", 1, 5),
    "while the pointers are replaced": ("scst", 3, 0),
    "between the checkpoint of an epoch and its log": ("cross-entropy", 2, 5),
}


@pytest.fixture(scope="module")
def killed(world):
    """Execute runs in child processes, each killed by SIGKILL at its moment."""
    for number, (kind, every, _) in enumerate(MOMENTS.values()):
        config = world.config(kind, f"killed-{number}", checkpoint_steps=every)
        (world.folder / f"killed-{number}.json").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(world.folder), str(LOG_EVERY), *MOMENTS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout.splitlines() == [f"{moment}: {-signal.SIGKILL}" for moment in MOMENTS], done.stderr


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.usefixtures("killed")
def test_resume_after_sigkill_is_exact(world, moment):
    kind, every, last = MOMENTS[moment]
    config = world.config(kind, f"killed-{list(MOMENTS).index(moment)}", checkpoint_steps=every)
    assert find_checkpoint(config.train.output, "last").name == f"step-{last:08}"
    world.assert_as_uninterrupted(kind, config.train.output, world.resume(config))


# --- settings that may change on resuming ---


def test_same_seed_gives_identical_weights(world, new_config):
    config = world.config("cross-entropy", "again")
    world.assert_as_uninterrupted("cross-entropy", config.train.output, fit(config, *world.data, False, progress=False))
    other = new_config(world.folder / "other", seed=1, **CROSS_ENTROPY)
    assert timeless(fit(other, *world.data, False, progress=False)) != timeless(world.uninterrupted["cross-entropy"])
    weights = [
        find_checkpoint(world.folder / name, "last") / "model.safetensors" for name in ("cross-entropy", "other")
    ]
    assert weights[0].read_bytes() != weights[1].read_bytes()


@pytest.mark.parametrize("kind", ["constant", "step", "noam"])
def test_raising_epochs_on_resume_equals_training_longer(world, new_config, kind):
    schedule = {"kind": kind, "warmup_steps": 3, "step_size": 1}
    for name, epochs in (("raised", (1, 2)), ("at-once", (2,))):
        for n in epochs:
            config = new_config(world.folder / f"{name}-{kind}", epochs=n, schedule=schedule)
            history = fit(config, *world.data, n != epochs[0], progress=False)
        assert [row["epoch"] for row in history] == [1, 2]
    ours, theirs = (find_checkpoint(world.folder / f"{name}-{kind}", "last") for name in ("raised", "at-once"))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_epochs_cannot_be_raised_with_a_cosine_schedule(world):
    output = world.folder / "cross-entropy"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=r"train\.epochs: 2 then, 3 now") as caught:
        world.resume(world.config("cross-entropy", "cross-entropy", epochs=3))
    assert "same settings" in caught.value.hint
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_a_finished_run_changes_nothing(world, kind):
    output = world.folder / kind
    names = ["config.yaml", "metrics.jsonl", "steps.jsonl", "checkpoints.json"]

    def contents():
        return {
            path: path.read_bytes()
            for path in output.rglob("*")
            if path.name in names or "step-" in str(path)
            if path.is_file()
        }

    before = contents()
    assert world.resume(world.config(kind, kind)) == world.uninterrupted[kind]
    assert contents() == before


@pytest.mark.parametrize("change", ["a word", "one image fewer", "another order"])
def test_changed_captions_file_is_rejected_without_side_effects(world, change):
    output = world.folder / "cross-entropy"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    data = world.data[0]
    captions, images = [list(texts) for texts in data.captions], data.rows
    if change == "a word":
        captions[3][0] += " outside"
    elif change == "another order":
        captions[1].reverse()
    else:
        captions, images = captions[1:], images[1:]
    other = CaptionedImages(data.store, images, [tuple(texts) for texts in captions], {})
    with pytest.raises(MismatchError, match="started with other images or captions") as caught:
        fit(world.config("cross-entropy", "cross-entropy"), other, world.data[1], True, progress=False)
    assert "same files" in caught.value.hint
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


# --- checkpoint interval ---


def saved_steps(world, config, resume=False):
    """Return the steps at which a run writes checkpoints, and check that only best and last are kept."""
    real, steps = gridcap.train.engine.loop.save_checkpoint, []

    def save(run, contents, best_step):
        folder = real(run, contents, best_step)
        step = contents.step
        steps.append(step)
        pointers = json.loads((run / "checkpoints.json").read_text())
        assert pointers["last"] == folder.name == f"step-{step:08}"
        assert {path.name for path in folder.parent.iterdir()} == set(pointers.values())
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.save_checkpoint", save)
        fit(config, *world.data, resume, progress=False)
    return steps


@pytest.mark.parametrize(
    ("every", "expected"),
    [(None, [5, 10]), (1, list(range(1, 11))), (2, [2, 4, 5, 6, 8, 10]), (3, [3, 5, 6, 9, 10]), (5, [5, 10])],
)
def test_checkpoints_are_written_every_n_steps_and_after_each_epoch(world, every, expected):
    config = world.config("cross-entropy", f"every-{every}", checkpoint_steps=every)
    assert saved_steps(world, config) == expected


def test_checkpoints_are_written_every_n_minutes(world, monkeypatch):
    """With a fake clock: each step takes 25 seconds, and a checkpoint none."""
    now = [0.0]
    monkeypatch.setattr("gridcap.train.engine.loop.time.monotonic", lambda: now[0])
    real = gridcap.train.engine.loop.train_step

    def slow(*args):
        now[0] += 25
        return real(*args)

    monkeypatch.setattr("gridcap.train.engine.loop.train_step", slow)
    minutes = {1.0: [3, 5, 8, 10], 0.5: [2, 4, 5, 7, 9, 10], 1000.0: [5, 10], None: [5, 10]}
    for number, (limit, expected) in enumerate(minutes.items()):
        config = world.config("cross-entropy", f"minutes-{number}", checkpoint_minutes=limit)
        assert saved_steps(world, config) == expected, limit


# --- full disk ---


def test_item_31_full_disk_at_the_step_log_names_the_file_and_keeps_a_usable_checkpoint(world, monkeypatch):
    config = world.config("cross-entropy", "full-log", checkpoint_steps=2)
    real = pathlib.Path.open

    def full(path, mode="r", **options):
        if path.name == "steps.jsonl" and mode == "a" and '"step": 6' in path.read_text():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*steps\.jsonl'"):
            fit(config, *world.data, False, progress=False)
    assert find_checkpoint(config.train.output, "last").name == "step-00000006"
    world.assert_as_uninterrupted("cross-entropy", config.train.output, world.resume(config))
