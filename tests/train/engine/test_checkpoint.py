import errno
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import torch

from gridcap.common.errors import CheckpointError
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.engine import checkpoint
from gridcap.train.engine.checkpoint import (
    CheckpointContents,
    find_checkpoint,
    load_checkpoint,
    load_training_state,
    run_folder,
    save_checkpoint,
)

VOCABULARY = Vocabulary.build(["a red square", "a green circle"])
JSON_FILES = ["config.json", "vocabulary.json", "provenance.json"]


@pytest.fixture
def save(tmp_path, new_config, provenance, tiny_decoders):
    """Return a function that saves a checkpoint with weights seeded by its step and returns the decoder."""

    def call(step, best=1, family="attention"):
        torch.manual_seed(step)
        config = new_config(tmp_path / "run", decoder=tiny_decoders[family])
        decoder = build_decoder(config.train.decoder, len(VOCABULARY), (2, 2, 8))
        optimizer = torch.optim.Adam(decoder.parameters())
        decoder(decoder.encode(torch.ones(1, 4, 8)), torch.tensor([[[1, 4]]]))[0].sum().backward()
        optimizer.step()
        state = {"optimizer": optimizer.state_dict(), "history": [{"epoch": step}], "sums": {"loss": 1 / 3}}
        contents = CheckpointContents(step, decoder, VOCABULARY, config, provenance(), state)
        save_checkpoint(tmp_path / "run", contents, best)
        return decoder

    return call


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def logits_of(decoder):
    torch.manual_seed(9)
    return decoder.eval()(decoder.encode(torch.randn(3, 4, 8)), torch.randint(1, len(VOCABULARY), (3, 2, 5)))[0]


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_loaded_decoder_gives_identical_logits(save, run, family, provenance, new_config, tiny_decoders):
    decoder = save(1, family=family)
    loaded = load_checkpoint(run)
    assert torch.equal(logits_of(loaded.decoder), logits_of(decoder))
    assert not load_checkpoint(run).decoder.training
    assert loaded.vocabulary.tokens == VOCABULARY.tokens
    assert loaded.provenance == provenance()
    assert loaded.config == new_config(run, decoder=tiny_decoders[family])
    assert loaded.path == run / "checkpoints" / "step-00000001"


def test_training_state_round_trips_exactly(save, run):
    save(3, best=3)
    state = load_training_state(find_checkpoint(run, "last"))
    assert state["history"] == [{"epoch": 3}]
    assert state["sums"] == {"loss": 1 / 3}
    moments = state["optimizer"]["state"][0]
    assert set(moments) >= {"step", "exp_avg", "exp_avg_sq"}


def test_checkpoint_is_found_by_its_folder_or_its_run(save, run):
    save(1)
    folder = run / "checkpoints" / "step-00000001"
    assert find_checkpoint(folder) == find_checkpoint(run) == folder
    assert load_checkpoint(folder).path == folder


def test_checkpoint_contains_no_pickled_code(save, run):
    save(1)
    folder = find_checkpoint(run)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "training_state.pt", "sha256.json", *JSON_FILES}
    for name in ("sha256.json", *JSON_FILES):
        assert isinstance(json.loads((folder / name).read_text()), dict)
    assert torch.load(folder / "training_state.pt", weights_only=True)["history"] == [{"epoch": 1}]


class _Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def _write_malicious_files(folder, marker):
    """Write the same malicious object in each format that `torch.load` reads, and as a plain pickle."""
    torch.save({"history": _Malicious(marker)}, folder / "zip")
    torch.save({"history": _Malicious(marker)}, folder / "legacy", _use_new_zipfile_serialization=False)
    (folder / "bare").write_bytes(pickle.dumps(_Malicious(marker)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_malicious_training_state_is_rejected_without_executing_it(save, run, sign, tmp_path, layout):
    save(1)
    marker = tmp_path / "executed"
    _write_malicious_files(tmp_path, marker)
    torch.load(tmp_path / "zip", weights_only=False)
    assert marker.exists(), "the object is malicious"
    marker.rmdir()
    folder = find_checkpoint(run)
    shutil.copy(tmp_path / layout, folder / "training_state.pt")
    sign(folder)
    with pytest.raises(CheckpointError, match=r"training_state\.pt"):
        load_training_state(folder)
    assert not marker.exists()


def test_pickle_in_place_of_weights_is_rejected_without_executing_it(save, run, sign, tmp_path):
    save(1)
    _write_malicious_files(tmp_path, tmp_path / "executed")
    shutil.copy(tmp_path / "zip", find_checkpoint(run) / "model.safetensors")
    sign(find_checkpoint(run))
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(run)
    assert not (tmp_path / "executed").exists()


def test_error_does_not_suggest_unsafe_loading(save, run, sign, tmp_path):
    save(1)
    _write_malicious_files(tmp_path, tmp_path / "executed")
    folder = find_checkpoint(run)
    shutil.copy(tmp_path / "zip", folder / "training_state.pt")
    sign(folder)
    with pytest.raises(CheckpointError) as caught:
        load_training_state(folder)
    assert "weights_only" not in caught.value.message


def test_only_best_and_last_checkpoints_are_kept(save, run):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(step, best)
        assert load_checkpoint(run, "last").path.name == f"step-{step:08}"
        assert load_checkpoint(run).path.name == load_checkpoint(run, "best").path.name == f"step-{best:08}"
    assert folders(run) == ["step-00000002", "step-00000004"]
    save(5, best=5)
    assert folders(run) == ["step-00000005"]


def test_save_removes_leftovers_of_a_killed_save(save, run):
    save(1)
    (run / "checkpoints" / ".step-00000002.host-1-abc.tmp").mkdir()
    save(2, best=2)
    assert folders(run) == ["step-00000002"]


class _Killed(BaseException):
    pass


def _kill_when(real, matches):
    def call(*args, **kwargs):
        if matches(*args):
            raise _Killed
        return real(*args, **kwargs)

    return call


KILLS = {
    "writing the weights": ("save", lambda tensors: True),
    "writing the provenance": ("write_json", lambda path, value: path.name == "provenance.json"),
    "writing the training state": ("torch.save", lambda state, path: True),
    "flushing": ("fsync_path", lambda path: path.name == "vocabulary.json"),
    "renaming the folder": ("os.replace", lambda source, target: str(target).endswith("step-00000002")),
    "moving the pointers": ("write_json", lambda path, value: path.name == "checkpoints.json"),
    "replacing the pointers": ("os.replace", lambda source, target: str(target).endswith("checkpoints.json")),
}


@pytest.mark.parametrize("moment", KILLS)
def test_previous_checkpoint_loads_after_kill_at_any_point(save, run, moment):
    before = logits_of(save(1))
    name, matches = KILLS[moment]
    real = {"os.replace": os.replace, "torch.save": torch.save}.get(name) or getattr(checkpoint, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"gridcap.train.engine.checkpoint.{name}", _kill_when(real, matches))
        with pytest.raises(_Killed):
            save(2, best=2)
    for which in ("best", "last"):
        assert torch.equal(logits_of(load_checkpoint(run, which).decoder), before)
    assert load_training_state(find_checkpoint(run, "last"))["history"] == [{"epoch": 1}]
    assert not [p for p in run.rglob("*") if ".tmp" in p.name], "no temporary file or folder remains"
    after = logits_of(save(2, best=2))
    assert torch.equal(logits_of(load_checkpoint(run).decoder), after)
    assert folders(run) == ["step-00000002"]


def test_full_disk_raises_os_error_that_names_the_checkpoint(save, run):
    """The commands format OSError as one sentence; the writer of torch raises a RuntimeError of many lines."""
    save(1)

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*step-00000002'") as caught:
            save(2)
    assert caught.value.errno == errno.ENOSPC
    assert folders(run) == ["step-00000001"]
    assert not [p for p in run.rglob("*") if ".tmp" in p.name], "no temporary file or folder remains"


def test_kill_during_first_save_leaves_no_checkpoint(save, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gridcap.train.engine.checkpoint.save", _kill_when(None, lambda *args: True))
        with pytest.raises(_Killed):
            save(1)
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        find_checkpoint(run)


CORRUPTIONS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "other bytes": lambda path: path.write_bytes(b"\xff\xfe nothing of this kind \x00" * 9),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "no keys": lambda path: path.write_text("{}"),
}
HARMLESS = {(name, "one byte short") for name in JSON_FILES}  # only the final newline is lost
FATAL = [(n, d) for n in ("model.safetensors", *JSON_FILES) for d in CORRUPTIONS if (n, d) not in HARMLESS]


@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
@pytest.mark.parametrize(("name", "corruption"), FATAL)
def test_corrupted_file_is_rejected_and_checkpoint_named(save, run, sign, name, corruption, signed):
    save(1)
    CORRUPTIONS[corruption](find_checkpoint(run) / name)
    if signed:
        sign(find_checkpoint(run))
    with pytest.raises(CheckpointError, match="step-00000001") as caught:
        load_checkpoint(run)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("corruption", ["empty", "truncated"])
@pytest.mark.parametrize("name", ["model.safetensors", *JSON_FILES])
def test_error_names_the_corrupted_file(save, run, name, corruption):
    save(1)
    CORRUPTIONS[corruption](find_checkpoint(run) / name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(run)
    assert name in caught.value.message


def load_all(folder):
    load_checkpoint(folder)
    load_training_state(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "sha256.json", *JSON_FILES])
def test_flipped_bit_is_detected_in_every_file(save, run, name):
    save(1)
    folder = find_checkpoint(run)
    whole = (folder / name).read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 12).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="step-00000001"):
            load_all(folder)


@pytest.mark.parametrize("name", ["sha256.json", "training_state.pt"])
def test_checkpoint_without_checksums_is_rejected(save, run, name):
    save(1)
    folder = find_checkpoint(run)
    (folder / "sha256.json").unlink()
    with pytest.raises(CheckpointError, match=r"sha256\.json: no such file"):
        load_training_state(folder) if name == "training_state.pt" else load_checkpoint(run)


@pytest.mark.parametrize("corruption", ["missing", "empty", "truncated", "one byte short", "other bytes"])
def test_corrupted_training_state_is_rejected_by_name(save, run, corruption):
    save(1)
    folder = find_checkpoint(run)
    CORRUPTIONS[corruption](folder / "training_state.pt")
    with pytest.raises(CheckpointError, match=r"step-00000001/training_state\.pt"):
        load_training_state(folder)


@pytest.mark.parametrize("corruption", [d for d in CORRUPTIONS if d not in ("missing", "one byte short")])
def test_corrupted_pointer_file_is_rejected_by_name(save, run, corruption):
    save(1)
    CORRUPTIONS[corruption](run / "checkpoints.json")
    with pytest.raises(CheckpointError, match=r"checkpoints\.json"):
        load_checkpoint(run)


def _fail_reads_of(monkeypatch, name, error):
    """Make reads of the files with a name fail, as an unreliable disk or network file system does."""

    def fail(real):
        def call(path, *args, **kwargs):
            if path.name == name:
                raise error
            return real(path, *args, **kwargs)

        return call

    for target in ("pathlib.Path.read_text", "gridcap.train.engine.checkpoint.sha256_of"):
        monkeypatch.setattr(target, fail(checkpoint.sha256_of if "sha256_of" in target else pathlib.Path.read_text))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["checkpoints.json", "sha256.json", "model.safetensors", *JSON_FILES])
def test_item_11_a_system_error_is_not_called_corruption(save, run, monkeypatch, name, number):
    save(1)
    _fail_reads_of(monkeypatch, name, OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        load_checkpoint(run)
    assert caught.value.errno == number
    assert name == "checkpoints.json" or str(caught.value.filename).endswith(f"step-00000001/{name}")


def test_item_11_a_system_error_in_the_training_state_is_not_called_corruption(save, run, monkeypatch):
    save(1)
    _fail_reads_of(monkeypatch, "training_state.pt", OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(OSError, match="Input/output error"):
        load_training_state(find_checkpoint(run))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_item_12_running_out_of_memory_is_not_called_corruption(save, run, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    save(1)
    for target in ("build_decoder", "torch.load"):
        monkeypatch.setattr(f"gridcap.train.engine.checkpoint.{target}", fail)
    with pytest.raises(type(error)):
        load_checkpoint(run)
    with pytest.raises(type(error)):
        load_training_state(find_checkpoint(run))


def test_item_12_a_bug_in_a_decoder_is_not_called_corruption(save, run, monkeypatch):
    def fail(*args):
        raise TypeError("a bug")

    save(1)
    monkeypatch.setattr("gridcap.train.engine.checkpoint.build_decoder", fail)
    with pytest.raises(TypeError, match="a bug"):
        load_checkpoint(run)


@pytest.mark.parametrize("name", ["config.json", "sha256.json", "model.safetensors", "vocabulary.json"])
def test_checkpoint_that_is_replaced_while_it_is_read_is_loaded_from_its_successor(save, run, monkeypatch, name):
    """A run in progress deletes the previous checkpoint after each save."""
    save(1)
    expected = {}
    real = checkpoint._reading

    def replace(file):
        if file.name == name and not expected:
            expected["logits"] = logits_of(save(2, best=2))
        return real(file)

    monkeypatch.setattr("gridcap.train.engine.checkpoint._reading", replace)
    loaded = load_checkpoint(run)
    assert loaded.path.name == "step-00000002"
    assert torch.equal(logits_of(loaded.decoder), expected["logits"])


def test_file_is_not_a_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"notes\.txt: not a folder"):
        load_checkpoint(tmp_path / "notes.txt")


def test_pointer_to_missing_checkpoint_is_rejected(save, run):
    save(1)
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(run)


def test_missing_folder_and_folder_without_checkpoint_have_different_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"contains no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(CheckpointError, match=r"photo\.jpg: not a folder"):
        load_checkpoint(tmp_path / "photo.jpg")


def test_weights_for_another_vocabulary_are_rejected(save, run, sign):
    save(1)
    Vocabulary.build(["other words than before, and more"]).save(find_checkpoint(run) / "vocabulary.json")
    sign(find_checkpoint(run))
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(run)


def test_newer_format_version_is_rejected(save, run):
    save(1)
    file = find_checkpoint(run) / "config.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps({**tree, "version": checkpoint.VERSION + 1}))
    with pytest.raises(CheckpointError, match="newer version of gridcap") as caught:
        load_checkpoint(run)
    assert "update" in caught.value.hint


def test_older_format_version_is_rejected(save, run):
    save(1)
    file = find_checkpoint(run) / "config.json"
    tree = json.loads(file.read_text())
    assert tree["version"] == 4
    file.write_text(json.dumps({**tree, "version": 3}))
    with pytest.raises(
        CheckpointError, match=r"step-00000001: written by an older version of gridcap \(format version 3, expected 4\)"
    ) as caught:
        load_checkpoint(run)
    assert "train again" in caught.value.hint


def test_run_folder_accepts_run_or_checkpoint(save, run):
    save(1)
    assert run_folder(find_checkpoint(run)) == run_folder(run) == run
    moved = run.parent / "checkpoints" / "mine"  # the parent folder may have that name
    moved.parent.mkdir()
    run.rename(moved)
    assert run_folder(find_checkpoint(moved)) == run_folder(moved) == moved


def test_checkpoint_replaces_existing_one_of_the_same_step(save, run):
    """After a kill between the rename and the pointer update, the same step is saved again."""
    save(1)
    with pytest.MonkeyPatch.context() as patch:
        name, matches = KILLS["moving the pointers"]
        patch.setattr(f"gridcap.train.engine.checkpoint.{name}", _kill_when(getattr(checkpoint, name), matches))
        with pytest.raises(_Killed):
            save(2, best=2)
    (run / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"another")
    after = logits_of(save(2, best=1))
    assert torch.equal(logits_of(load_checkpoint(run, "last").decoder), after)
    assert folders(run) == ["step-00000001", "step-00000002"]
