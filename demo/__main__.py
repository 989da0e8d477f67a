"""`make demo`: scenes -> features -> decoder -> captions, and a table of what came out.

It runs the installed commands, prints each before it runs, and keeps everything in one folder.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import yaml

from demo.shapes import ShapesSplit, write_shapes
from gridcap.common.config import PipelineConfig
from gridcap.common.scenes import COLORS, PLACES, SHAPES, SIZES, Scene, parse

IMAGES = {"train": 960, "val": 60, "test": 160}
EPOCHS = 8
SEEN = "decoder"
BLIND = "blind"
CHANCE = {"size": 1 / len(SIZES), "color": 1 / len(COLORS), "shape": 1 / len(SHAPES), "place": 1 / len(PLACES)}
EXAMPLES_SHOWN = 5
MARKER = ".gridcap-demo"  # only a folder that holds it is ever emptied


@click.command()
@click.option("--weights", default="random", help="random (no network needed), imagenet, or a weights file.")
@click.option("--output", default="demo_output", type=click.Path(path_type=Path), help="Folder for everything.")
def main(weights: str, output: Path) -> None:
    """Run the whole pipeline on rendered scenes and show what came out."""
    if output.exists() and not (output / MARKER).exists():
        raise click.ClickException(f"{output} is there and no demo's folder: choose another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    click.secho(f"drawing {sum(IMAGES.values())} scenes into {output}/shapes", bold=True)
    shapes = write_shapes(output / "shapes", IMAGES)
    seconds["draw the scenes"] = time.perf_counter() - begin
    config = output / "pipeline.yaml"
    config.write_text(_pipeline(output, shapes, weights), encoding="utf-8")

    shared = ["--config", str(config)]
    for split in IMAGES:
        _run(["extract-features", *shared, "--split", split], seconds, "extract the features")
    _run(["train-decoder", *shared], seconds, "train the decoder")
    blind_flags = ["--output", str(output / BLIND), "--set", "train.decoder.zero_features=true"]
    _run(["train-decoder", *shared, *blind_flags], seconds, "train it blind")
    for name in (SEEN, BLIND):
        test = ["--checkpoint", str(output / name), "--features", str(output / "features" / "test.h5")]
        _run(["evaluate-decoder", *shared, *test], seconds, "evaluate both")
    picture = output / "attention.png"
    photos = [str(path) for path in sorted(shapes["test"].images.iterdir())[:EXAMPLES_SHOWN]]
    caption = ["caption-images", *shared, "--checkpoint", str(output / SEEN), *photos, "--attention", str(picture)]
    _run(caption, seconds, "caption new scenes")
    _show(output, shapes["test"], seconds, weights, picture)


def _pipeline(output: Path, shapes: dict[str, ShapesSplit], weights: str) -> str:
    """The demo's pipeline.yaml: small sizes, since the vocabulary has some forty words."""
    tree = {
        "seed": 0,
        "data": {
            "features": str(output / "features"),
            "splits": {n: {"images": str(s.images), "annotations": str(s.annotations)} for n, s in shapes.items()},
        },
        "extract": {"weights": weights, "shard_size": 256},
        "train": {
            "output": str(output / SEEN),
            "epochs": EPOCHS,
            "captions_per_image": 3,
            "ema_decay": 0.98,
            "decoder": {
                "family": "attention",
                "cell": "att2in",
                "output": "hidden",
                "embed_size": 192,
                "hidden_size": 256,
                "attention_size": 96,
            },
        },
    }
    PipelineConfig.model_validate(tree)
    return yaml.safe_dump(tree, sort_keys=False)


def _run(command: list[str], seconds: dict[str, float], stage: str) -> None:
    click.secho(f"\n$ {' '.join(command)}", bold=True)
    begin = time.perf_counter()
    program = Path(sys.executable).parent / command[0]
    status = subprocess.run([program, *command[1:]], check=False).returncode
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begin
    if status != 0:
        raise SystemExit(status)


def accuracies(captions: dict[int, str], scenes: dict[int, Scene]) -> dict[str, float]:
    """The share of captions that name each attribute rightly, and all four ("all right")."""
    right = dict.fromkeys((*CHANCE, "all right"), 0)
    for image_id, caption in captions.items():
        named = parse(caption)
        hits = [named[name] == getattr(scenes[image_id], name) for name in CHANCE]
        for name, hit in zip(CHANCE, hits, strict=True):
            right[name] += hit
        right["all right"] += all(hits)
    return {name: count / len(captions) for name, count in right.items()}


def _show(output: Path, test: ShapesSplit, seconds: dict[str, float], weights: str, picture: Path) -> None:
    results = {n: json.loads((output / n / "evaluation" / "test.beam-3.json").read_text()) for n in (SEEN, BLIND)}
    history = [json.loads(line) for line in (output / SEEN / "metrics.jsonl").read_text().splitlines()]
    captions = {n: {e["image_id"]: e["caption"] for e in r["captions"]} for n, r in results.items()}
    shares = {n: accuracies(c, test.scenes) for n, c in captions.items()}
    chance = {**CHANCE, "all right": math.prod(CHANCE.values())}
    best = max(history, key=lambda row: row["val_cider"])

    lines = ["", f"{'stage':<34}{'seconds':>9}"]
    lines += [f"  {stage:<32}{spent:9.1f}" for stage, spent in seconds.items()]
    lines += [f"  {'together':<32}{sum(seconds.values()):9.1f}", ""]
    lines += [f"images: {IMAGES['train']} train, {IMAGES['val']} validation, {IMAGES['test']} test"]
    lines += [f"validation perplexity: {best['val_perplexity']:.2f}", ""]
    lines += [f"{'on test scenes never seen in training':<40}{'decoder':>9}{'blind':>9}{'chance':>9}"]
    lines += [f"  {'share of right descriptions':<38}"]
    for name in shares[SEEN]:
        lines += [f"    {name:<36}{shares[SEEN][name]:9.2f}{shares[BLIND][name]:9.2f}{chance[name]:9.2f}"]
    for name in ("BLEU-4", "CIDEr"):
        lines += [f"  {name:<38}{results[SEEN]['metrics'][name]:9.2f}{results[BLIND]['metrics'][name]:9.2f}"]
    lines += ["", "five captions beside their references (each of these has five):"]
    for entry in results[SEEN]["captions"][:EXAMPLES_SHOWN]:
        lines += [
            f"  {entry['file_name']}",
            f"    model:     {entry['caption']}",
            f"    reference: {entry['references'][0]}",
        ]
    lines += ["", f"the picture of where the decoder looked: {picture}"]
    if weights.startswith("random"):
        lines += [
            "The encoder has random weights: it separates simple shapes and colors, and would know nothing of a",
            "photo. The blind decoder never sees the grid: it knows the language alone.",
        ]
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
