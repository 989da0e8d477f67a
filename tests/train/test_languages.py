"""Runs with other tokenizers, from captions to metrics; and the same tokens in training, reward, and metrics."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from gridcap.common.config import CaptionConfig, adapt
from gridcap.train.data.captioned import CaptionedImages
from gridcap.train.data.vocabulary import PAD, Vocabulary
from gridcap.train.data.vocabulary_check import build_vocabulary
from gridcap.train.engine.checkpoint import load_checkpoint
from gridcap.train.engine.loop import fit
from gridcap.train.evaluate import EvaluationOptions, evaluate
from gridcap.train.metrics.coco import cider, score_captions
from gridcap.train.objectives.reward import CaptionReward

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色"}
SHAPES = {"square": "方块", "circle": "圆圈"}
TOY = {0: ("A red T-shirt.",), 1: ("A red car.",), 2: ("The dog's ball.",)}


def in_chinese(data):
    """Return the same images with Chinese captions, and those captions as text."""
    captions = []
    for image in data.captions:
        _, color, shape = image[0].split()
        color, shape = COLORS[color], SHAPES[shape]
        captions.append(
            (f"一个{color}的{shape}。", f"这张图片里有{shape}，它是{color}的", f"{color}的{shape}在这里")[: len(image)]
        )
    return CaptionedImages(data.store, data.rows, captions, {})


@pytest.mark.parametrize(
    ("tokenizer", "name", "unit"),
    [
        ("auto", "words segmented by jieba", "word"),
        ("characters", "characters", "character"),
        ("bpe", "words segmented by jieba", "word"),
    ],
)
@pytest.mark.usefixtures("no_java")
def test_item_21_chinese_captions_are_learned_and_scored(
    tokenizer, name, unit, tmp_path, new_config, train_data, val_data
):
    train, val = in_chinese(train_data), in_chinese(val_data)
    settings = {"tokenizer": tokenizer, "max_length": 16, "learning_rate": 0.02, "batch_size": 4}
    config = new_config(tmp_path / "run", epochs=8, vocabulary={"max_size": 60}, **settings)
    fit(config, train, val, False, progress=False)
    checkpoint = load_checkpoint(tmp_path / "run")
    result = evaluate(checkpoint, val, CaptionConfig(max_length=16), EvaluationOptions(device="cpu", progress=False))
    written = {re.sub("[。，]", "", text) for image in train.captions for text in image}
    assert {re.sub("[。，]", "", text) for text in result.captions.values()} <= written, "no spaces, no cut captions"
    assert result.scores.values["CIDEr"] > 1
    assert (result.scores.tokenizer, result.scores.unit) == (name, unit)
    assert "only defined for languages with spaces" in result.scores.unavailable["METEOR"]
    if tokenizer == "bpe":
        scst = {"objective": "scst", "init_from": tmp_path / "run", "vocabulary": {"max_size": 60}, **settings}
        history = fit(new_config(tmp_path / "scst", epochs=1, **scst), train, val, False, progress=False)
        assert history[-1]["val_cider"] > 1


def test_item_21_a_perfect_decoder_scores_as_its_references():
    """Words that drop hyphens and keep "dog's" whole, as in training before, score 6.04."""
    references = {i: list(texts) for i, texts in TOY.items()}
    vocabulary = Vocabulary.build(text for texts in TOY.values() for text in texts)
    perfect = {i: vocabulary.decode(vocabulary.encode(texts[0], 30)) for i, texts in TOY.items()}
    assert perfect == {0: "a red t-shirt", 1: "a red car", 2: "the dog's ball"}
    assert cider(perfect, references) == pytest.approx(8.33, abs=0.005)
    before = {0: "a red t shirt", 1: "a red car", 2: "the dog's ball"}
    assert cider(before, references) == pytest.approx(6.04, abs=0.005)


@pytest.mark.parametrize("tokenizer", ["words", "characters", "bpe"])
@pytest.mark.usefixtures("no_java")
def test_item_21_the_reward_is_the_reported_metric(tokenizer, new_config, tmp_path):
    captions = [text for texts in TOY.values() for text in texts]
    vocabulary, _ = build_vocabulary(captions, adapt(new_config(tmp_path, tokenizer=tokenizer).train, 3, 6))
    texts = {0: "a red t-shirt", 1: "the dog's red car", 2: "the ball"}
    ids = [vocabulary.encode(text, 40)[1:] for text in texts.values()]
    tokens = np.array([[[*row, *[PAD] * (50 - len(row))]] for row in ids])
    rewards = CaptionReward.build(SimpleNamespace(captions=[*TOY.values()]), vocabulary, 0.0)(range(3), tokens)
    # The reward counts EOS as a word.
    ended = {i: f"{text} eos" for i, text in texts.items()}
    scores = score_captions(ended, {i: [f"{text} eos" for text in texts] for i, texts in TOY.items()}).per_image
    assert rewards[:, 0] == pytest.approx([scores[i]["CIDEr-D"] for i in range(3)], abs=1e-5)
    assert rewards.min() > 0.5
