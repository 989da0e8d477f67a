import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from gridcap.common.config import TrainConfig
from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig
from gridcap.train.objectives.cross_entropy import CrossEntropy, forward_scheduled_sampling

VOCAB_SIZE = 11
FAMILIES = {
    "lstm": LstmConfig(embed_size=12, hidden_size=16, dropout=0.0),
    "attention": AttentionConfig(embed_size=12, hidden_size=16, attention_size=8, dropout=0.0),
    "transformer": TransformerConfig(embed_size=8, layers=2, heads=2, feedforward_size=16, dropout=0.0),
}
TOKENS = torch.tensor(
    [
        [[BOS, 5, 6, 7, EOS], [BOS, 8, EOS, PAD, PAD], [PAD] * 5],
        [[BOS, 9, 10, EOS, PAD], [BOS, EOS, PAD, PAD, PAD], [BOS, 4, UNK, 5, EOS]],
    ]
)


def batch_of(images, grids, tokens):
    return CaptionBatch(images, grids, tokens, (tokens[..., 1:] != PAD).flatten().nonzero()[:, 0])


@pytest.fixture
def batch():
    grids = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    return batch_of(np.arange(2), grids.half(), TOKENS)


def build(family, **changes):
    torch.manual_seed(1)
    return build_decoder(FAMILIES[family].model_copy(update=changes), VOCAB_SIZE, (2, 2, 8))


SCHEDULED_SAMPLING = TrainConfig(
    label_smoothing=0.0, scheduled_sampling={"max_prob": 1, "prob_step": 1, "step_epochs": 1}
)


def settings(family="attention", penalty=None, **changes):
    config = FAMILIES[family].model_copy(update={} if penalty is None else {"attention_reg": penalty})
    return TrainConfig(decoder=config, **changes)


# --- loss ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_summed_torch_cross_entropy_without_padding(family, smoothing, batch):
    decoder = build(family)
    loss, terms = CrossEntropy(settings(family, label_smoothing=smoothing))(decoder, batch, 0)
    expected, plain, num_tokens = torch.zeros(()), torch.zeros(()), 0
    with torch.no_grad():
        for b in range(2):
            for k in range(3):
                caption = [token for token in TOKENS[b, k].tolist() if token != PAD]
                if caption:
                    memory = decoder.encode(batch.grids[b : b + 1].float())
                    logits, _ = decoder(memory, torch.tensor([[caption[:-1]]]))
                    target = torch.tensor(caption[1:])
                    expected += F.cross_entropy(logits[0, 0], target, reduction="sum", label_smoothing=smoothing)
                    plain += F.cross_entropy(logits[0, 0], target, reduction="sum")
                    num_tokens += len(target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert int(terms["tokens"]) == num_tokens == 14
    assert terms["loss"].item() == pytest.approx(plain.item(), rel=1e-4), (
        "without smoothing, comparable to the validation loss"
    )
    assert not terms["loss"].requires_grad
    assert set(terms) == {"tokens", "loss"}


def test_sums_of_two_batches_equal_those_of_the_whole(batch):
    decoder, objective = build("attention"), CrossEntropy(settings(penalty=1.0, label_smoothing=0.1))
    whole, terms = objective(decoder, batch, 0)
    parts = [batch_of(batch.images[i], batch.grids[i], batch.tokens[i]) for i in ([0], [1])]
    losses, logs = zip(*(objective(decoder, part, 0) for part in parts), strict=True)
    assert sum(loss.item() for loss in losses) == pytest.approx(whole.item(), rel=1e-5)
    for name, value in terms.items():
        assert sum(log[name].item() for log in logs) == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_attention_penalty_is_weighted_and_not_logged(weight, batch):
    decoder = build("attention")
    plain, without = CrossEntropy(settings(penalty=0.0))(decoder, batch, 0)
    loss, terms = CrossEntropy(settings(penalty=weight))(decoder, batch, 0)
    _, attention = decoder(decoder.encode(batch.grids.float()), TOKENS[..., :-1])
    penalty = 0.0
    for b in range(2):
        for k in range(3):
            num_tokens = int((TOKENS[b, k, 1:] != PAD).sum())
            cell_totals = attention[b, k, :num_tokens].sum(0)
            penalty += ((1 - cell_totals) ** 2).mean().item() * (num_tokens > 0)
    assert penalty > 0.1
    assert loss.item() - plain.item() == pytest.approx(weight * penalty, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(without["loss"].item())


@pytest.mark.parametrize("family", ["lstm", "transformer"])
def test_family_without_attention_has_no_penalty(family, batch):
    assert CrossEntropy(settings(family))(build(family), batch, 0)[0].isfinite()


# --- scheduled sampling ---


def test_targets_are_reference_tokens_with_scheduled_sampling(batch):
    decoder = Recorder()
    with torch.no_grad():
        decoder.weight[:] = torch.arange(VOCAB_SIZE) / 4
    loss, terms = CrossEntropy(SCHEDULED_SAMPLING)(decoder, batch, 1)
    log_probs = decoder.weight.log_softmax(-1)
    expected = -sum(log_probs[token] for token in TOKENS[..., 1:].flatten().tolist() if token != PAD)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(loss.item())
    assert int(terms["tokens"]) == 14


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0, 0, 0]),
        ({"max_prob": 0.25, "prob_step": 0.05, "step_epochs": 5}, [0, 0, 0.05, 0.05, 0.1, 0.25, 0.25]),
        ({"max_prob": 0.5, "prob_step": 0.4, "step_epochs": 1}, [0, 0.5, 0.5]),
        ({"max_prob": 0.0, "prob_step": 1, "step_epochs": 1}, [0, 0, 0]),
    ],
)
def test_sampling_prob_grows_in_steps_up_to_max_prob(sampling, expected):
    epochs = [0, 4, 5, 9, 10, 25, 90]
    objective = CrossEntropy(TrainConfig(scheduled_sampling=sampling))
    assert [objective.sampling_prob(epoch) for epoch in epochs[: len(expected)]] == pytest.approx(expected)


def test_scheduled_sampling_starts_in_the_configured_epoch(batch, monkeypatch):
    probabilities = []

    def record(decoder, memory, tokens, probability):
        probabilities.append(probability)
        return decoder(memory, tokens)  # logits of all positions, like the original

    monkeypatch.setattr("gridcap.train.objectives.cross_entropy.forward_scheduled_sampling", record)
    objective = CrossEntropy(settings(scheduled_sampling={"max_prob": 0.3, "prob_step": 0.2, "step_epochs": 2}))
    for epoch in range(6):
        objective(build("attention"), batch, epoch)
    assert probabilities == pytest.approx([0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("family", FAMILIES)
def test_scheduled_sampling_with_probability_0_equals_forward(family):
    decoder = build(family)
    memory = decoder.encode(torch.randn(2, 4, 8))
    logits, attention = forward_scheduled_sampling(decoder, memory, TOKENS[..., :-1], 0.0)
    plain, expected_attention = decoder(memory, TOKENS[..., :-1])
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    assert (attention is None) == (expected_attention is None)
    if expected_attention is not None:
        torch.testing.assert_close(attention, expected_attention, rtol=1e-4, atol=1e-5)


class Recorder(Decoder):
    """Decoder that records its input tokens; with `first`, step t predicts token `first + t`."""

    has_attention = False

    def __init__(self, first=None):
        super().__init__(zero_features=False)
        self.first, self.fed = first, []
        self.weight = nn.Parameter(torch.zeros(VOCAB_SIZE))

    def _project(self, grid):
        return (grid,)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1, 1),)

    def step(self, tokens, state, memory):
        logits = self.weight.expand(*tokens.shape, VOCAB_SIZE)
        if self.first is not None:
            token = self.first + len(self.fed)
            logits = logits + 1000.0 * F.one_hot(torch.tensor(token), VOCAB_SIZE)
        self.fed.append(tokens.clone())
        return logits, (state[0] + 1,), None

    def forward(self, memory, tokens, positions=None):
        raise AssertionError("not used")


def test_scheduled_sampling_with_probability_1_feeds_only_sampled_tokens():
    decoder = Recorder(first=6)
    reference = torch.tensor([[[BOS, 4, 4, 4], [BOS, 5, 4, 5]], [[BOS, 4, 5, 4], [BOS, 4, 4, 5]]])
    forward_scheduled_sampling(decoder, decoder.encode(torch.zeros(2, 4, 8)), reference, 1.0)
    assert [fed.unique().tolist() for fed in decoder.fed] == [[BOS], [6], [7], [8]]


def test_tokens_are_sampled_from_the_prediction_for_their_position():
    """Three equally likely tokens; never PAD, BOS, or UNK, regardless of their logits."""
    torch.manual_seed(0)
    decoder = Recorder()
    with torch.no_grad():
        decoder.weight.fill_(-1000.0)
        decoder.weight[[4, 7, 9]] = 0.0
        decoder.weight[[PAD, BOS, UNK]] = 50.0
    reference = torch.full((30, 10, 3), 5)
    forward_scheduled_sampling(decoder, decoder.encode(torch.zeros(30, 4, 8)), reference, 1.0)
    for fed in decoder.fed[1:]:
        tokens, counts = fed.unique(return_counts=True)
        assert tokens.tolist() == [4, 7, 9]
        assert (counts - 100).abs().max() < 40


def test_share_of_replaced_tokens_matches_the_probability():
    torch.manual_seed(0)
    decoder = Recorder(first=6)
    reference = torch.full((40, 10, 4), 5)
    forward_scheduled_sampling(decoder, decoder.encode(torch.zeros(40, 4, 8)), reference, 0.25)
    for fed in decoder.fed[1:]:
        assert (fed != 5).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert len({(fed != 5).nonzero().shape[0] for fed in decoder.fed[1:]}) > 1, "sampled independently per token"


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_padding_is_never_replaced(probability):
    decoder = Recorder(first=6)
    given = TOKENS[..., :-1]
    forward_scheduled_sampling(decoder, decoder.encode(torch.zeros(2, 4, 8)), given, probability)
    for t, fed in enumerate(decoder.fed):
        assert torch.equal(fed == PAD, given[..., t] == PAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_with_scheduled_sampling(family, batch):
    decoder = build(family)
    objective = CrossEntropy(settings(family, scheduled_sampling={"max_prob": 1, "prob_step": 1, "step_epochs": 1}))
    loss, terms = objective(decoder, batch, 1)
    loss.backward()
    assert int(terms["tokens"]) == 14
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert sum(parameter.grad.abs().sum() for parameter in decoder.parameters()) > 0


def test_scheduled_sampling_with_a_diverged_decoder_gives_a_non_finite_loss(batch):
    """The loop checks the loss and stops with a hint; an exception during sampling would hide it."""
    decoder = build("attention")
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
    objective = CrossEntropy(settings(scheduled_sampling={"max_prob": 1, "prob_step": 1, "step_epochs": 1}))
    assert not objective(decoder, batch, 1)[0].isfinite()
