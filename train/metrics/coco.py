"""Caption metrics: BLEU, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap, CIDEr-D by our own scorer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import threading
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from gridcap.train.data.tokenizer import ptb_tokenize
from gridcap.train.metrics.ciderd import CiderD

Captions = Mapping[int, Sequence[str]]


@dataclass
class Scores:
    """What an evaluation found.

    Attributes:
        values: metric -> score; BLEU, METEOR, ROUGE-L, SPICE from 0 to 1, CIDEr and CIDEr-D from 0 to 10, as the
            COCO evaluation server counts (papers print them times 100).
        per_image: image id -> metric -> the score of its caption. Their mean is the value of ROUGE-L, CIDEr,
            CIDEr-D and SPICE; BLEU and METEOR add up counts over all images instead.
        tokenizer: which tokenisation the captions went through.
        left_out: metric -> why it could not be computed.
    """

    values: dict[str, float]
    per_image: dict[int, dict[str, float]]
    tokenizer: str
    left_out: dict[str, str] = field(default_factory=dict)


def cider(candidates: Mapping[int, str], references: Captions) -> float:
    """CIDEr as `score_captions` gives it without Java: quick, for choosing checkpoints.

    Args:
        candidates: image id -> caption.
        references: image id -> captions; the document frequencies are counted over those of the candidates' images.
    """
    ours = [ptb_tokenize(text) for text in candidates.values()]
    truth = [[ptb_tokenize(text) for text in references[i]] for i in candidates]
    return float(CiderD(truth).scores(range(len(ours)), ours).mean())


def score_captions(candidates: Mapping[int, str], references: Captions) -> Scores:
    """All metrics that can be computed here.

    With Java the captions go through Stanford's PTB tokenizer, as on the COCO evaluation server, and METEOR
    runs; SPICE needs its Stanford models besides. What is left out says why. Without Java they go through
    `ptb_tokenize`, which gives the same words for nearly all captions and so nearly the same scores: it parts
    from PTB at smileys, emoji, fractions like "1½", "ok?yes" without a blank, and rare abbreviations.

    CIDEr and CIDEr-D agree: what the COCO server and pycocoevalcap call CIDEr is by its formula CIDEr-D. Papers
    print it under either name.

    Args:
        candidates: image id -> caption, at least one.
        references: image id -> captions; the document frequencies are counted over those of the candidates' images.
    """
    truth = {i: [_one_line(text) for text in references[i]] for i in candidates}
    ours = {i: [_one_line(text)] for i, text in candidates.items()}
    tokenizer, (truth, ours) = _tokenize_both(truth, ours)
    scores = Scores({}, {i: {} for i in candidates}, tokenizer)
    bleu, bleus = Bleu(4).compute_score(truth, ours, verbose=0)
    for n in range(4):
        _add(scores, f"BLEU-{n + 1}", bleu[n], truth, bleus[n])
    _java_metric(scores, "METEOR", truth, ours)
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, each = metric.compute_score(truth, ours)
        _add(scores, name, value, truth, each)
    ciderd = CiderD([[text.split() for text in texts] for texts in truth.values()])
    each = ciderd.scores(range(len(truth)), [ours[i][0].split() for i in truth])
    _add(scores, "CIDEr-D", each.mean(), truth, each)
    _java_metric(scores, "SPICE", truth, ours)
    return scores


def _add(scores: Scores, name: str, value: float, images: Iterable[int], each: Iterable[float]) -> None:
    scores.values[name] = float(value)
    for image, score in zip(images, each, strict=True):
        scores.per_image[image][name] = float(score)


def _one_line(text: str) -> str:
    """Composed characters and single blanks: the PTB tokenizer starts a new caption at every kind of line end."""
    return " ".join(unicodedata.normalize("NFC", text).split())


_PYTHON_TOKENIZER = "gridcap's own rules, nearly PTB's (no Java)"


def _tokenize_both(
    truth: dict[int, list[str]], ours: dict[int, list[str]]
) -> tuple[str, tuple[dict[int, list[str]], dict[int, list[str]]]]:
    """The tokenizer's name, and both with the words joined by blanks, in the order they came in."""
    if shutil.which("java"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        try:
            with _quiet():
                subprocess.run(["java", "-version"], check=True, capture_output=True)
                both = tuple(
                    PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in part.items()})
                    for part in (truth, ours)
                )
            if all(_counts(new) == _counts(old) for new, old in zip(both, (truth, ours), strict=True)):
                return "PTB (Stanford, Java)", (both[0], both[1])
        except (OSError, ValueError, subprocess.CalledProcessError):
            pass  # no permission beside the library, or a Java that does not run: our own tokenisation serves
    own = tuple(
        {i: [" ".join(ptb_tokenize(text)) for text in texts] for i, texts in part.items()} for part in (truth, ours)
    )
    return _PYTHON_TOKENIZER, (own[0], own[1])


def _counts(captions: dict[int, list[str]]) -> dict[int, int]:
    return {i: len(texts) for i, texts in captions.items()}


def _java_metric(scores: Scores, name: str, truth: dict[int, list[str]], ours: dict[int, list[str]]) -> None:
    """METEOR or SPICE, or the reason why not."""
    if not shutil.which("java"):
        scores.left_out[name] = "needs Java, and there is no java on the PATH"
        return
    if name == "SPICE" and not _spice_models_there():
        scores.left_out[name] = (
            "needs Stanford's CoreNLP 3.6.0 models, which pycocoevalcap downloads by get_stanford_models"
        )
        return
    try:
        with _quiet():
            if name == "METEOR":
                from pycocoevalcap.meteor.meteor import Meteor

                meteor = Meteor()
                meteor.lock = threading.RLock()  # its own is never released after an error, and then __del__ waits
                try:
                    value, each = meteor.compute_score(truth, ours)
                finally:
                    meteor.meteor_p.kill()
                    with contextlib.suppress(OSError):  # else __del__ complains of the broken pipe
                        meteor.meteor_p.stdin.close()
                    meteor.meteor_p.wait()
            else:
                from pycocoevalcap.spice.spice import Spice

                value, by_category = Spice().compute_score(truth, ours)
                found = dict(zip(sorted(truth), by_category, strict=True))  # it sorts the ids
                each = [found[i]["All"]["f"] for i in truth]
        _add(scores, name, value, truth, each)
    except Exception as error:  # the Java side fails in many ways; the other metrics must not be lost for it
        scores.left_out[name] = f"its Java program failed ({type(error).__name__}: {str(error)[:80]})"


def _spice_models_there() -> bool:
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).glob("lib/stanford-corenlp-3.6.0*.jar")) for folder in folders or [])


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Silence what the Java programs and their wrappers print, descriptor and all."""
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as sink:
        kept = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
