import threading

import numpy as np
import pytest
import torch
from torch import nn

from gridcap.train.data.batch import CaptionBatch
from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.base import Decoder
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig
from gridcap.train.objectives.scst import SelfCritical

VOCAB_SIZE = 8
DECODERS = {
    "lstm": LstmConfig(embed_size=12, hidden_size=16, dropout=0.3),
    "attention": AttentionConfig(embed_size=12, hidden_size=16, attention_size=8, dropout=0.3),
    "transformer": TransformerConfig(embed_size=8, layers=1, heads=2, feedforward_size=16, dropout=0.3),
}


class Table(Decoder):
    """Bigram decoder: one logit per image, previous token, and token, which makes gradients easy to derive by hand.

    The first channel of a grid is the index of the image.
    """

    has_attention = False

    def __init__(self, images=3, seed=0):
        super().__init__(zero_features=False)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(images, VOCAB_SIZE, VOCAB_SIZE, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.modes = []  # training modes of the decoder and its dropout at each call of encode

    def _project(self, grid):
        self.modes.append((self.training, self.dropout.training))
        return (grid[:, 0, 0].long(),)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1, 1),)

    def step(self, tokens, state, memory):
        return self.table[memory[0][:, None], tokens], state, None

    def forward(self, memory, tokens, positions=None):
        return self._gather_positions(self.table[memory[0][:, None, None], tokens], positions), None


class Reward:
    """Reward that records its arguments and returns the result of `score`."""

    def __init__(self, score):
        self.score, self.calls, self.threads = score, [], []

    def __call__(self, images, tokens):
        self.calls.append((np.array(images), np.array(tokens)))
        self.threads.append(threading.current_thread())
        return np.asarray(self.score(images, tokens), np.float32)


def new_batch(images=(0, 1, 2), positions=None):
    grids = torch.tensor(images, dtype=torch.float16)[:, None, None].expand(-1, 4, 8)
    tokens = torch.full((len(images), 2, 5), 5)
    positions = np.array(positions if positions is not None else images)
    return CaptionBatch(positions, grids, tokens, torch.arange(tokens[..., 1:].numel()))


def random_rewards(images, tokens):
    return np.random.default_rng(7).normal(size=tokens.shape[:2])


def log_prob_of(table, image, caption, temperature=1.0):
    """Return the log-probability of a caption, computed token by token over the allowed tokens."""
    table = table / temperature
    allowed = [token for token in range(VOCAB_SIZE) if token not in (PAD, BOS, UNK)]
    total, before = torch.zeros(()), BOS
    for token in caption:
        total = total + table[image, before, token] - table[image, before, allowed].logsumexp(-1)
        before = token
    return total


def caption_of(row):
    return [int(token) for token in row if token != PAD]


# --- gradient ---


@pytest.mark.parametrize(("samples", "temperature"), [(2, 1.0), (5, 1.0), (5, 0.4)])
def test_gradient_is_advantage_times_gradient_of_log_probability(samples, temperature):
    torch.manual_seed(0)
    decoder, reward = Table(), Reward(random_rewards)
    loss, terms = SelfCritical(reward, samples, 4, temperature)(decoder, new_batch(), 0)
    loss.backward()
    ((_, tokens),) = reward.calls
    rewards = random_rewards(None, tokens).astype(np.float32)
    table = decoder.table.detach().clone().requires_grad_()
    expected, baselines = torch.zeros(()), []
    for image in range(3):
        for k in range(samples):
            others = np.mean([rewards[image, other] for other in range(samples) if other != k])
            baselines.append(others)
            caption = caption_of(tokens[image, k])
            expected = expected - (rewards[image, k] - others) * log_prob_of(table, image, caption, temperature)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(decoder.table.grad, table.grad, rtol=1e-4, atol=1e-5)
    assert decoder.table.grad.abs().max() > 0.01
    assert terms["reward"].item() == pytest.approx(rewards.sum(), rel=1e-4, abs=1e-5)
    assert terms["baseline"].item() == pytest.approx(np.sum(baselines), rel=1e-4, abs=1e-5)
    assert terms["advantage"].item() == pytest.approx(np.abs(rewards.ravel() - baselines).sum(), rel=1e-4)
    assert int(terms["captions"]) == 3 * samples
    assert int(terms["tokens"]) == (tokens != PAD).sum(), "EOS is counted"
    assert not any(value.requires_grad for value in terms.values())


def test_captions_are_sampled_with_the_temperature():
    """At a very low temperature, sampling equals greedy decoding."""
    torch.manual_seed(0)
    decoder, reward = Table(), Reward(random_rewards)
    SelfCritical(reward, 5, 4, 0.001)(decoder, new_batch(), 0)
    ((_, tokens),) = reward.calls
    assert (tokens == tokens[:, :1]).all()
    with torch.no_grad():
        decoder.table[:, :, [PAD, BOS, UNK]] = -torch.inf
    assert (torch.from_numpy(tokens[:, 0, 0]) == decoder.table[:, BOS].argmax(-1)).all()


def test_only_visited_states_get_a_gradient_and_masked_tokens_none():
    torch.manual_seed(1)
    decoder, reward = Table(), Reward(random_rewards)
    SelfCritical(reward, 3, 4)(decoder, new_batch(), 0)[0].backward()
    ((_, tokens),) = reward.calls
    fed = torch.zeros(3, VOCAB_SIZE, dtype=torch.bool)
    for image in range(3):
        for k in range(3):
            fed[image, [BOS, *caption_of(tokens[image, k])[:-1]]] = True
    rows = decoder.table.grad.abs().sum(-1) > 0
    assert not (rows & ~fed).any()
    assert rows[:, BOS].all()
    assert (decoder.table.grad[..., [PAD, BOS, UNK]] == 0).all()
    assert not rows[:, EOS].any(), "states after EOS get no gradient"
    assert not rows[:, PAD].any()


def test_padding_contributes_nothing():
    """The captions of one image end immediately, so that most of their rows is padding."""
    decoder = Table(2)
    with torch.no_grad():
        decoder.table[0, BOS, EOS] = 100.0
        decoder.table[1, :, EOS] = -100.0
    torch.manual_seed(0)
    reward = Reward(lambda images, tokens: [[1.0, 0.0, 5.0]] * 2)
    loss, terms = SelfCritical(reward, 3, 6)(decoder, new_batch((0, 1)), 0)
    loss.backward()
    tokens = reward.calls[0][1]
    assert (tokens[0, :, 1:] == PAD).all()
    assert (tokens[1] != PAD).all()
    assert int(terms["tokens"]) == 3 + tokens[1].size
    assert loss.isfinite()
    assert decoder.table.grad.isfinite().all()
    assert decoder.table.grad[0].abs().max() < 1e-6, "the only token had probability 1"


def test_equal_rewards_have_no_gradient():
    decoder = Table()
    loss, terms = SelfCritical(Reward(lambda _, tokens: np.full(tokens.shape[:2], 0.7)), 4, 5)(decoder, new_batch(), 0)
    loss.backward()
    assert decoder.table.grad.abs().max() < 1e-6
    assert terms["advantage"].item() == pytest.approx(0, abs=1e-5)
    assert terms["reward"].item() == terms["baseline"].item() == pytest.approx(12 * 0.7, rel=1e-5)


def test_better_caption_becomes_more_likely():
    decoder, reward = Table(1), Reward(lambda _, tokens: [[3.0, 0.0]])
    torch.manual_seed(2)
    SelfCritical(reward, 2, 3)(decoder, new_batch((0,)), 0)[0].backward()
    better, worse = (caption_of(row) for row in reward.calls[0][1][0])
    assert better != worse
    before = [log_prob_of(decoder.table.detach(), 0, caption).item() for caption in (better, worse)]
    with torch.no_grad():
        decoder.table -= 0.01 * decoder.table.grad
    after = [log_prob_of(decoder.table.detach(), 0, caption).item() for caption in (better, worse)]
    assert after[0] - after[1] > before[0] - before[1]


# --- calls ---


def test_reward_is_called_once_per_batch_in_another_thread():
    reward = Reward(random_rewards)
    SelfCritical(reward, 5, 4)(Table(), new_batch((2, 0, 1), positions=(90, 7, 31)), 0)
    ((images, tokens),) = reward.calls
    assert images.tolist() == [90, 7, 31], "positions in the data set"
    assert tokens.shape[:2] == (3, 5)
    assert tokens.shape[2] <= 5, "four tokens and EOS"
    assert not np.isin(tokens, [BOS, UNK]).any()
    assert (tokens[..., 0] != PAD).all()
    assert reward.threads != [threading.main_thread()]


def test_captions_are_sampled_from_their_own_grid():
    decoder = Table(3)
    with torch.no_grad():
        decoder.table[:] = -100.0
        for image in range(3):
            decoder.table[image, BOS, 5 + image] = 100.0
            decoder.table[image, 5 + image, EOS] = 100.0
    reward = Reward(random_rewards)
    SelfCritical(reward, 2, 4)(decoder, new_batch((2, 0, 1)), 0)
    assert reward.calls[0][1].tolist() == [[[7, EOS]] * 2, [[5, EOS]] * 2, [[6, EOS]] * 2]


def test_item_09_samples_and_gradient_are_of_the_same_distribution_without_dropout():
    for training in (True, False):
        decoder = Table().train(training)
        SelfCritical(Reward(random_rewards), 2, 4)(decoder, new_batch(), 0)
        assert decoder.modes == [(True, False), (True, False)], "sampling and gradient"
        assert decoder.training
        assert decoder.dropout.training


@pytest.mark.parametrize("family", DECODERS)
def test_item_09_gradient_does_not_depend_on_the_dropout_rate(family):
    losses = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        decoder = build_decoder(DECODERS[family].model_copy(update={"dropout": dropout}), VOCAB_SIZE, (2, 2, 8))
        torch.manual_seed(1)
        losses.append(SelfCritical(Reward(random_rewards), 3, 6)(decoder, new_batch(), 0)[0].item())
    assert losses[0] == pytest.approx(losses[1])


def test_error_in_the_reward_is_raised():
    def broken(images, tokens):
        raise KeyError("image 3")

    with pytest.raises(KeyError, match="image 3"):
        SelfCritical(Reward(broken), 2, 4)(Table(), new_batch(), 0)


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_trains_with_scst(family):
    torch.manual_seed(0)
    decoder = build_decoder(DECODERS[family], VOCAB_SIZE, (2, 2, 8))
    loss, _ = SelfCritical(Reward(random_rewards), 3, 6)(decoder, new_batch(), 0)
    loss.backward()
    assert loss.isfinite()
    assert decoder.training
    gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_reward_increases():
    """Token 5 is rewarded for image 0, token 6 for image 1, and token 7 for image 2."""

    def score(images, tokens):
        return [
            [sum(t == 5 + image for t in caption) / 4 for caption in rows]
            for image, rows in zip(images, tokens, strict=True)
        ]

    torch.manual_seed(0)
    decoder = Table()
    objective, optimizer = SelfCritical(Reward(score), 5, 4), torch.optim.Adam(decoder.parameters(), 0.1)
    means = []
    for _ in range(120):
        optimizer.zero_grad()
        loss, terms = objective(decoder, new_batch(), 0)
        loss.backward()
        optimizer.step()
        means.append((terms["reward"] / terms["captions"]).item())
    assert np.mean(means[:5]) < 0.4
    assert np.mean(means[-5:]) > 0.7


@pytest.mark.parametrize("family", DECODERS)
def test_every_weight_gets_a_gradient_in_bfloat16(family):
    """Older torch caches the weights cast by autocast during sampling, which have no gradient."""
    torch.manual_seed(0)
    decoder = build_decoder(DECODERS[family].model_copy(update={"dropout": 0.0}), VOCAB_SIZE, (2, 2, 8))
    grids = torch.randn(3, 4, 8)
    batch = CaptionBatch(np.arange(3), grids, torch.full((3, 2, 5), 5), torch.arange(24))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = SelfCritical(Reward(random_rewards), 5, 6)(decoder, batch, 0)
    loss.backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_reward_thread_is_closed():
    before = set(threading.enumerate())
    SelfCritical(Reward(random_rewards), 2, 3)(Table(), new_batch(), 0)
    assert set(threading.enumerate()) == before
