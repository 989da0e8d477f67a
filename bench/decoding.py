"""Decoding throughput from features, and the step of self-critical sequence training (SCST)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.inputs import GRID, WORDS, make_captions
from bench.measure import Row, call_in_process, rate, run_rounds
from gridcap.common.process import tune_process

BATCH, LENGTH, V = 50, 20, len(WORDS)
RECIPE = "tutorial-gru"


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure captions per second of greedy and beam search, and images per second of the SCST step."""
    count = 1 if quick else 3
    values = run_rounds(
        count,
        {
            "single greedy": lambda: call_in_process("bench.decoding:captions", 1, 1),
            "greedy": lambda: call_in_process("bench.decoding:captions", BATCH, 1),
            "single beam": lambda: call_in_process("bench.decoding:captions", 1, 5),
            "beam": lambda: call_in_process("bench.decoding:captions", BATCH, 5),
        },
    )
    note = (
        f"{RECIPE}, {V} tokens, {LENGTH} time steps, batch size {BATCH}, in the precision of training, as in "
        "validation (evaluate-decoder uses float32)"
    )
    yield Row(
        "decoding",
        "greedy search",
        "captions/s",
        values["greedy"],
        values["single greedy"],
        baseline_name="batch size 1",
        targets={"minimum": 500},
        note=note,
    )
    yield Row(
        "decoding",
        "beam search, beam size 5",
        "captions/s",
        values["beam"],
        values["single beam"],
        values["greedy"],
        "batch size 1",
        "greedy search",
        {"minimum": 200, "fraction of upper bound": 1 / 3},
        note,
    )
    for name, beam_size in (("greedy search", 1), ("beam search, beam size 5", 5)):
        yield Row(
            "decoding",
            f"operators per token, {name}",
            "operators",
            [call_in_process("bench.decoding:operators", beam_size)],
            note=f"{RECIPE}, batch size {BATCH}, without views",
        )
    captions = make_captions(work / "rewards.json", 1000)
    values = run_rounds(
        count,
        {
            "baseline": lambda: call_in_process("bench.decoding:scst", captions, "sequential"),
            "gridcap": lambda: call_in_process("bench.decoding:scst", captions, "gridcap"),
            "upper bound": lambda: call_in_process("bench.decoding:scst", captions, "constant-time"),
        },
    )
    yield Row(
        "decoding",
        "SCST step",
        "images/s",
        values["gridcap"],
        values["baseline"],
        values["upper bound"],
        "sampling, rewards from pycocoevalcap, and backward pass in sequence",
        "random rewards, which cost nothing",
        {"fraction of upper bound": 0.9},
        "13 images x 5 captions of 20 tokens",
    )


def _decoder(device: Any) -> Any:
    import torch

    from gridcap.common.config import load_config
    from gridcap.train.data.vocabulary import EOS
    from gridcap.train.decoders.registry import build_decoder

    torch.manual_seed(0)
    decoder: Any = build_decoder(load_config(recipe=RECIPE).train.decoder, V, GRID).to(device).eval()
    with torch.no_grad():
        decoder.output.bias[EOS] = -1e4  # all captions have the maximum length
    return decoder


def _grids(count: int, device: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.relu(torch.randn(count, GRID[0] * GRID[1], GRID[2], device=device))


def captions(batch: int, beam_size: int) -> float:
    """Return captions per second of beam search; beam size 1 is greedy search."""
    tune_process()
    import torch

    from gridcap.common.device import choose_device, choose_precision
    from gridcap.train.decoding.beam import BeamOptions, beam_search

    device = choose_device("auto")
    decoder, grids, precision = _decoder(device), _grids(batch, device), choose_precision("auto", device)

    def search() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            beam_search(decoder, grids, BeamOptions(beam_size, LENGTH - 1))

    search()
    return rate(batch, search, 4.0)


def operators(beam_size: int) -> float:
    """Return the number of operators per decoded token of a batch."""
    import torch

    from bench.operators import count_operators
    from gridcap.train.decoding.beam import BeamOptions, beam_search

    cpu = torch.device("cpu")
    decoder, grids = _decoder(cpu), _grids(BATCH, cpu)
    return count_operators(lambda: beam_search(decoder, grids, BeamOptions(beam_size, LENGTH - 1))) / (LENGTH - 1)


def scst(captions_file: str, reward: str) -> float:
    """Return images per second of an SCST step with one kind of reward computation."""
    tune_process()
    import json

    import numpy as np
    import torch

    from gridcap.common.device import choose_device
    from gridcap.train.data.batch import CaptionBatch
    from gridcap.train.objectives.reward import CaptionReward
    from gridcap.train.objectives.scst import SelfCritical

    tree = json.loads(Path(captions_file).read_text())
    references: list[list[list[int]]] = [[] for _ in tree["images"]]
    for annotation in tree["annotations"]:
        references[annotation["image_id"]].append(
            [int(word.removeprefix("word")) for word in annotation["caption"].split()]
        )
    device = choose_device("auto")
    decoder = _decoder(device).train()
    rewards: Any = CaptionReward(references)
    if reward == "sequential":
        rewards = _PycocoevalcapReward(references)
    elif reward == "constant-time":
        rewards = lambda images, tokens: np.random.default_rng(0).random(tokens.shape[:2], np.float32)  # noqa: E731
    step = SelfCritical(rewards, 5, 19)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-5, fused=True)
    grids = _grids(13, device).half()
    empty = torch.zeros(0, dtype=torch.int64)
    done, start = 0, time.perf_counter()
    while True:
        batch = CaptionBatch(np.random.default_rng(done).integers(0, len(references), 13), grids, empty, empty)
        loss, terms = step(decoder, batch, 0)
        optimizer.zero_grad()
        torch.autograd.backward(loss / terms["tokens"])
        optimizer.step()
        done += 1
        if done == 2:  # the first two are warmup
            start = time.perf_counter()
        if done > 2 and (seconds := time.perf_counter() - start) > 4:
            return (done - 2) * 13 / seconds


class _PycocoevalcapReward:
    """CIDEr rewards from pycocoevalcap, which processes all references of the batch in every call."""

    def __init__(self, references: list[list[list[int]]]) -> None:
        self._references = references

    def __call__(self, images: Any, tokens: Any) -> Any:
        import numpy as np
        from pycocoevalcap.cider.cider import Cider

        truth: dict[int, list[str]] = {}
        samples: dict[int, list[str]] = {}
        for b, image in enumerate(images):
            for _k, row in enumerate(tokens[b].tolist()):
                truth[len(truth)] = [" ".join(map(str, caption)) for caption in self._references[image]]
                samples[len(samples)] = [" ".join(map(str, row))]
        _, scores = Cider().compute_score(truth, samples)
        return np.asarray(scores, np.float32).reshape(tokens.shape[:2])
