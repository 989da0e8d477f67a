"""Captions a second from features: greedy search and beams, and the step of self-critical training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.inputs import GRID, WORDS, make_captions
from bench.measure import Row, fresh, rate, rounds
from gridcap.common.process import tune_process

BATCH, LENGTH, V = 50, 20, len(WORDS)
RECIPE = "tutorial-gru"


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Captions a second of greedy search and of a beam; images a second of the self-critical step."""
    count = 1 if quick else 3
    values = rounds(
        count,
        {
            "one": lambda: fresh("bench.decoding:captions", 1, 1),
            "greedy": lambda: fresh("bench.decoding:captions", BATCH, 1),
            "beam one": lambda: fresh("bench.decoding:captions", 1, 5),
            "beam": lambda: fresh("bench.decoding:captions", BATCH, 5),
        },
    )
    sizes = (
        f"{RECIPE}, {V} words, {LENGTH} steps, {BATCH} images a batch, in training's precision, as training validates "
        "(evaluate-decoder computes in float32)"
    )
    yield Row(
        "decoding",
        "greedy search",
        "captions/s",
        values["greedy"],
        values["one"],
        baseline_is="the same, one image at a time",
        wanted={"value": 500},
        note=sizes,
    )
    yield Row(
        "decoding",
        "beam of 5",
        "captions/s",
        values["beam"],
        values["beam one"],
        values["greedy"],
        "the same, one image at a time",
        "greedy search",
        {"value": 200, "of limit": 1 / 3},
        sizes,
    )
    captions = make_captions(work / "rewards.json", 1000)
    values = rounds(
        count,
        {
            "baseline": lambda: fresh("bench.decoding:self_critical", captions, "in turn"),
            "ours": lambda: fresh("bench.decoding:self_critical", captions, "ours"),
            "limit": lambda: fresh("bench.decoding:self_critical", captions, "free"),
        },
    )
    yield Row(
        "decoding",
        "self-critical step",
        "images/s",
        values["ours"],
        values["baseline"],
        values["limit"],
        "sampling, scoring by pycocoevalcap and learning one after the other",
        "the same with free rewards",
        {"of limit": 0.9},
        "13 images x 5 captions of 20 words",
    )


def _decoder(device: Any) -> Any:
    import torch

    from gridcap.common.config import load_config
    from gridcap.train.data.vocabulary import EOS
    from gridcap.train.decoders.build import build_decoder

    torch.manual_seed(0)
    decoder: Any = build_decoder(load_config(recipe=RECIPE).train.decoder, V, GRID).to(device).eval()
    with torch.no_grad():
        decoder.output.bias[EOS] = -1e4  # every caption is as long
    return decoder


def _grids(count: int, device: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.relu(torch.randn(count, GRID[0] * GRID[1], GRID[2], device=device))


def captions(batch: int, beams: int) -> float:
    """Captions a second."""
    tune_process()
    import torch

    from gridcap.common.device import choose_device, choose_precision
    from gridcap.train.decoding.beam import BeamOptions, beam_search

    device = choose_device("auto")
    decoder, grids, precision = _decoder(device), _grids(batch, device), choose_precision("auto", device)

    def search() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            beam_search(decoder, grids, BeamOptions(beams, LENGTH - 1))

    search()
    return rate(batch, search, 4.0)


def self_critical(captions_file: str, how: str) -> float:
    """Images a second of a self-critical step."""
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
    if how == "in turn":
        rewards = _InTurn(references)
    elif how == "free":
        rewards = lambda images, tokens: np.random.default_rng(0).random(tokens.shape[:2], np.float32)  # noqa: E731
    step = SelfCritical(rewards, 5, 19)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-5, fused=True)
    grids = _grids(13, device).half()
    nothing = torch.zeros(0, dtype=torch.int64)
    done, begin = 0, time.perf_counter()
    while True:
        batch = CaptionBatch(np.random.default_rng(done).integers(0, len(references), 13), grids, nothing, nothing)
        loss, terms = step(decoder, batch, 0)
        optimizer.zero_grad()
        torch.autograd.backward(loss / terms["tokens"])
        optimizer.step()
        done += 1
        if done == 2:  # the first two are warm-up
            begin = time.perf_counter()
        if done > 2 and (took := time.perf_counter() - begin) > 4:
            return (done - 2) * 13 / took


class _InTurn:
    """The rewards as the usual code counts them: by pycocoevalcap, with all references of the batch each time."""

    def __init__(self, references: list[list[list[int]]]) -> None:
        self._references = references

    def __call__(self, images: Any, tokens: Any) -> Any:
        import numpy as np
        from pycocoevalcap.cider.cider import Cider

        truth: dict[int, list[str]] = {}
        ours: dict[int, list[str]] = {}
        for b, image in enumerate(images):
            for _k, row in enumerate(tokens[b].tolist()):
                truth[len(truth)] = [" ".join(map(str, caption)) for caption in self._references[image]]
                ours[len(ours)] = [" ".join(map(str, row))]
        _, each = Cider().compute_score(truth, ours)
        return np.asarray(each, np.float32).reshape(tokens.shape[:2])
