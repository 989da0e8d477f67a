"""Time to compute the COCO metrics of 5,000 captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.inputs import make_captions
from bench.measure import Row, call_in_process, run_rounds


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Measure seconds for all metrics except METEOR and SPICE."""
    images = 1000 if quick else 5000
    captions = make_captions(work / "references.json", images)
    values = run_rounds(1 if quick else 3, {"gridcap": lambda: call_in_process("bench.scoring:score", captions)})
    yield Row(
        "scoring",
        f"metrics of {images} captions",
        "s",
        values["gridcap"],
        targets={"maximum": 20},
        note="BLEU, ROUGE-L, CIDEr, CIDEr-D; without the metrics that need Java (METEOR, SPICE)",
    )


def score(captions_file: str) -> float:
    """Return the seconds that `score_captions` takes on a machine without Java."""
    import json
    import os
    import time

    os.environ["PATH"] = ""  # hides Java
    from gridcap.train.metrics.coco import score_captions

    tree = json.loads(Path(captions_file).read_text())
    references: dict[int, list[str]] = {image["id"]: [] for image in tree["images"]}
    for annotation in tree["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    candidates = {image: texts.pop() for image, texts in references.items()}
    start = time.perf_counter()
    score_captions(candidates, references)
    return time.perf_counter() - start
