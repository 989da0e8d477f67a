"""Decoders are plain PyTorch: they trace as one graph and read nothing from the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gridcap.common.config import DecoderConfig
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig

V, B, K, T, SHAPE = 11, 3, 4, 5, (2, 2, 8)
CONFIGS: dict[str, DecoderConfig] = {
    **{
        cell: AttentionConfig(embed_size=6, hidden_size=10, attention_size=7, cell=cell)
        for cell in ("gru", "lstm", "att2in", "top-down")
    },
    **{
        image: LstmConfig(embed_size=6, hidden_size=10, image_injection=image)
        for image in ("first-input", "initial-state", "every-step")
    },
    "transformer": TransformerConfig(embed_size=8, heads=2, layers=2, feedforward_size=12),
}


@pytest.fixture(params=CONFIGS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return build_decoder(CONFIGS[request.param], V, SHAPE)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 4, 8, generator=generator), torch.randint(1, V, (B, K, T), generator=generator)


def run_forward(decoder: Decoder, grid: Tensor, tokens: Tensor) -> Tensor:
    return decoder(decoder.encode(grid), tokens)[0]


def run_step(decoder: Decoder, grid: Tensor, tokens: Tensor) -> Tensor:
    memory = decoder.encode(grid)
    state = tuple(part.expand(B, K, *part.shape[2:]) for part in decoder.initial_state(memory))
    return decoder.step(tokens[..., 0], state, memory)[0]


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_forward, run_step])
def test_a_decoder_compiles_as_one_graph_with_equal_results(decoder: Decoder, run) -> None:  # type: ignore[no-untyped-def]
    decoder.eval()
    torch._dynamo.reset()
    grid, tokens = inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (run, compiled):
        decoder.zero_grad()
        out = function(decoder, grid, tokens)
        out.square().sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [run_forward, run_step])
def test_a_decoder_reads_nothing_from_the_device(decoder: Decoder, run, precision: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Fake tensors have no values: reading one raises an error."""
    decoder.train()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", precision, enabled=precision != torch.float32),
    ):
        run(decoder, *inputs()).square().sum().backward()


@pytest.mark.parametrize("image", ["first-input", "initial-state", "every-step"])
def test_an_lstm_computes_in_the_autocast_dtype(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in float16, which torch may choose for RNNs by itself."""
    decoder = build_decoder(CONFIGS[image], V, SHAPE).eval()
    seen = []
    lstm = torch.lstm

    def spy(inputs, state, weights, *rest):  # type: ignore[no-untyped-def]
        seen.append((torch.is_autocast_enabled("cpu"), *(part.dtype for part in (inputs, *state, *weights))))
        return lstm(inputs, state, weights, *rest)

    monkeypatch.setattr(torch, "lstm", spy)
    grid, tokens = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.encode(grid)
        logits, _ = decoder(memory, tokens)
        state = decoder.initial_state(memory)
    assert {dtype for _, *dtypes in seen for dtype in dtypes} == {torch.bfloat16}
    assert not any(enabled for enabled, *_ in seen)
    assert {part.dtype for part in state} == {torch.float32}, "the state is not rounded between time steps"
    exact, _ = decoder(decoder.encode(grid), tokens)
    assert (logits.float() - exact).abs().max() < 0.05
