import dataclasses
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoders.transformer import TransformerConfig
from gridcap.train.decoding.beam import BeamOptions, beam_search
from gridcap.train.engine.distributed import Ranks
from gridcap.train.engine.job import Runtime
from gridcap.train.engine.validation import validate
from gridcap.train.metrics.coco import cider

KEYS = {"val_loss", "val_perplexity", "val_cider", "val_duplicate_share"}
CPU = Runtime(torch.device("cpu"))


@pytest.fixture
def vocabulary(train_data):
    return Vocabulary.build([text for image in train_data.captions for text in image], None)


@pytest.fixture
def families(tiny_decoders):
    return tiny_decoders | {"transformer": TransformerConfig(embed_size=8, layers=1, heads=2, feedforward_size=16)}


def build(config, vocabulary, seed=0):
    torch.manual_seed(seed)
    return build_decoder(config, len(vocabulary), (2, 2, 8))


@pytest.fixture
def check(val_data, vocabulary, new_config, tmp_path):
    """Return a function that validates with tiny settings; keywords are keys of the `train` section."""

    def run(decoder, data=val_data, **train):
        settings = new_config(tmp_path / "run", **train).train
        return validate(decoder, data, vocabulary, settings, CPU)

    return run


# --- result ---


@pytest.mark.parametrize("family", ["lstm", "attention", "transformer"])
def test_row_contains_plain_numbers_and_attention_entropy_if_applicable(family, families, vocabulary, check):
    decoder = build(families[family], vocabulary)
    row = check(decoder)
    assert set(row) == (KEYS | {"val_attention_entropy"} if decoder.has_attention else KEYS)
    assert all(type(value) is float for value in row.values())
    json.dumps(row)
    assert decoder.has_attention == (family != "lstm")


def test_loss_covers_all_references_without_smoothing_or_dropout(tiny_decoders, vocabulary, check, val_data):
    decoder = build(tiny_decoders["attention"], vocabulary)
    row = check(decoder, label_smoothing=0.3)
    total, num_tokens = 0.0, 0
    for image, captions in enumerate(val_data.captions):
        grid = torch.from_numpy(val_data.store[int(val_data.rows[image])]).float().reshape(1, 4, 8)
        for text in captions:
            tokens = torch.tensor(vocabulary.encode(text, 8))
            with torch.no_grad():
                logits = decoder.eval()(decoder.encode(grid), tokens[None, None, :-1])[0][0, 0]
            total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
            num_tokens += len(tokens) - 1
    assert row["val_loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))


def test_cider_and_duplicate_share_use_greedy_captions(tiny_decoders, vocabulary, check, val_data):
    decoder = build(tiny_decoders["attention"], vocabulary, 3)
    row = check(decoder)
    grids = torch.from_numpy(val_data.store.rows(val_data.rows)).float().reshape(len(val_data), 4, 8)
    texts = [vocabulary.decode(h.tokens) for h in beam_search(decoder.eval(), grids, BeamOptions(1, 8))]
    references = dict(enumerate(val_data.captions))
    assert row["val_cider"] == pytest.approx(cider(dict(enumerate(texts)), references))
    assert row["val_duplicate_share"] == max(Counter(texts).values()) / len(val_data)


class Fixed(torch.nn.Module):
    """Wrapper that replaces the attention weights of a decoder."""

    has_attention = True

    def __init__(self, inner, attention_weights):
        super().__init__()
        self.inner, self.attention_weights = inner, attention_weights
        self.encode, self.initial_state = inner.encode, inner.initial_state

    def step(self, tokens, state, memory):
        logits, state, _ = self.inner.step(tokens, state, memory)
        return logits, state, self.attention_weights.expand(*tokens.shape, -1)

    def forward(self, memory, tokens, positions=None):
        logits, _ = self.inner(memory, tokens, positions)
        return logits, self.attention_weights.expand(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("attention_weights", "entropy"), [([0.25] * 4, 1.0), ([0.0, 1.0, 0.0, 0.0], 0.0), ([0.5, 0.5, 0.0, 0.0], 0.5)]
)
def test_attention_entropy_is_a_mean_over_tokens(attention_weights, entropy, tiny_decoders, vocabulary, check):
    decoder = Fixed(build(tiny_decoders["lstm"], vocabulary), torch.tensor(attention_weights))
    assert check(decoder)["val_attention_entropy"] == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_result_does_not_depend_on_batch_size(family, tiny_decoders, vocabulary, check):
    decoder = build(tiny_decoders[family], vocabulary)
    first, *others = [check(decoder, batch_size=size) for size in (1, 4, 50)]
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def test_validation_disables_dropout_and_changes_no_weights(tiny_decoders, vocabulary, check):
    decoder = build(tiny_decoders["attention"].model_copy(update={"dropout": 0.9}), vocabulary)
    decoder.train()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    random = torch.get_rng_state()
    assert check(decoder) == check(decoder)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_decoder_can_be_trained_after_validation(tiny_decoders, vocabulary, check):
    """No inference tensor may remain in the decoder."""
    decoder = build(tiny_decoders["attention"], vocabulary)
    check(decoder)
    decoder.train()
    logits, _ = decoder(decoder.encode(torch.randn(2, 4, 8)), torch.ones(2, 1, 3, dtype=torch.int64))
    logits.sum().backward()


# --- several ranks ---


class SequentialRanks(Ranks):
    """Ranks executed one after another: each stores its value, and the last one gathers all of them."""

    def all_gather(self, value):
        left = GATHERED[: self.rank]
        GATHERED[self.rank :] = [value]
        return [*left, value]


GATHERED = []


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_together_compute_the_single_process_result(
    world, tiny_decoders, vocabulary, check, val_data, new_config, tmp_path
):
    """9 images in batches of 2: one of 6 ranks has no images."""
    decoder = build(tiny_decoders["attention"], vocabulary)
    alone = check(decoder, batch_size=2)
    settings = new_config(tmp_path / "run", batch_size=2).train
    GATHERED.clear()
    for rank in range(world - 1):
        validate(decoder, val_data, vocabulary, settings, dataclasses.replace(CPU, ranks=SequentialRanks(rank, world)))
    last = validate(
        decoder, val_data, vocabulary, settings, dataclasses.replace(CPU, ranks=SequentialRanks(world - 1, world))
    )
    assert last == pytest.approx(alone, rel=1e-5)
    shares = [set(part[3]) for part in GATHERED]
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(val_data)


def test_all_references_count_regardless_of_captions_per_image(tiny_decoders, vocabulary, check, val_data):
    """Validation uses all captions of each image, regardless of captions_per_image."""
    decoder = build(tiny_decoders["lstm"], vocabulary)
    assert check(decoder, captions_per_image=1) == check(decoder, captions_per_image=5)
    fewer = replace(val_data, captions=[captions[:1] for captions in val_data.captions])
    assert check(decoder, fewer)["val_loss"] != check(decoder)["val_loss"]
