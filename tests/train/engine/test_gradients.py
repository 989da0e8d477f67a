"""Training steps as graphs, with stand-ins for CUDA graphs on the CPU, and without reads from the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gridcap.common.config import load_config, recipe_names
from gridcap.common.errors import TrainingError
from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import BOS, EOS, PAD
from gridcap.train.decoders.registry import DECODER_CONFIGS, build_decoder
from gridcap.train.engine.gradients import LENGTHS, Gradients, padded_length
from gridcap.train.engine.job import Runtime
from gridcap.train.engine.loop import fit
from gridcap.train.engine.optimizer import make_optimizer, take_step
from gridcap.train.objectives.cross_entropy import CrossEntropy
from tests.train.conftest import TINY_DECODERS, make_config

V, K = 23, 2


class Replays:
    """Runs the captured function again, as the replay of a graph would."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(2):  # the warm-up must not change the results
            function()
        return function


class Fails(Replays):
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


class Differs(Replays):
    """The replay adds its gradients twice."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        super().capture(function)

        def replay() -> None:
            function()
            function()

        return replay


def batch(lengths: list[list[int]], seed: int = 0) -> CaptionBatch:
    """Return a batch with captions of the given numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(max(image) for image in lengths)
    tokens = torch.full((len(lengths), K, longest + 1), PAD)
    for b, image in enumerate(lengths):
        for k, length in enumerate(image):
            tokens[b, k, :length] = torch.randint(4, V, (length,), generator=generator)
            tokens[b, k, 0], tokens[b, k, length] = BOS, EOS
    grids = torch.randn(len(lengths), 4, 8, generator=generator).half()
    return CaptionBatch(np.arange(len(lengths)), grids, tokens, (tokens[..., 1:] != PAD).flatten().nonzero()[:, 0])


BATCHES = [
    batch([[3, 5], [4, 2], [6, 6]], 1),
    batch([[14, 5], [4, 2], [6, 1]], 2),
    batch([[9, 9], [4, 2], [1, 6]], 3),
    batch([[9, 9]], 4),  # the last batch of an epoch
    batch([[3, 3], [4, 2], [1, 6]], 5),
]


def make(graphs: Any, family: str = "attention", dropout: float = 0.0, **train: Any) -> Gradients:
    torch.manual_seed(0)
    decoder = build_decoder(TINY_DECODERS[family].model_copy(update={"dropout": dropout}), V, (2, 2, 8)).train()
    objective = CrossEntropy(make_config(Path("run"), **train).train)
    return Gradients(decoder, objective, Runtime(torch.device("cpu")), graphs)


def results(gradients: Gradients, steps: list[list[CaptionBatch]]) -> list[torch.Tensor]:
    """Return the terms and the gradients of each step."""
    out = []
    for step, batches in enumerate(steps):
        torch.manual_seed(step)
        out += gradients.compute(batches, 0).values()
        out += [parameter.grad.clone() for parameter in gradients.parameters]
    return out


@pytest.mark.parametrize("family", ["attention", "lstm"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("graphs", [Replays, Fails, Differs])
def test_gradients_with_graphs_equal_those_without(family: str, accumulate: bool, graphs: Any) -> None:
    steps = [BATCHES[:2], [], BATCHES[2:]] if accumulate else [[batch] for batch in BATCHES]
    expected = results(make(None, family, label_smoothing=0.1), steps)
    torch.testing.assert_close(results(make(graphs(), family, label_smoothing=0.1), steps), expected)


def test_a_graph_is_captured_per_padded_length_and_reused() -> None:
    graphs = Replays()
    results(make(graphs), [[batch] for batch in BATCHES])
    assert graphs.captures == 2, "up to 12 and up to 16 tokens; the small batch runs without a graph"


def test_random_numbers_do_not_depend_on_whether_a_graph_is_new() -> None:
    """Resuming captures a graph again in another step."""
    steps = [[batch] for batch in BATCHES]
    whole = results(make(Replays(), dropout=0.5), steps)
    resumed = make(Replays(), dropout=0.5)
    last = len(whole) // len(steps)
    torch.manual_seed(len(steps) - 1)
    part = [*resumed.compute(steps[-1], 0).values(), *(parameter.grad for parameter in resumed.parameters)]
    torch.testing.assert_close(part, whole[-last:], rtol=0, atol=0)


@pytest.mark.parametrize(("graphs", "reason"), [(Fails, "operation not permitted"), (Differs, "results differ")])
def test_training_continues_without_graphs_and_says_why(
    graphs: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    monkeypatch.setattr(Runtime, "print", lambda self, text: printed.append(text))
    gradients = make(graphs())
    results(gradients, [[batch] for batch in BATCHES])
    (line,) = printed
    assert line.startswith("note: training continues without CUDA graphs: ")
    assert reason in line
    assert "\n" not in line


def test_cuda_graph_on_makes_a_failure_an_error() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(TINY_DECODERS["lstm"], V, (2, 2, 8)).train()
    objective = CrossEntropy(make_config(Path("run")).train)
    gradients = Gradients(decoder, objective, Runtime(torch.device("cpu")), Fails(), required=True)
    with pytest.raises(TrainingError, match="cannot run as a CUDA graph: operation not permitted"):
        gradients.compute(BATCHES[:1], 0)


def test_scheduled_sampling_has_a_graph_per_probability() -> None:
    graphs = Replays()
    gradients = make(graphs, scheduled_sampling={"max_prob": 0.2, "prob_step": 0.1, "step_epochs": 1})
    for epoch in range(4):
        gradients.compute(BATCHES[:1], epoch)
    assert graphs.captures == 3


@pytest.mark.parametrize("length", range(1, 50))
def test_captions_are_padded_to_few_lengths(length: int) -> None:
    padded = padded_length(length)
    assert padded >= length
    assert padded in LENGTHS or (padded > LENGTHS[-1] and padded % 8 == 0)


def test_a_run_with_graphs_trains_the_same_weights(tmp_path: Any, train_data: Any, monkeypatch: Any) -> None:
    decoder = TINY_DECODERS["attention"].model_copy(update={"dropout": 0.0})
    expected = fit(make_config(tmp_path / "a", decoder=decoder), train_data, None, False, progress=False)
    graphs = Replays()
    monkeypatch.setattr("gridcap.train.engine.loop.Gradients", lambda *args, **_: Gradients(*args[:3], graphs))
    actual = fit(make_config(tmp_path / "b", decoder=decoder), train_data, None, False, progress=False)
    assert graphs.captures == 1
    assert [row["train_loss"] for row in actual] == pytest.approx([row["train_loss"] for row in expected], rel=1e-5)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "scst"])
@pytest.mark.parametrize("sampling", [0.0, 0.25])
def test_a_training_step_reads_nothing_from_the_device(recipe: str, sampling: float) -> None:
    """Forward pass, loss, backward pass, and clipping; fake tensors have no values, so reading one raises an error."""
    sizes = {"embed_size": 8, **({"heads": 2} if recipe == "transformer" else {})}
    sets = [f"train.decoder.{key}={value}" for key, value in sizes.items()]
    sets.append(f"train.scheduled_sampling={{max_prob: {sampling}, step_epochs: 1, prob_step: 0.25}}")
    settings = load_config(None, None, sets, recipe, decoders=DECODER_CONFIGS).train
    example = BATCHES[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder = build_decoder(settings.decoder, V, (2, 2, 8)).train()
        fake = CaptionBatch(example.images, torch.empty(3, 4, 8), torch.ones(3, K, 7, dtype=torch.int64), torch.ones(9))
        fake = CaptionBatch(fake.images, fake.grids, fake.tokens, torch.ones(9, dtype=torch.int64))
        loss, terms = CrossEntropy(settings)(decoder, fake, epoch=1)
        loss.backward()
        parameters = list(decoder.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters)
        assert torch.nn.utils.get_total_norm(gradients).shape == ()
        optimizer = make_optimizer(settings, parameters)
        assert take_step(optimizer, parameters, terms["tokens"], settings).shape == ()
