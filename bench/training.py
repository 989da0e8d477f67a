"""Throughput of a training step at COCO sizes, and the time the trainer waits for data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.device import device_rate, matmul_rate
from bench.inputs import GRID, WORDS, make_captions, make_store
from bench.measure import Row, call_in_process, run_rounds
from gridcap.common.process import tune_process

B, K, T, V, H = 13, 5, 20, len(WORDS), 512
STEP_TARGETS = {"tutorial-gru": 390.0, "att2in": 330.0, "lstm-init": 700.0}  # captions/s
RECIPES = (
    "show-and-tell",
    "lstm-init",
    "lstm-inject",
    "tutorial-gru",
    "soft-attention",
    "att2in",
    "top-down",
    "transformer",
)


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure captions per second of a training step, and the fraction of an epoch spent waiting for batches."""
    for recipe, target in STEP_TARGETS.items():
        values = run_rounds(
            1 if quick else 3,
            {
                "baseline": partial(call_in_process, "bench.training:baseline", recipe),
                "gridcap": partial(call_in_process, "bench.training:gridcap", recipe),
                "upper bound": partial(call_in_process, "bench.training:upper_bound", recipe),
            },
        )
        yield Row(
            "training",
            f"training step, {recipe}",
            "captions/s",
            values["gridcap"],
            values["baseline"],
            values["upper bound"],
            "float32, one cell call per token, the grid projected in every time step",
            "all operations at the rate of a large matrix product",
            {"minimum": target, "fraction of upper bound": 0.5},
            f"{B} images x {K} captions of {T} tokens, vocabulary {V}, hidden size {H}, grid 8 x 8 x 2048",
        )
    for recipe in RECIPES:
        yield Row(
            "training",
            f"operators of a training step, {recipe}",
            "operators",
            [call_in_process("bench.training:operators", recipe)],
            note=f"forward and backward pass, clipping, and optimizer; {T} time steps, without views",
        )
    images = B * (8 if quick else 32)
    store, captions = make_store(work / "train.h5", images), make_captions(work / "captions.json", images)
    for recipe in RECIPES[-1:] if quick else RECIPES:
        fractions = [
            call_in_process("bench.training:data_wait", recipe, store, captions, work / f"run-{recipe}-{attempt}")
            for attempt in range(1 if quick else 3)
        ]
        yield Row(
            "training",
            f"data wait, {recipe}",
            "fraction",
            fractions,
            targets={"maximum": 0.02},
            note=f"fraction of the time of an epoch of {images // B} steps, including the first",
        )


def _settings(recipe: str) -> Any:
    from gridcap.common.config import load_config

    return load_config(None, {"train.decoder.hidden_size": H}, recipe=recipe).train


def _tensors(device: Any) -> tuple[Any, Any]:
    import torch

    from gridcap.train.data.vocabulary import BOS, EOS

    torch.manual_seed(0)
    tokens = torch.randint(4, V, (B, K, T + 1))
    tokens[..., 0], tokens[..., -1] = BOS, EOS
    grids = torch.relu(torch.randn(B, GRID[0] * GRID[1], GRID[2])).half()
    return grids.to(device), tokens.to(device)


def _captions_per_second(step: Callable[[], object], device: Any) -> float:
    return device_rate(B * K, step, device, 4.0)


def _gridcap_step(recipe: str) -> tuple[Callable[[], object], Any]:
    """Return a training step, without data loading and logging, and its device."""
    import numpy as np
    import torch

    from gridcap.common.device import choose_device, choose_precision
    from gridcap.train.data.batch import CaptionBatch
    from gridcap.train.decoders.registry import build_decoder
    from gridcap.train.engine.optimizer import make_optimizer, take_step
    from gridcap.train.objectives.cross_entropy import CrossEntropy

    settings, device = _settings(recipe), choose_device("auto")
    precision = choose_precision("auto", device)
    decoder = build_decoder(settings.decoder, V, GRID).to(device).train()
    parameters = list(decoder.parameters())
    objective, optimizer = CrossEntropy(settings), make_optimizer(settings, parameters)
    grids, tokens = _tensors(device)
    batch = CaptionBatch(np.arange(B), grids, tokens, torch.arange(B * K * T, device=device))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss, terms = objective(decoder, batch, 0)
        torch.autograd.backward(loss)
        take_step(optimizer, parameters, terms["tokens"], settings)

    return step, device


def gridcap(recipe: str) -> float:
    """Return captions per second of a Gridcap training step."""
    tune_process()
    return _captions_per_second(*_gridcap_step(recipe))


def baseline(recipe: str) -> float:
    """Return captions per second of the baseline decoder with the same sizes."""
    import torch

    from bench.baseline import BaselineAttention, BaselineLSTM, baseline_step
    from gridcap.common.device import choose_device

    decoder, device = _settings(recipe).decoder, choose_device("auto")
    if recipe == "lstm-init":
        model: Any = BaselineLSTM(decoder.embed_size, H, decoder.image_bottleneck, V, GRID[2])
    else:
        cell = "gru" if decoder.cell == "gru" else "lstm"
        model = BaselineAttention(cell, decoder.embed_size, H, decoder.attention_size, V, GRID[2])
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters())
    grids, tokens = _tensors(device)
    return _captions_per_second(lambda: baseline_step(model, optimizer, grids.float(), tokens), device)


def upper_bound(recipe: str) -> float:
    """Return captions per second if all operations of a step ran at the rate of a large matrix product."""
    tune_process()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    step, device = _gridcap_step(recipe)
    # FLOPs of torch.nn.LSTM are only counted without its fused oneDNN and cuDNN implementations.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        step()
    return matmul_rate(device) / float(counter.get_total_flops()) * B * K


def operators(recipe: str) -> float:
    """Return the number of operators of a training step."""
    from bench.operators import count_operators

    return float(count_operators(_gridcap_step(recipe)[0]))


def data_wait(recipe: str, store: str, captions: str, run: str) -> float:
    """Return the fraction of an epoch that train-decoder spends waiting for batches."""
    import json
    import subprocess
    import sys

    command = "from gridcap.train.cli import train_decoder; train_decoder()"
    subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            "--recipe",
            recipe,
            "--features",
            store,
            "--annotations",
            captions,
            "--output",
            run,
            "--epochs",
            "1",
            "--batch-size",
            str(B),
        ],
        check=True,
        capture_output=True,
    )
    return float(json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])["data_wait"])
