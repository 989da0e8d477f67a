"""Built-in recipes load, build, and match their papers."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from gridcap.common import config as config_package
from gridcap.common.config import recipe_names
from gridcap.common.config.train import RUN_SETTINGS
from gridcap.train.decoders.attention import AttentionConfig
from gridcap.train.decoders.lstm import LstmConfig
from gridcap.train.decoders.registry import DECODER_CONFIGS, build_decoder
from gridcap.train.decoders.transformer import TransformerConfig

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = (
    "show-and-tell",
    "lstm-init",
    "lstm-inject",
    "tutorial-gru",
    "soft-attention",
    "att2in",
    "top-down",
    "transformer",
    "scst",
)

load_config = partial(config_package.load_config, decoders=DECODER_CONFIGS)
DECODERS = [name for name in NAMES if name != "scst"]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the `train` section of a recipe in a folder without pipeline.yaml."""
    monkeypatch.chdir(tmp_path)
    return lambda name, **options: load_config(recipe=name, **options).train


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def keys(name: str) -> dict:
    return yaml.safe_load(text(name))["train"]


def test_recipe_names_lists_all_recipes():
    assert recipe_names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_values_are_applied(name, load):
    train = load(name).model_dump(mode="json")
    for key, value in keys(name).items():
        given = {k: train[key][k] for k in value} if isinstance(value, dict) else train[key]
        assert given == value


@pytest.mark.parametrize("name", NAMES)
def test_first_line_cites_the_paper(name):
    first = text(name).splitlines()[0]
    assert re.match(r"# [A-Z]\w+ et al\. \d{4}\b.*\(arXiv:\d{4}\.\d{4,5}\)", first)
    assert len(text(name).splitlines()) <= 18
    assert max(map(len, text(name).splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_independent_of_files_and_machines(name):
    """A recipe sets no paths, devices, or checkpoint intervals."""
    assert not keys(name).keys() & RUN_SETTINGS


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_builds_and_runs(name, load):
    train = load(name)
    assert train.output == Path("runs") / name
    with torch.device("meta"):
        decoder = build_decoder(train.decoder, 50, (2, 2, 16))
        memory = decoder.encode(torch.zeros(2, 4, 16))
        logits, _ = decoder(memory, torch.ones(2, 3, 5, dtype=torch.int64))
    assert logits.shape == (2, 3, 5, 50)


def test_decoders_are_distinct(load):
    assert len({load(name).decoder.model_dump_json() for name in DECODERS}) == len(DECODERS)


def test_decoders_match_their_papers(load):
    decoder = {name: load(name).decoder for name in DECODERS}
    assert all(isinstance(decoder[name], LstmConfig) for name in ("show-and-tell", "lstm-init", "lstm-inject"))
    images = [decoder[name].image_injection for name in ("show-and-tell", "lstm-init", "lstm-inject")]
    assert images == ["first-input", "initial-state", "every-step"]
    attentive = ("tutorial-gru", "soft-attention", "att2in", "top-down")
    assert all(isinstance(decoder[name], AttentionConfig) for name in attentive)
    assert [decoder[name].cell for name in attentive] == ["gru", "lstm", "att2in", "top-down"]
    xu = decoder["soft-attention"]
    assert (xu.context_gate, xu.output_layer, xu.attention_reg) == (True, "deep", 64.0)
    assert isinstance(decoder["transformer"], TransformerConfig)
    for name in (*attentive, "show-and-tell", "lstm-init"):
        assert not decoder[name].normalize_grid
    for name in attentive:
        assert not decoder[name].cell_positions
        assert decoder[name].project_grid == (name in ("tutorial-gru", "att2in"))
        assert decoder[name].initial_state == ("mean" if name == "soft-attention" else "zeros")


def test_top_down_is_trained_as_the_released_solver(load):
    """The solver minimizes 20 times the mean loss per token: SGD with these settings takes the same steps."""
    train = load("top-down")
    assert (train.optimizer, train.momentum, train.schedule.kind) == ("sgd", 0.9, "linear")
    assert train.learning_rate == pytest.approx(20 * 0.01)
    assert train.weight_decay == pytest.approx(5e-4 / 20)
    assert train.max_grad_norm == pytest.approx(10 / 20)
    assert train.batch_size * train.captions_per_image == 100


def test_scst_has_no_decoder_of_its_own(load):
    assert keys("scst").keys() & {"decoder", "vocabulary"} == set()
    train = load("scst", sets=["train.init_from=runs/att2in"])
    assert (train.objective, train.init_from, train.max_grad_norm) == ("scst", Path("runs/att2in"), 5.0)
