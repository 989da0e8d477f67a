import errno
import json
import math
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gridcap.train.engine.log import RunLog, read_rows


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(number, **more):
    return {"step": number, "epoch": 1, "loss": 2.0, **more}


def write_steps(folder, *rows, rest=""):
    path = folder / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return path


def open_log(folder, history=(), done=0):
    return RunLog(folder, list(history), done)


# --- reading ---


def test_missing_or_empty_log_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "steps.jsonl") == []
    assert read_rows(write_steps(tmp_path)) == []


def test_rows_round_trip(tmp_path):
    rows = [step(1), step(20, note="été\u2028")]
    assert read_rows(write_steps(tmp_path, *rows)) == rows


@pytest.mark.parametrize(
    "rest", ['{"step": 60, "lo', '{"step": 60', "{", '{"step": 60, "loss": 2.0', "\0\0\0\0", "\xff"]
)
def test_truncated_last_line_is_ignored(tmp_path, rest):
    assert read_rows(write_steps(tmp_path, step(20), step(40), rest=rest)) == [step(20), step(40)]


def test_last_line_without_newline_is_read(tmp_path):
    path = write_steps(tmp_path, step(20), rest=json.dumps(step(40)))
    assert read_rows(path) == [step(20), step(40)]


# --- writing ---


def test_steps_and_epochs_are_logged_as_rows(tmp_path):
    log = open_log(tmp_path)
    log.log_step(step(1))
    log.log_step(step(20))
    first, second = {"epoch": 1, "step": 30, "train_loss": 2.0}, {"epoch": 2, "step": 60, "train_loss": 1.0}
    log.log_epoch([first])
    assert lines(tmp_path / "metrics.jsonl") == [first]
    log.log_epoch([first, second])
    log.close()
    assert lines(tmp_path / "metrics.jsonl") == [first, second]
    assert lines(tmp_path / "steps.jsonl") == [step(1), step(20)]


def test_rows_are_flushed_immediately(tmp_path):
    """Programs that follow the log see each row immediately."""
    log = open_log(tmp_path)
    log.log_step(step(1))
    assert read_rows(tmp_path / "steps.jsonl") == [step(1)]
    log.close()


def test_new_run_starts_with_empty_files(tmp_path):
    open_log(tmp_path).close()
    assert (tmp_path / "steps.jsonl").read_text() == ""
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_become_null(tmp_path, value):
    log = open_log(tmp_path)
    log.log_step(step(1, grad_norm=value))
    log.log_epoch([{"epoch": 1, "step": 1, "val_perplexity": value}])
    log.close()
    for name, key in (("steps.jsonl", "grad_norm"), ("metrics.jsonl", "val_perplexity")):
        text = (tmp_path / name).read_text()
        assert json.loads(text)[key] is None
        assert "NaN" not in text
        assert "Infinity" not in text


# --- resuming ---


def test_resume_drops_steps_after_the_checkpoint(tmp_path):
    path = write_steps(tmp_path, step(20), step(40), step(60), step(80), rest='{"step": 100, "lo')
    log = open_log(tmp_path, done=40)
    assert lines(path) == [step(20), step(40)]
    log.log_step(step(60, loss=1.0))
    log.close()
    assert lines(path) == [step(20), step(40), step(60, loss=1.0)]


def test_resume_after_truncated_line_starts_a_new_line(tmp_path):
    path = write_steps(tmp_path, step(20), rest=json.dumps(step(40)))
    log = open_log(tmp_path, done=50)
    log.log_step(step(60))
    log.close()
    assert lines(path) == [step(20), step(40), step(60)]


def test_resume_keeps_only_epochs_of_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    open_log(tmp_path, [{"epoch": 1, "step": 10}], 10).close()
    assert lines(tmp_path / "metrics.jsonl") == [{"epoch": 1, "step": 10}]


# --- TensorBoard ---


def board(folder):
    """Return the (step, value) pairs that TensorBoard reads, by tag."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_contains_every_number_with_its_step(tmp_path):
    log = open_log(tmp_path)
    log.log_step(step(1, learning_rate=0.5))
    log.log_step(step(20, learning_rate=0.25, skipped=None))
    log.log_epoch([{"epoch": 1, "step": 30, "val_cider": 0.75}])
    log.close()
    assert board(tmp_path) == {
        "step/loss": [(1, 2.0), (20, 2.0)],
        "step/learning_rate": [(1, 0.5), (20, 0.25)],
        "epoch/val_cider": [(30, 0.75)],
    }


def test_tensorboard_drops_steps_after_the_checkpoint(tmp_path):
    log = open_log(tmp_path)
    for number in (20, 40, 60):
        log.log_step(step(number))
    log.close()
    log = open_log(tmp_path, done=40)
    log.log_step(step(60, loss=1.0))
    log.close()
    assert board(tmp_path)["step/loss"] == [(20, 2.0), (40, 2.0), (60, 1.0)]


@pytest.mark.parametrize("call", ["log_step", "log_epoch", "close"])
def test_item_31_a_full_disk_names_the_tensorboard_folder(tmp_path, monkeypatch, call):
    log = open_log(tmp_path)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log._tensorboard, "flush", fail)
    monkeypatch.setattr(log._tensorboard, "close", fail)
    arguments = {"log_step": [step(1)], "log_epoch": [[step(1)]], "close": []}[call]
    with pytest.raises(OSError, match="No space") as caught:
        getattr(log, call)(*arguments)
    assert caught.value.filename == str(tmp_path / "tensorboard")
