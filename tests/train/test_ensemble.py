"""Loading of checkpoints as an ensemble."""

import pytest
import torch

from gridcap.common.errors import CheckpointError, MismatchError
from gridcap.train.data.vocabulary import Vocabulary
from gridcap.train.decoders.registry import build_decoder
from gridcap.train.decoding.generate import generate_captions
from gridcap.train.engine.checkpoint import CheckpointContents, load_checkpoint, save_checkpoint
from gridcap.train.ensemble import load_ensemble

GRID = (2, 2, 8)
WORDS = "a red ring"


@pytest.fixture
def new_run(tmp_path, new_config, tiny_decoders, provenance):
    """Save a run with one checkpoint of a random decoder, and return its folder."""

    def make(name, family="attention", words=WORDS, **changes):
        config, vocabulary = new_config(tmp_path / name, decoder=tiny_decoders[family]), Vocabulary.build([words])
        decoder = build_decoder(config.train.decoder, len(vocabulary), GRID)
        contents = CheckpointContents(1, decoder, vocabulary, config, provenance(**changes), {})
        save_checkpoint(tmp_path / name, contents, best_step=1)
        return tmp_path / name

    return make


def test_single_checkpoint_is_returned_unchanged(new_run):
    run = new_run("a")
    loaded, alone = load_ensemble([run]), load_checkpoint(run)
    assert type(loaded.decoder) is type(alone.decoder)
    assert loaded.path == alone.path
    for a, b in zip(loaded.decoder.parameters(), alone.decoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ensemble_averages_probabilities(new_run):
    runs = [new_run("a"), new_run("b", "lstm"), new_run("c")]
    ensemble, alone = load_ensemble(runs), [load_checkpoint(run) for run in runs]
    assert ensemble.path == alone[0].path
    assert ensemble.config == alone[0].config
    assert ensemble.vocabulary.tokens == alone[0].vocabulary.tokens
    assert not any(module.training for module in ensemble.decoder.modules())
    grids, tokens = torch.randn(3, 4, 8), torch.tensor([1, 4, 5]).expand(3, 2, 3)
    with torch.no_grad():
        logits, _ = ensemble.decoder(ensemble.decoder.encode(grids), tokens)
        members = [c.decoder(c.decoder.encode(grids), tokens)[0].softmax(-1) for c in alone]
    assert torch.allclose(logits.softmax(-1), torch.stack(members).mean(0), atol=1e-6)
    assert len(generate_captions(ensemble.decoder, grids, ensemble.config.caption)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer": "Mixed_7b"}, "Mixed_7b"),
        ({"weights": {"name": "mine.pth", "sha256": "1" * 64, "random": False}}, "mine.pth"),
        ({"dtype": "uint8"}, "uint8"),
    ],
)
def test_different_features_raise_with_both_names_and_the_difference(new_run, change, named):
    runs = [new_run("a"), new_run("b"), new_run("c", **change)]
    with pytest.raises(MismatchError) as caught:
        load_ensemble(runs)
    assert all(str(run) in caught.value.message for run in (runs[0], runs[2]))
    assert named in caught.value.message


def test_library_versions_may_differ(new_run):
    assert load_ensemble([new_run("a"), new_run("b", versions={"torch": "0.4"})])


@pytest.mark.parametrize(
    ("words", "difference"),
    [("a red ring here", "7 tokens vs. 8"), ("a red cross", "token 5 is 'red' vs. 'cross'")],
)
def test_different_vocabularies_raise_with_both_names_and_the_difference(new_run, words, difference):
    runs = [new_run("a"), new_run("b", words=words)]
    with pytest.raises(MismatchError, match=difference) as caught:
        load_ensemble(runs)
    assert all(str(run) in caught.value.message for run in runs)


def test_missing_member_is_named_in_the_error(new_run, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_ensemble([new_run("a"), tmp_path / "nowhere"])
