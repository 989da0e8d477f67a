"""Image injection into the LSTM."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gridcap.train.decoders.lstm import LstmConfig, LstmDecoder

torch.set_num_threads(1)

V, B, K, T, C, E, H = 11, 2, 3, 4, 8, 6, 10


def build(**options) -> LstmDecoder:
    torch.manual_seed(0)
    return LstmDecoder(LstmConfig(embed_size=E, hidden_size=H, **options), V, 1, C).eval()


@pytest.fixture
def grid():
    return torch.randn(B, 5, C, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return torch.randint(1, V, (B, K, T), generator=torch.Generator().manual_seed(2))


def lstm_over(decoder, inputs, h, c):
    """Run the textbook LSTM with the decoder's weights over (T, E) inputs."""
    lstm, hidden = decoder.lstm, []
    for x in inputs:
        sums = x @ lstm.weight_ih_l0.T + h @ lstm.weight_hh_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        i, f, g, o = sums.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hidden.append(h)
    return torch.stack(hidden)


def test_first_input_prepends_the_image(grid, tokens):
    decoder = build(image_injection="first-input")
    memory = decoder.encode(grid)
    logits, _ = decoder(memory, tokens)
    zero = torch.zeros(H)
    inputs = torch.cat([memory[0][1:2], decoder.embedding(tokens[1, 2])])
    torch.testing.assert_close(logits[1, 2], decoder.output(lstm_over(decoder, inputs, zero, zero)[1:]))


def test_every_step_concatenates_the_image_to_each_token(grid, tokens):
    decoder = build(image_injection="every-step")
    memory = decoder.encode(grid)
    logits, _ = decoder(memory, tokens)
    zero = torch.zeros(H)
    inputs = torch.cat([memory[0][1].expand(T, E), decoder.embedding(tokens[1, 2])], 1)
    torch.testing.assert_close(logits[1, 2], decoder.output(lstm_over(decoder, inputs, zero, zero)))


@pytest.mark.parametrize("image", ["first-input", "initial-state", "every-step"])
def test_only_every_step_uses_the_image_after_the_initial_state(image, grid, tokens):
    decoder = build(image_injection=image)
    memory, other = decoder.encode(grid), decoder.encode(grid + torch.arange(C))
    (state, changed), token = (decoder.initial_state(m) for m in (memory, other)), tokens[:, :1, 0]
    assert torch.equal(state[0], changed[0]) == (image == "every-step"), "dependence on the image"
    later = [decoder.step(token, state, m)[0] for m in (memory, other)]
    assert torch.equal(*later) == (image != "every-step")


def test_initial_state_without_a_bottleneck(grid):
    decoder = build(image_injection="initial-state")
    pooled = F.layer_norm(grid.mean(1), (C,))
    h, c = decoder.initial_state(decoder.encode(grid))
    sums = decoder.initial(pooled)
    torch.testing.assert_close(h[:, 0], sums[:, :H].tanh())
    torch.testing.assert_close(c[:, 0], sums[:, H:])


def test_initial_state_with_bottleneck_has_equal_h_and_c(grid):
    decoder = build(image_injection="initial-state", image_bottleneck=3)
    (narrow,) = memory = decoder.encode(grid)
    assert narrow.shape == (B, 3)
    assert (narrow > -1).all(), "range of ELU"
    h, c = decoder.initial_state(memory)
    assert torch.equal(h, c)
    torch.testing.assert_close(h[:, 0], F.elu(decoder.initial(narrow)))


def test_output_bottleneck_is_linear_and_elu(grid, tokens):
    wide, narrow = build(), build(output_bottleneck=3)
    assert (wide.output.in_features, narrow.output.in_features) == (H, 3)
    narrow.load_state_dict({k: v for k, v in wide.state_dict().items() if not k.startswith("output")}, strict=False)
    state = tuple(part.expand(B, K, H) for part in wide.initial_state(wide.encode(grid)))
    _, (hidden, _), _ = wide.step(tokens[..., 0], state, wide.encode(grid))
    logits, _ = narrow(narrow.encode(grid), tokens)
    squeezed = F.elu(narrow.output_bottleneck[0](hidden))
    torch.testing.assert_close(logits[:, :, 0], narrow.output(squeezed))
