"""The first stop signal waits until the current step is done; a second one does not."""

import contextlib
import signal

import pytest
import torch

import gridcap.train.engine.loop
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.engine.checkpoint import find_checkpoint, load_training_state
from gridcap.train.engine.distributed import Ranks
from gridcap.train.engine.interrupt import defer_stop_signals
from gridcap.train.engine.job import Runtime
from gridcap.train.engine.loop import fit
from gridcap.train.engine.validation import validate


class _StopError(Exception):
    pass


@pytest.fixture
def handlers():
    """Install handlers that raise, as the commands do, and restore the original ones afterwards."""

    def stop(number, frame):
        raise _StopError(number)

    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_first_signal_is_deferred_and_then_raised_again(handlers, number):
    with defer_stop_signals() as pending:
        assert pending() is None
        signal.raise_signal(number)
        with pytest.raises(_StopError) as caught:
            pending()()
    assert caught.value.args == (number,)


def test_second_signal_takes_effect_immediately(handlers):
    with defer_stop_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(_StopError):
            signal.raise_signal(signal.SIGINT)


def test_original_handlers_are_restored(handlers):
    with defer_stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not handlers
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is handlers


def test_ignored_signals_stay_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with defer_stop_signals() as pending:
        signal.raise_signal(signal.SIGINT)
        assert pending() is None


@pytest.mark.parametrize("step", [6, 4], ids=["in an epoch", "in its last step"])
def test_stopped_run_saves_the_current_step_and_resumes_exactly(
    tmp_path, new_config, train_data, handlers, monkeypatch, step
):
    real = gridcap.train.engine.loop.train_step

    def interrupted(self, run, *args):
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, run, *args)

    with monkeypatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.train_step", interrupted)
        with pytest.raises(_StopError):
            fit(new_config(tmp_path / "run"), train_data, None, False, progress=False)
    assert find_checkpoint(tmp_path / "run", "last").name == f"step-{step + 1:08}", (
        "the step during which the signal arrived"
    )
    fit(new_config(tmp_path / "run"), train_data, None, True, progress=False)
    fit(new_config(tmp_path / "whole"), train_data, None, False, progress=False)
    ours, theirs = (find_checkpoint(tmp_path / name, "last") / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_item_31_stop_during_validation_keeps_the_trained_epoch(
    tmp_path, new_config, train_data, val_data, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(new_config(tmp_path / "run"), train_data, val_data, False, progress=False)
    assert find_checkpoint(tmp_path / "run", "last").name != "step-00000000"
    resumed = fit(new_config(tmp_path / "run"), train_data, val_data, True, progress=False)
    whole = fit(new_config(tmp_path / "whole"), train_data, val_data, False, progress=False)
    timing = {"seconds", "data_wait"}
    assert [{k: v for k, v in row.items() if k not in timing} for row in resumed] == [
        {k: v for k, v in row.items() if k not in timing} for row in whole
    ]
    ours, theirs = (find_checkpoint(tmp_path / name, "last") / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_item_31_several_ranks_save_the_epoch_before_validation(
    tmp_path, new_config, train_data, val_data, monkeypatch
):
    """Another rank that is stopped during validation ends this one inside a collective, where it cannot save."""

    def killed(*args):
        raise SystemExit(1)

    monkeypatch.setattr("gridcap.train.engine.loop.validate", killed)
    for name, fake in (
        ("all_reduce", lambda self, tensors: None),
        ("broadcast", lambda self, tensors: None),
        ("any", lambda self, value: value),
        ("all_gather", lambda self, value: [value] * self.world_size),
    ):
        monkeypatch.setattr(Ranks, name, fake)
    monkeypatch.setattr("gridcap.train.engine.loop.process_group", lambda *args: contextlib.nullcontext())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        fit(new_config(tmp_path / "run"), train_data, val_data, False, progress=False)
    state = load_training_state(find_checkpoint(tmp_path / "run", "last"))
    assert state["step"] > 0


def test_item_31_stop_during_a_checkpoint_completes_it(tmp_path, new_config, train_data, handlers, monkeypatch):
    real = gridcap.train.engine.loop.save_checkpoint

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr("gridcap.train.engine.loop.save_checkpoint", interrupted)
    with pytest.raises(_StopError):
        fit(new_config(tmp_path / "run"), train_data, None, False, progress=False)
    assert find_checkpoint(tmp_path / "run", "last").name == "step-00000005"


@pytest.mark.parametrize("batch", [0, 2], ids=["first batch", "later batch"])
def test_item_31_signal_to_another_rank_during_validation_stops_all_with_the_trained_epoch(
    tmp_path, new_config, train_data, val_data, handlers, monkeypatch, batch
):
    """`Ranks.any` is true on every rank after a signal to one of them."""
    real, calls = gridcap.train.engine.loop.validate, []

    def interrupted(*args):
        *inputs, before_batch = args

        def stop_at_batch():
            calls.append(len(calls))
            with monkeypatch.context() as patch:
                patch.setattr(Ranks, "any", lambda self, value: calls[-1] == batch)
                before_batch()

        return real(*inputs, stop_at_batch)

    config = new_config(tmp_path / "run", batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr("gridcap.train.engine.loop.validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config, train_data, val_data, False, progress=False)
    steps = -(-len(train_data) // 2)
    assert calls[-1] == batch
    assert find_checkpoint(tmp_path / "run", "last").name == f"step-{steps:08}"
    assert fit(config, train_data, val_data, True, progress=False)[0]["step"] == steps


@pytest.mark.parametrize("count", [1, 3, 4])
def test_item_31_all_ranks_agree_equally_often_during_validation(
    tmp_path, new_config, val_data, train_data, monkeypatch, count
):
    """Otherwise a rank without a last batch would leave the others waiting."""
    monkeypatch.setattr(Ranks, "all_gather", lambda self, value: [value])
    vocabulary = Vocabulary.build([text for image in train_data.captions for text in image], None)
    settings = new_config(tmp_path / "run", batch_size=2 * count).train
    decoder = build_decoder(settings.decoder, len(vocabulary), (2, 2, 8))
    calls = [[] for _ in range(count)]
    for rank in range(count):
        runtime = Runtime(torch.device("cpu"), ranks=Ranks(rank, count))
        validate(decoder, val_data, vocabulary, settings, runtime, lambda rank=rank: calls[rank].append(1))
    assert len(val_data) % (2 * count), "some ranks have fewer batches than others"
    assert len({len(each) for each in calls}) == 1


def test_item_31_failed_validation_keeps_the_trained_epoch(tmp_path, new_config, train_data, val_data, monkeypatch):
    def fail(*args):
        raise OSError("the share is gone")

    monkeypatch.setattr("gridcap.train.engine.loop.validate", fail)
    with pytest.raises(OSError, match="the share is gone"):
        fit(new_config(tmp_path / "run"), train_data, val_data, False, progress=False)
    assert find_checkpoint(tmp_path / "run", "last").name != "step-00000000"
