"""The Transformer decoder against PyTorch's layers, and its cache."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from gridcap.train.decoders.transformer import TransformerConfig, TransformerDecoder, _sinusoids

torch.set_num_threads(1)

V, B, K, T, P, C, D, HEADS, LAYERS = 11, 2, 3, 5, 4, 6, 8, 2, 2


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    config = TransformerConfig(embed_size=D, heads=HEADS, layers=LAYERS, feedforward_size=12)
    return TransformerDecoder(config, V, P, C).eval()


@pytest.fixture
def grid():
    return torch.randn(B, P, C, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return torch.randint(1, V, (B, K, T), generator=torch.Generator().manual_seed(2))


def reference_layer(layer, memory_weight):
    """Return PyTorch's pre-norm decoder layer with the weights of ours; its memory is the projected grid."""
    twin = nn.TransformerDecoderLayer(D, HEADS, 12, 0.0, batch_first=True, norm_first=True).eval()
    weights = {
        "self_attn.in_proj_weight": layer.self_attn_qkv.weight,
        "self_attn.in_proj_bias": torch.zeros(3 * D),
        "self_attn.out_proj.weight": layer.self_attn_output.weight,
        "self_attn.out_proj.bias": layer.self_attn_output.bias,
        "multihead_attn.in_proj_weight": torch.cat([layer.cross_attn_query.weight, memory_weight]),
        "multihead_attn.in_proj_bias": torch.zeros(3 * D),
        "multihead_attn.out_proj.weight": layer.cross_attn_output.weight,
        "multihead_attn.out_proj.bias": layer.cross_attn_output.bias,
        "linear1.weight": layer.feedforward[1].weight,
        "linear1.bias": layer.feedforward[1].bias,
        "linear2.weight": layer.feedforward[4].weight,
        "linear2.bias": layer.feedforward[4].bias,
    }
    norms = (layer.self_attn_norm, layer.cross_attn_norm, layer.feedforward[0])
    weights |= {f"norm{i}.{k}": v for i, norm in enumerate(norms, 1) for k, v in norm.state_dict().items()}
    twin.load_state_dict(weights)
    return twin


def test_equals_pytorchs_pre_norm_decoder(decoder, grid, tokens):
    with torch.no_grad():
        for parameter in decoder.parameters():  # norms that are not the identity
            parameter += torch.randn(parameter.shape) * 0.1
    logits, attention = decoder(decoder.encode(grid), tokens)
    cells = decoder.memory_norm(
        decoder.project(F.layer_norm(grid, (C,), *decoder.norm.parameters())) + decoder.position
    )
    cells = cells.repeat_interleave(K, 0)
    flat = tokens.flatten(0, 1)
    x = decoder.embedding(flat) + _sinusoids(0, decoder.embedding(flat))
    mask = torch.full((T, T), -math.inf).triu(1)
    for layer, memory_weight in zip(decoder.layers, decoder.memory.weight.chunk(LAYERS), strict=True):
        twin = reference_layer(layer, memory_weight)
        attended = x + twin._sa_block(twin.norm1(x), mask, None)
        _, weights_of_twin = twin.multihead_attn(twin.norm2(attended), cells, cells)
        x = twin(x, cells, tgt_mask=mask)
    torch.testing.assert_close(logits.flatten(0, 1), decoder.output(decoder.output_norm(x)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.flatten(0, 1), weights_of_twin, atol=1e-5, rtol=1e-5)


def test_cache_grows_by_one_token_per_step(decoder, grid, tokens):
    memory = decoder.encode(grid)
    assert [part.shape for part in memory] == [(B, HEADS, P, D // HEADS)] * 2 * LAYERS, "not repeated over K"
    state = decoder.initial_state(memory)
    assert [part.shape for part in state] == [(B, 1, 0, D)] * 2 * LAYERS
    state = tuple(part.expand(B, K, 0, D) for part in state)
    for t in range(3):
        _, state, _ = decoder.step(tokens[:, :, t], state, memory)
        assert [part.shape for part in state] == [(B, K, t + 1, D)] * 2 * LAYERS


def test_gathered_cache_equals_rereading_the_selected_captions(decoder, grid, tokens):
    memory = decoder.encode(grid)
    read = lambda given: _read(decoder, memory, given)  # noqa: E731
    selected = torch.tensor([[2, 0, 0], [1, 1, 2]])
    past = tokens[:, :, :3]
    gathered = tuple(part.gather(1, selected[..., None, None].expand_as(part)) for part in read(past))
    again = read(past.gather(1, selected[..., None].expand_as(past)))
    for one, other in zip(gathered, again, strict=True):
        torch.testing.assert_close(one, other)


def _read(decoder, memory, tokens):
    state = tuple(part.expand(B, K, 0, D) for part in decoder.initial_state(memory))
    for t in range(tokens.shape[2]):
        _, state, _ = decoder.step(tokens[:, :, t], state, memory)
    return state


def test_sinusoids_support_any_length():
    embedded = torch.zeros(1, 1, 500, 8)
    table = _sinusoids(0, embedded)
    for position, i in ((0, 0), (1, 0), (7, 2), (499, 3)):
        angle = position / 10000 ** (2 * i / 8)
        torch.testing.assert_close(table[position, [i, 4 + i]], torch.tensor([math.sin(angle), math.cos(angle)]))
    torch.testing.assert_close(_sinusoids(30, embedded[:, :, :1])[0], table[30])
    assert _sinusoids(3, torch.zeros(1, 1, 2, 5)).shape == (2, 5)


def test_logits_depend_on_token_order(decoder, grid):
    memory = decoder.encode(grid)
    one, other = torch.tensor([4, 5, 6, 7]), torch.tensor([5, 4, 6, 7])
    logits = [decoder(memory, given.expand(B, 1, 4))[0][:, :, -1] for given in (one, other)]
    assert not torch.allclose(*logits, atol=1e-4)


def test_trailing_padding_does_not_affect_earlier_logits(decoder, grid, tokens):
    memory = decoder.encode(grid)
    padded = torch.cat([tokens, torch.zeros(B, K, 3, dtype=torch.int64)], 2)
    torch.testing.assert_close(decoder(memory, padded)[0][:, :, :T], decoder(memory, tokens)[0])
