"""Recurrent cells against the formulas of the papers, for a single caption and step."""

import pytest
import torch
from torch import nn

from gridcap.train.decoders.attention import AttentionConfig, AttentionDecoder
from gridcap.train.decoders.layers.cells import AttentionInputs

torch.set_num_threads(1)

V, B, K, P, C, E, H, A = 11, 2, 3, 4, 8, 6, 10, 7


def build(cell, **options) -> AttentionDecoder:
    torch.manual_seed(0)
    options = {"output_layer": "hidden", "embed_size": E, "hidden_size": H, "attention_size": A} | options
    return AttentionDecoder(AttentionConfig(cell=cell, **options), V, P, C).eval()


def grid():
    return torch.randn(B, P, C, generator=torch.Generator().manual_seed(1)) * 3


def some_state(decoder):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(B, K, H, generator=generator) for _ in range(decoder.cell.states))


TOKENS = torch.tensor([[4, 5, 6], [7, 8, 9]])
AT = (1, 2)  # the image and caption under test


def step(decoder):
    """Run one step from a random state; return the outputs and inputs of caption AT."""
    memory, state = decoder.encode(grid()), some_state(decoder)
    logits, after, weights = decoder.step(TOKENS, state, memory)
    before = [part[AT] for part in state]
    token, mean = decoder.embedding(TOKENS[AT]), memory[0][AT[0]].mean(0)
    return logits[AT], [part[AT] for part in after], weights[AT], before, token, mean, memory[0][AT[0]]


def attend(decoder, linear, hidden, cells):
    """Compute Bahdanau's attention cell by cell; the query is the first A outputs of `linear`."""
    query = (linear.weight @ hidden + linear.bias)[:A]
    scores = [decoder.cell.attention.score(torch.tanh(decoder.key(cell) + query)) for cell in cells]
    weights = torch.cat(scores).softmax(0)
    return weights, sum(w * cell for w, cell in zip(weights, cells, strict=True))


def lstm(sums, c):
    i, f, o, g = sums.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_gru_equals_nn_gru_cell_over_context_and_token():
    decoder = build("gru")
    cell = decoder.cell
    _, (after,), weights, (h,), token, _, cells = step(decoder)
    expected, context = attend(decoder, cell.from_hidden, h, cells)
    torch.testing.assert_close(weights, expected)
    reference = nn.GRUCell(2 * E, H)
    reference.weight_ih.data = torch.cat([cell.from_context.weight, cell.from_token.weight], 1)
    reference.bias_ih.data = cell.from_token.bias
    reference.weight_hh.data, reference.bias_hh.data = cell.from_hidden.weight[A:], cell.from_hidden.bias[A:]
    torch.testing.assert_close(after, reference(torch.cat([context, token])[None], h[None])[0])


def test_lstm_reads_context_and_token():
    decoder = build("lstm")
    cell = decoder.cell
    _, after, weights, (h, c), token, _, cells = step(decoder)
    expected, context = attend(decoder, cell.from_hidden, h, cells)
    torch.testing.assert_close(weights, expected)
    sums = cell.from_token(token) + cell.from_context(context) + cell.from_hidden(h)[A:]
    torch.testing.assert_close(after, list(lstm(sums, c)))


def test_att2in_uses_the_maximum_candidate_and_context_enters_only_the_candidates():
    decoder = build("att2in")
    cell = decoder.cell
    _, after, weights, (h, c), token, _, cells = step(decoder)
    expected, context = attend(decoder, cell.from_hidden, h, cells)
    torch.testing.assert_close(weights, expected)
    own = cell.from_token(token) + cell.from_hidden(h)[A:]
    into, forget, out = own[: 3 * H].sigmoid().chunk(3)
    first, second = (own[3 * H :] + cell.from_context(context)).chunk(2)
    assert 0 < (first > second).sum() < H, "each candidate is the maximum somewhere"
    c = forget * c + into * torch.where(first > second, first, second)
    torch.testing.assert_close(after, [out * c.tanh(), c])


def test_top_down_attends_with_the_first_lstm_and_predicts_from_the_second():
    decoder = build("top-down")
    cell = decoder.cell
    logits, after, weights, (h2, h1, c2, c1), token, mean, cells = step(decoder)
    own, from_other = cell.from_first(h1), cell.from_second(h2)[: 4 * H]
    h1, c1 = lstm(from_other + cell.from_mean(mean) + cell.from_token(token) + own, c1)
    expected, context = attend(decoder, cell.from_hidden, h1, cells)
    torch.testing.assert_close(weights, expected)
    h2, c2 = lstm(cell.from_context(context) + cell.from_hidden(h1)[A:] + cell.from_second(h2)[4 * H :], c2)
    torch.testing.assert_close(after, [h2, h1, c2, c1])
    torch.testing.assert_close(logits, decoder.output(h2))


def test_published_settings_attend_to_the_features_themselves_from_a_zero_state():
    """Anderson et al.: the keys, the context, and the mean are those of the features, in any order of the cells."""
    decoder = build("top-down", initial_state="zeros", normalize_grid=False, project_grid=False, cell_positions=False)
    names = {name.split(".")[0] for name, _ in decoder.named_parameters()}
    assert names == {"key", "embedding", "cell", "output"}
    memory = decoder.encode(grid())
    assert torch.equal(memory[0], grid())
    assert not any(part.any() for part in decoder.initial_state(memory))
    torch.testing.assert_close(memory[3], grid().mean(1) @ decoder.cell.from_mean.weight.T)
    shuffled = decoder.encode(grid()[:, [2, 0, 3, 1]])
    torch.testing.assert_close(decoder(shuffled, TOKENS[..., None])[0], decoder(memory, TOKENS[..., None])[0])


def test_dense_output_is_two_linear_layers_of_the_state():
    decoder = build("gru", output_layer="dense", initial_state="zeros")
    logits, after, *_ = step(decoder)
    torch.testing.assert_close(logits, decoder.output(decoder.dense(after[0])))


@pytest.mark.parametrize("cell", ["gru", "lstm", "att2in", "top-down"])
def test_input_dropout_replaces_dropout_on_features_and_embeddings(cell):
    decoder = build(cell, dropout=0.5, input_dropout=0.0).train()
    memory, state = decoder.encode(grid()), some_state(decoder)
    torch.testing.assert_close(memory[0], decoder.eval().encode(grid())[0])
    after = [decoder.train().step(TOKENS, state, memory)[1][0] for _ in range(2)]
    assert torch.equal(*after)
    assert build(cell, dropout=0.5).train().input_dropout.p == 0.5


@pytest.mark.parametrize("cell", ["gru", "lstm", "att2in", "top-down"])
def test_context_gate_scales_the_context_by_a_scalar(cell):
    plain, gated = build(cell), build(cell, context_gate=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    gate = gated.cell.attention.gate
    state, memory = some_state(plain), plain.encode(grid())
    query = torch.randn(B, K, A)
    inputs = AttentionInputs(*memory[:3])
    context, weights = plain.cell.attention(query, state[0], inputs)
    scaled, same = gated.cell.attention(query, state[0], inputs)
    torch.testing.assert_close(scaled, context * gate(state[0]).sigmoid())
    assert gate(state[0]).shape == (B, K, 1)
    assert torch.equal(weights, same), "the gate does not change the attention weights"
    memory, states = gated.encode(grid()), []
    for bias in (-30.0, 30.0):
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, bias)
        states.append(gated.step(TOKENS, state, memory)[1][0])
    torch.testing.assert_close(states[1], plain.step(TOKENS, state, memory)[1][0])
    assert not torch.allclose(states[0], states[1]), "a closed gate hides the context"


def test_top_down_gate_uses_the_attention_lstm_state():
    decoder = build("top-down", context_gate=True)
    gate_inputs = []
    decoder.cell.attention.gate.register_forward_pre_hook(lambda _, args: gate_inputs.append(args[0]))
    _, (_, h1, *_), *_ = step(decoder)
    torch.testing.assert_close(gate_inputs[0][AT], h1)


@pytest.mark.parametrize("cell", ["gru", "lstm", "att2in", "top-down"])
def test_hidden_output_depends_on_the_state_only(cell):
    decoder = build(cell)
    logits, after, *_ = step(decoder)
    torch.testing.assert_close(logits, decoder.output(after[0]))


@pytest.mark.parametrize("cell", ["gru", "lstm", "att2in", "top-down"])
def test_deep_output_equals_equation_7_of_xu(cell):
    decoder = build(cell, output_layer="deep")
    logits, after, weights, _, token, _, cells = step(decoder)
    of_state, of_context = decoder.deep.weight.split((H, E), 1)
    sums = token + of_state @ after[0] + of_context @ (weights @ cells) + decoder.deep.bias
    torch.testing.assert_close(logits, decoder.output(sums.tanh()))


@pytest.mark.parametrize("cell", ["gru", "lstm", "att2in", "top-down"])
def test_initial_state_is_computed_from_the_mean_cell(cell):
    decoder = build(cell)
    memory = decoder.encode(grid())
    state = decoder.initial_state(memory)
    expected = decoder.initial(memory[0].mean(1)).tanh()
    torch.testing.assert_close(torch.cat(state, -1)[:, 0], expected)


def test_state_stays_float32_under_autocast():
    decoder = build("lstm")
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.encode(grid())
        start = decoder.initial_state(memory)
        _, after, _ = decoder.step(TOKENS[:, :1], start, memory)
    assert {part.dtype for part in memory} == {torch.bfloat16}
    assert {part.dtype for part in (*start, *after)} == {torch.float32}
