"""The reference Att2in2 decoder: its differences from ours, and the patch that installs it."""

import pytest
import torch

import gridcap.train.decoders.build
from bench import reference
from gridcap.common.config import AttentionConfig
from gridcap.train.data.vocabulary import BOS
from gridcap.train.decoders.build import build_decoder

CONFIG = AttentionConfig(
    cell="att2in", output_layer="hidden", embed_size=6, hidden_size=5, attention_size=4, dropout=0.0
)


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.setattr(gridcap.train.decoders.build, "AttentionDecoder", gridcap.train.decoders.build.AttentionDecoder)
    reference.patch_attention_decoder()
    torch.manual_seed(0)
    return build_decoder(CONFIG, 9, (2, 2, 3)).eval()


def test_patch_builds_the_reference_decoder(decoder):
    assert type(decoder) is reference.Att2in2
    assert not [name for name, _ in decoder.named_parameters() if name.split(".")[0] in ("norm", "position", "initial")]
    memory = decoder.encode(torch.randn(2, 4, 3))
    assert all(not part.any() for part in decoder.initial_state(memory))
    shuffled = torch.randn(1, 4, 3)
    tokens = torch.full((1, 1, 1), BOS)
    first, second = (decoder(decoder.encode(grid), tokens)[0] for grid in (shuffled, shuffled[:, [2, 0, 3, 1]]))
    torch.testing.assert_close(first, second)  # the decoder has no positional embedding


def test_attention_follows_the_formula(decoder):
    """Bahdanau's: softmax of v . tanh(key + query), from a zero state, with keys large enough to tell."""
    with torch.no_grad():
        decoder.key.weight.mul_(30)
        decoder.cell.from_hidden.bias.copy_(torch.randn(decoder.cell.from_hidden.bias.shape))
        grid = torch.randn(2, 4, 3)
        _, attention = decoder(decoder.encode(grid), torch.full((2, 1, 1), BOS))
        keys = torch.relu(grid @ decoder.project.weight.T + decoder.project.bias) @ decoder.key.weight.T
        query = decoder.cell.from_hidden.bias[: CONFIG.attention_size]
        expected = (torch.tanh(keys + query) @ decoder.cell.attention.score.weight[0]).softmax(-1)
    assert keys.min() < -1
    torch.testing.assert_close(attention[:, 0, 0], expected)


def test_steps_equal_forward(decoder):
    memory = decoder.encode(torch.randn(2, 4, 3))
    tokens = torch.randint(4, 9, (2, 1, 3))
    logits, _ = decoder(memory, tokens)
    state = decoder.initial_state(memory)
    for i in range(3):
        step, state, _ = decoder.step(tokens[:, :, i], state, memory)
        torch.testing.assert_close(step[:, 0], logits.reshape(2, 3, 9)[:, i])
