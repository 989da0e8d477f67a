"""The step of training at the sizes of COCO, and what the trainer waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.device import device_rate, matrix_rate
from bench.inputs import GRID, WORDS, make_captions, make_store
from bench.measure import Row, fresh, rounds
from gridcap.common.process import tune_process

B, K, T, V, H = 13, 5, 20, len(WORDS), 512
STEPS = {"tutorial-gru": 390.0, "att2in": 330.0, "lstm-init": 700.0}  # captions a second wanted of each
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
    """Captions a second of a step, and the share of an epoch that the trainer waits for batches."""
    for recipe, wanted in STEPS.items():
        values = rounds(
            1 if quick else 3,
            {
                "baseline": partial(fresh, "bench.training:naive", recipe),
                "ours": partial(fresh, "bench.training:ours", recipe),
                "limit": partial(fresh, "bench.training:limit", recipe),
            },
        )
        yield Row(
            "training",
            f"a step of {recipe}",
            "captions/s",
            values["ours"],
            values["baseline"],
            values["limit"],
            "float32, word by word, the grid projected anew at each",
            "the step's operations at the rate of a large matrix product",
            {"value": wanted, "of limit": 0.5},
            f"{B} images x {K} captions of {T} words, {V} words, hidden {H}, 8 x 8 x 2048",
        )
    images = B * (8 if quick else 32)
    store, captions = make_store(work / "train.h5", images), make_captions(work / "captions.json", images)
    for recipe in RECIPES[-1:] if quick else RECIPES:
        shares = [
            fresh("bench.training:waiting", recipe, store, captions, work / f"run-{recipe}-{turn}")
            for turn in range(1 if quick else 3)
        ]
        yield Row(
            "training",
            f"{recipe} waits for batches",
            "share",
            shares,
            wanted={"at most": 0.02},
            note=f"of the time of an epoch of {images // B} steps, the first included",
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


def _captions_a_second(step: Callable[[], object], device: Any) -> float:
    return device_rate(B * K, step, device, 4.0)


def _step_of_ours(recipe: str) -> tuple[Callable[[], object], Any]:
    """A step as `train.loop` takes it, without reading and logging."""
    import numpy as np
    import torch

    from gridcap.common.device import choose_device, choose_precision
    from gridcap.train.data.batch import CaptionBatch
    from gridcap.train.decoders.build import build_decoder
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


def ours(recipe: str) -> float:
    """Captions a second."""
    tune_process()
    return _captions_a_second(*_step_of_ours(recipe))


def naive(recipe: str) -> float:
    """Captions a second of the same sizes, as tutorials train them."""
    import torch

    from bench.naive import NaiveAttention, NaiveInit, naive_step
    from gridcap.common.device import choose_device

    decoder, device = _settings(recipe).decoder, choose_device("auto")
    if recipe == "lstm-init":
        model: Any = NaiveInit(decoder.embed_size, H, decoder.image_bottleneck, V, GRID[2])
    else:
        cell = "gru" if decoder.cell == "gru" else "lstm"
        model = NaiveAttention(cell, decoder.embed_size, H, decoder.attention_size, V, GRID[2])
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters())
    grids, tokens = _tensors(device)
    return _captions_a_second(lambda: naive_step(model, optimizer, grids.float(), tokens), device)


def limit(recipe: str) -> float:
    """Captions a second if all operations of a step went at the rate of a large matrix product."""
    tune_process()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    step, device = _step_of_ours(recipe)
    # torch.nn.LSTM as one operation of oneDNN or cuDNN is not counted, its matrix products are.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        step()
    return matrix_rate(device) / float(counter.get_total_flops()) * B * K


def waiting(recipe: str, store: str, captions: str, run: str) -> float:
    """The share of an epoch of the real trainer in which it waits for a batch."""
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
