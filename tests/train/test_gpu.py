"""Training on a GPU matches training on the CPU, and resuming matches an uninterrupted run."""

from __future__ import annotations

import pytest
import torch

from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.engine.loop import fit
from gridcap.train.evaluate import EvaluationOptions, evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = {
    "ema_decay": 0.9,
    "grad_accum_steps": 2,
    "label_smoothing": 0.1,
    "scheduled_sampling": {"max_prob": 0.5, "prob_step": 0.5},
}


@pytest.fixture
def data(tmp_path, new_data):
    return new_data(tmp_path / "train.h5", 24), new_data(tmp_path / "val.h5", 5, first_id=500, seed=1)


def losses(history):
    return [row["train_loss"] for row in history]


def test_gpu_in_float32_matches_cpu(tmp_path, data, new_config, tiny_decoders):
    decoder = tiny_decoders["attention"].model_copy(update={"dropout": 0.0})  # dropout masks differ between devices
    runs = {
        device: fit(
            new_config(tmp_path / device, epochs=3, device=device, decoder=decoder), *data, False, progress=False
        )
        for device in ("cpu", "cuda")
    }
    assert losses(runs["cuda"]) == pytest.approx(losses(runs["cpu"]), rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["cross-entropy", "scst"])
def test_resume_on_gpu_matches_uninterrupted_run(tmp_path, data, new_config, objective, precision):
    settings = dict(SETTINGS, device="cuda", precision=precision)
    if objective == "scst":
        fit(new_config(tmp_path / "start", epochs=3, device="cuda"), *data, False, progress=False)
        settings |= {"objective": "scst", "init_from": tmp_path / "start", "scst": {"samples": 2}}
    whole = fit(new_config(tmp_path / "whole", epochs=2, **settings), *data, False, progress=False)
    fit(new_config(tmp_path / "cut", epochs=1, **settings), *data, False, progress=False)
    resumed = fit(new_config(tmp_path / "cut", epochs=2, **settings), *data, True, progress=False)
    assert [row["epoch"] for row in resumed] == [row["epoch"] for row in whole]
    ours, theirs = (load_checkpoint(tmp_path / name).decoder.state_dict() for name in ("cut", "whole"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_decoder_trained_on_gpu_gives_same_captions_on_cpu_and_gpu(tmp_path, data, new_config):
    config = new_config(tmp_path / "run", epochs=3, device="cuda")
    fit(config, *data, False, progress=False)
    evaluations = [
        evaluate(
            load_checkpoint(tmp_path / "run"), data[1], config.caption, EvaluationOptions(str(device), progress=False)
        )
        for device in ("cpu", "cuda")
    ]
    assert evaluations[0].captions == evaluations[1].captions
