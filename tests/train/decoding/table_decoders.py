"""Decoders whose logits are looked up in a table, so that results can be verified by brute force."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st

from gridcap.train.data.vocabulary import BOS, EOS, PAD, UNK
from gridcap.train.decoders.base import Decoder

V = 7  # PAD, BOS, EOS, UNK, and three tokens
TOKENS = (4, 5, 6)
MAX_LENGTH = 3
ALL_BEAMS = 120  # more than the candidates of any step


def code_of(history):
    """Encode a token history as an integer."""
    code = 0
    for token in history:
        code = code * V + token
    return code


class TableDecoder(Decoder):
    """logits = table[image, history]; attention is the pair (history, image). The grid contains the image index."""

    def __init__(self, table, with_attention=True):
        super().__init__(zero_features=False)
        self.table = table
        self.with_attention = with_attention

    def _project(self, grid):
        return (grid[:, 0, 0].long(),)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1, dtype=torch.int64),)

    def step(self, tokens, state, memory):
        histories = state[0] * V + tokens
        image = memory[0][:, None].expand_as(histories)
        attention = torch.stack([histories, image], -1).float() if self.with_attention else None
        return self.table[image, histories], (histories,), attention

    def forward(self, memory, tokens):
        raise NotImplementedError


class ChainDecoder(Decoder):
    """logits = table[last token], for captions of any length; counts its steps."""

    has_attention = False

    def __init__(self, table):
        super().__init__(zero_features=False)
        self.table = table
        self.steps = 0

    def _project(self, grid):
        return (grid,)

    def initial_state(self, memory):
        return (torch.zeros(len(memory[0]), 1),)

    def step(self, tokens, state, memory):
        self.steps += 1
        return self.table[tokens], state, None

    def forward(self, memory, tokens):
        raise NotImplementedError


def random_chain(seed, tokens=3, end=0.0):
    table = torch.randn(4 + tokens, 4 + tokens, generator=torch.Generator().manual_seed(seed)) * 2
    table[:, EOS] += end
    return ChainDecoder(table)


def random_decoder(seed, images=4, end=0.0, **options):
    """Return a decoder with random logits; `end` is added to those of EOS."""
    table = torch.randn(images, V ** (MAX_LENGTH + 1), V, generator=torch.Generator().manual_seed(seed)) * 2
    table[..., EOS] += end
    return TableDecoder(table, **options)


def grids(*images):
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 2, 3).clone()


def without_specials(logits):
    """Return the log-probabilities over the tokens and EOS only."""
    allowed = [EOS, *range(4, logits.shape[-1])]
    log_probs = torch.full_like(logits, -torch.inf)
    log_probs[..., allowed] = logits[..., allowed].log_softmax(-1)
    return log_probs


def log_prob(decoder, image, tokens, ended=True):
    log_probs = without_specials(decoder.table[image])
    history, total = [BOS], 0.0
    for token in [*tokens, *([EOS] if ended else [])]:
        total += log_probs[code_of(history), token].item()
        history.append(token)
    return total


def exhaustive_search(decoder, image, penalty):
    """Return the best finished caption of up to MAX_LENGTH tokens by exhaustive search."""
    captions = [list(c) for n in range(MAX_LENGTH + 1) for c in itertools.product(TOKENS, repeat=n)]
    return max(captions, key=lambda tokens: log_prob(decoder, image, tokens) / max(1, len(tokens)) ** penalty)


def argmax_loop(decoder, image):
    tokens = []
    while len(tokens) < MAX_LENGTH:
        logits = decoder.table[image, code_of([BOS, *tokens])].clone()
        logits[[PAD, BOS, UNK]] = -torch.inf
        token = int(logits.argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens


def repetitive_decoder():
    """Return a decoder with a single token; EOS is unlikely."""
    table = torch.zeros(5, 5)
    table[:, EOS] = -30.0
    return ChainDecoder(table)


def trigrams(tokens):
    return list(zip(tokens, tokens[1:], tokens[2:], strict=False))


def repeats(tokens):
    return len(set(trigrams(tokens))) < len(trigrams(tokens))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


SEEDS = st.integers(0, 100_000)
SOME = settings(max_examples=25, deadline=None)
