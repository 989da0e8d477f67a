"""The metrics of 5 000 captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.inputs import make_captions
from bench.measure import Row, fresh, rounds


def measure(work: Path, quick: bool) -> Iterator[Row]:
    """Seconds, without METEOR and SPICE."""
    images = 1000 if quick else 5000
    captions = make_captions(work / "references.json", images)
    values = rounds(1 if quick else 3, {"ours": lambda: fresh("bench.scoring:seconds", captions)})
    yield Row(
        "scoring",
        f"metrics of {images} captions",
        "s",
        values["ours"],
        wanted={"at most": 20},
        note="BLEU, ROUGE-L, CIDEr, CIDEr-D; without Java, so without METEOR and SPICE",
    )


def seconds(captions_file: str) -> float:
    """Of `score_captions`, as on a machine without Java."""
    import json
    import os
    import time

    os.environ["PATH"] = ""
    from gridcap.train.metrics.coco import score_captions

    tree = json.loads(Path(captions_file).read_text())
    references: dict[int, list[str]] = {image["id"]: [] for image in tree["images"]}
    for annotation in tree["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"])
    candidates = {image: texts.pop() for image, texts in references.items()}
    begin = time.perf_counter()
    score_captions(candidates, references)
    return time.perf_counter() - begin
