"""Caption metrics, by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr, SPICE."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from train.vocabulary import tokenize

Captions = Mapping[int, Sequence[str]]


@dataclass
class Scores:
    """What an evaluation found.

    Attributes:
        values: metric -> score; BLEU, METEOR, ROUGE-L, SPICE from 0 to 1, CIDEr from 0 to 10, as the COCO
            evaluation server counts (papers print them times 100).
        tokenizer: which tokenisation the captions went through.
        left_out: metric -> why it could not be computed.
    """

    values: dict[str, float]
    tokenizer: str
    left_out: dict[str, str] = field(default_factory=dict)


def cider(candidates: Mapping[int, str], references: Captions) -> float:
    """CIDEr (Vedantam et al. 2015, arXiv:1411.5726) after our own tokenisation: quick, for choosing checkpoints.

    Args:
        candidates: image id -> caption.
        references: image id -> captions; the document frequencies are counted over these.
    """
    ours = {i: [" ".join(tokenize(text))] for i, text in candidates.items()}
    truth = {i: [" ".join(tokenize(text)) for text in references[i]] for i in candidates}
    return float(Cider().compute_score(truth, ours)[0])


def score_captions(candidates: Mapping[int, str], references: Captions) -> Scores:
    """All metrics that can be computed here.

    With Java the captions go through Stanford's PTB tokeniser, as on the COCO evaluation server, and METEOR
    runs; SPICE needs its Stanford models besides. What is left out says why.

    Args:
        candidates: image id -> caption.
        references: image id -> captions.
    """
    truth = {i: list(references[i]) for i in candidates}
    ours = {i: [text] for i, text in candidates.items()}
    tokenizer, tokenized = _tokenize_both(truth, ours)
    truth, ours = tokenized
    bleu, _ = Bleu(4).compute_score(truth, ours, verbose=0)
    values = {f"BLEU-{n}": float(score) for n, score in enumerate(bleu, 1)}
    scores = Scores(values, tokenizer)
    _java_metric(scores, "METEOR", truth, ours)
    values["ROUGE-L"] = float(Rouge().compute_score(truth, ours)[0])
    values["CIDEr"] = float(Cider().compute_score(truth, ours)[0])
    _java_metric(scores, "SPICE", truth, ours)
    return scores


_PYTHON_TOKENIZER = "gridcap (lower-case words without punctuation)"


def _tokenize_both(
    truth: dict[int, list[str]], ours: dict[int, list[str]]
) -> tuple[str, tuple[dict[int, list[str]], dict[int, list[str]]]]:
    if shutil.which("java"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        try:
            with _quiet():
                subprocess.run(["java", "-version"], check=True, capture_output=True)
                both = tuple(
                    PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in part.items()})
                    for part in (truth, ours)
                )
            if all(set(part) == set(truth) for part in both):
                return "PTB (Stanford, Java)", (both[0], both[1])
        except (OSError, ValueError, subprocess.CalledProcessError):
            pass  # no permission beside the library, or a Java that does not run: our own tokenisation serves
    own = tuple({i: [" ".join(tokenize(t)) for t in texts] for i, texts in part.items()} for part in (truth, ours))
    return _PYTHON_TOKENIZER, (own[0], own[1])


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
                    scores.values[name] = float(meteor.compute_score(truth, ours)[0])
                finally:
                    meteor.meteor_p.kill()
                    with contextlib.suppress(OSError):  # else __del__ complains of the broken pipe
                        meteor.meteor_p.stdin.close()
                    meteor.meteor_p.wait()
            else:
                from pycocoevalcap.spice.spice import Spice

                scores.values[name] = float(Spice().compute_score(truth, ours)[0])
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
