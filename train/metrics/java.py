"""The Java programs of pycocoevalcap: METEOR and SPICE."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Texts = Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class ImageScores:
    """Scores of N images.

    Attributes:
        value: score of all images together.
        per_image: N scores.
        statistics: (N, k) float64, see `ImageStatistics`.
    """

    value: float
    per_image: list[float]
    statistics: np.ndarray


class JavaError(Exception):
    """A Java program is missing or failed; the message is the reason."""


def meteor(references: Texts, candidates: Texts) -> ImageScores:
    """Compute METEOR.

    Raises:
        JavaError: Java is missing or failed.
    """
    _require_java()
    try:
        with _silenced():
            from pycocoevalcap.meteor.meteor import Meteor

            statistics: list[str] = []

            class RecordingMeteor(Meteor):  # type: ignore[misc]
                def _stat(self, candidate: str, truth: Sequence[str]) -> str:
                    # The program separates texts by "|||"; pycocoevalcap removes it from candidates only.
                    line: str = super()._stat(candidate, [text.replace("|||", "") for text in truth])
                    statistics.append(line)
                    return line

            scorer = RecordingMeteor()
            try:
                value, scores = scorer.compute_score(references, candidates)
            finally:
                # pycocoevalcap does not release its lock after an error, and then its __del__ waits forever.
                scorer.lock = threading.RLock()
                scorer.meteor_p.kill()
                with contextlib.suppress(OSError):  # prevents a broken pipe error in __del__
                    scorer.meteor_p.stdin.close()
                scorer.meteor_p.wait()
        table = np.array([line.split() for line in statistics], np.float64)
    except Exception as error:  # failures of the subprocess surface as many kinds of exceptions
        raise JavaError(f"the Java program failed ({_describe(error)})") from error
    return ImageScores(value, scores, table)


def spice(references: Texts, candidates: Texts) -> ImageScores:
    """Compute SPICE.

    Raises:
        JavaError: Java or the CoreNLP models are missing, or the program failed.
    """
    _require_java()
    if not spice_models_installed():
        raise JavaError("requires Stanford's CoreNLP 3.6.0 models; pycocoevalcap's get_stanford_models downloads them")
    try:
        with _silenced(), _writable_spice_folders():
            from pycocoevalcap.spice.spice import Spice

            value, details = Spice().compute_score(references, candidates)
    except Exception as error:  # as for METEOR
        raise JavaError(f"the Java program failed ({_describe(error)})") from error
    by_image = dict(zip(sorted(references), details, strict=True))  # Spice sorts the image ids
    scores = [by_image[image]["All"]["f"] for image in references]
    return ImageScores(value, scores, np.array(scores, np.float64)[:, None])


def spice_models_installed() -> bool:
    """Return whether the CoreNLP models that SPICE needs are in pycocoevalcap's folder."""
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).glob("lib/stanford-corenlp-3.6.0*.jar")) for folder in folders or [])


@contextlib.contextmanager
def _writable_spice_folders() -> Iterator[None]:
    """Redirect SPICE's temporary files and cache if pycocoevalcap's folder is read-only."""
    from pycocoevalcap.spice import spice as module

    if os.access(Path(module.__file__).parent, os.W_OK):
        yield
        return
    names = ("TEMP_DIR", "CACHE_DIR")
    before = [getattr(module, name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:  # Spice joins them to its folder, and an absolute path replaces that
                setattr(module, name, str(Path(folder) / name.lower()))
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                setattr(module, name, value)


def _require_java() -> None:
    if shutil.which("java") is None:
        raise JavaError("requires Java, but there is no java on the PATH")


def _describe(error: Exception) -> str:
    """Return the start of the program's error output, or else the exception."""
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else b""
    text = " ".join(output.decode(errors="replace").split()) or f"{type(error).__name__}: {error}"
    return text[:120]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Discard the output of the Java programs and their wrappers, including that of the file descriptor."""
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
