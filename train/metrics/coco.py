"""COCO caption metrics: BLEU, METEOR, ROUGE-L, CIDEr, and SPICE from pycocoevalcap, and our CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from gridcap.train.data.tokenizers.base import Tokenizer
from gridcap.train.data.tokenizers.words import WORDS
from gridcap.train.metrics.bootstrap import Interval
from gridcap.train.metrics.ciderd import CiderD
from gridcap.train.metrics.java import ImageScores, JavaError, meteor, spice
from gridcap.train.metrics.sufficient import ImageStatistics, bleu_table

Captions = Mapping[int, Sequence[str]]
_Texts = dict[int, list[str]]


@dataclass
class Scores:
    """Result of an evaluation.

    Attributes:
        values: metric -> score. BLEU, METEOR, ROUGE-L, and SPICE are in [0, 1], CIDEr and CIDEr-D in [0, 10], as on
            the COCO evaluation server (papers multiply by 100).
        per_image: image id -> metric -> score of its caption. The value of ROUGE-L, CIDEr, CIDEr-D, and SPICE is the
            mean over the images; BLEU and METEOR aggregate counts instead.
        tokenizer: name of the tokenizer of the captions.
        unit: noun for the tokenizer's units, on which all metrics are computed.
        unavailable: metric -> reason why it was not computed.
        statistics: statistics of every image, in the order of `per_image`, from which the values follow.
        intervals: metric -> 95% confidence interval; see `bootstrap_intervals`.
    """

    values: dict[str, float]
    per_image: dict[int, dict[str, float]]
    tokenizer: str
    unit: str = "word"
    unavailable: dict[str, str] = field(default_factory=dict)
    statistics: ImageStatistics = field(default_factory=ImageStatistics)
    intervals: dict[str, Interval] = field(default_factory=dict)


def cider(candidates: Mapping[int, str], references: Captions, tokenizer: Tokenizer = WORDS) -> float:
    """Return the CIDEr that `score_captions` computes; fast, for selecting checkpoints.

    Args:
        candidates: image id -> caption.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
        tokenizer: tokenizer whose units are compared.
    """
    tokens = [tokenizer.split(text) for text in candidates.values()]
    reference_tokens = [[tokenizer.split(text) for text in references[i]] for i in candidates]
    return float(CiderD(reference_tokens).scores(range(len(tokens)), tokens).mean())


def score_captions(candidates: Mapping[int, str], references: Captions, tokenizer: Tokenizer = WORDS) -> Scores:
    """Compute all metrics that are available on this machine.

    Captions are split by the tokenizer of training and of the SCST reward. For languages with spaces, that is a Python
    version of Stanford's PTB tokenizer, which the COCO evaluation server uses; see `ptb_tokenize` for the differences.
    METEOR needs Java, SPICE also Stanford's CoreNLP models, and both are only defined for words. Unavailable metrics
    are listed with the reason.

    CIDEr and CIDEr-D agree: the COCO server and pycocoevalcap implement CIDEr-D under the name CIDEr. Papers use
    either name.

    Args:
        candidates: image id -> caption, at least one.
        references: image id -> captions; document frequencies are counted over the images of the candidates.
        tokenizer: tokenizer whose units are compared.
    """
    truth = {i: [" ".join(tokenizer.split(text)) for text in references[i]] for i in candidates}
    results = {i: [" ".join(tokenizer.split(text))] for i, text in candidates.items()}
    scores = Scores({}, {i: {} for i in candidates}, tokenizer.name, tokenizer.unit)
    _add_bleu(scores, truth, results)
    _add_java(scores, "METEOR", meteor, truth, results)
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, each = metric.compute_score(truth, results)
        _add_mean(scores, name, value, each)
    ciderd = CiderD([[text.split() for text in texts] for texts in truth.values()])
    ciderds = ciderd.scores(range(len(truth)), [results[i][0].split() for i in truth])
    _add_mean(scores, "CIDEr-D", ciderds.mean(), ciderds)
    _add_java(scores, "SPICE", spice, truth, results)
    return scores


def _add_bleu(scores: Scores, truth: _Texts, results: _Texts) -> None:
    scorer = BleuScorer(n=4)
    for image, texts in truth.items():
        scorer += (results[image][0], texts)
    values, each = scorer.compute_score(option="closest")
    for n in range(4):
        _add(scores, f"BLEU-{n + 1}", values[n], each[n])
    scores.statistics.tables["BLEU"] = bleu_table(scorer.ctest)


def _add(scores: Scores, name: str, value: float, each: Iterable[float]) -> None:
    scores.values[name] = float(value)
    for of_image, score in zip(scores.per_image.values(), each, strict=True):
        of_image[name] = float(score)


def _add_mean(scores: Scores, name: str, value: float, each: Iterable[float]) -> None:
    """Add a metric that is the mean of its scores per image."""
    _add(scores, name, value, each)
    column = [of_image[name] for of_image in scores.per_image.values()]
    scores.statistics.tables[name] = np.array(column, np.float64)[:, None]


def _add_java(
    scores: Scores, name: str, metric: Callable[[_Texts, _Texts], ImageScores], truth: _Texts, results: _Texts
) -> None:
    """Add a metric that runs in Java, or the reason why it is unavailable."""
    if scores.tokenizer != WORDS.name:
        scores.unavailable[name] = f"only defined for languages with spaces, not for {scores.tokenizer}"
        return
    try:
        computed = metric(truth, results)
    except JavaError as error:
        scores.unavailable[name] = str(error)
    else:
        _add(scores, name, computed.value, computed.per_image)
        scores.statistics.tables[name] = computed.statistics
