"""`make demo`: render scenes, extract features, train and evaluate decoders, and print a summary.

Runs the installed commands, prints each command line first, and writes all files to one folder.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from demo.encoder import DemoEncoder, choose_encoder
from demo.shapes import ShapesSplit, write_shapes
from gridcap.common.config import PipelineConfig
from gridcap.common.scenes import COLORS, PLACES, SHAPES, SIZES, Scene, parse

IMAGES = {"train": 960, "val": 60, "test": 160}
EPOCHS = 8
DECODER = "decoder"
ABLATION = "zero-features"  # the language-only baseline: the same decoder, trained on features set to zero
CHANCE = {"size": 1 / len(SIZES), "color": 1 / len(COLORS), "shape": 1 / len(SHAPES), "place": 1 / len(PLACES)}
EXAMPLES = 5
MARKER = ".gridcap-demo"  # only folders that contain this file are deleted


@dataclass
class Stages:
    """Wall-clock seconds per stage, in the order of the stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, start: float) -> None:
        """Add the time since `start` to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def run(self, stage: str, command: list[str]) -> None:
        """Print and run a Gridcap command; exit with its status if it fails."""
        click.secho(f"\n$ {' '.join(command)}", bold=True)
        start = time.perf_counter()
        program = Path(sys.executable).parent / command[0]
        status = subprocess.run([program, *command[1:]], check=False).returncode
        self.add(stage, start)
        if status != 0:
            raise SystemExit(status)


@click.command()
@click.option(
    "--weights",
    help="use InceptionV3 with random weights (random), ImageNet weights (imagenet), or those of a file "
    "[default: EfficientNet-Lite0 with ImageNet weights]",
)
@click.option("--output", default="demo_output", type=click.Path(path_type=Path), help="output folder")
def main(weights: str | None, output: Path) -> None:
    """Run the whole pipeline on rendered scenes and print the results."""
    if output.exists() and not (output / MARKER).exists():
        raise click.ClickException(f"{output} exists and was not written by the demo: pass another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    stages = Stages()
    start = time.perf_counter()
    click.secho(f"rendering {sum(IMAGES.values())} scenes to {output}/shapes", bold=True)
    shapes = write_shapes(output / "shapes", IMAGES)
    stages.add("render the scenes", start)
    start = time.perf_counter()
    encoder = choose_encoder(weights, output)
    stages.add("prepare the encoder", start)
    click.echo(encoder.note)
    _run_pipeline(stages, output, shapes, encoder)
    click.echo("\n".join(_summary(output, shapes["test"], stages.seconds)))
    click.echo(f"{encoder.note}\nThe decoder trained on zero features shows what language statistics alone achieve.")


def _run_pipeline(stages: Stages, output: Path, shapes: dict[str, ShapesSplit], encoder: DemoEncoder) -> None:
    config = output / "pipeline.yaml"
    config.write_text(_pipeline_yaml(output, shapes, encoder), encoding="utf-8")
    shared = ["--config", str(config)]
    for split in IMAGES:
        stages.run("extract the features", ["extract-features", *shared, "--split", split])
    stages.run("train the decoder", ["train-decoder", *shared])
    ablation = ["--output", str(output / ABLATION), "--set", "train.decoder.zero_features=true"]
    stages.run("train on zero features", ["train-decoder", *shared, *ablation])
    for name in (DECODER, ABLATION):
        test = ["--checkpoint", str(output / name), "--features", str(output / "features" / "test.h5")]
        stages.run("evaluate both", ["evaluate-decoder", *shared, *test])
    photos = [str(path) for path in sorted(shapes["test"].images.iterdir())[:EXAMPLES]]
    arguments = ["--checkpoint", str(output / DECODER), *photos, "--attention", str(_attention_maps(output))]
    if Path(encoder.settings["weights"]).is_file():
        arguments += ["--weights", encoder.settings["weights"]]  # checkpoints name the weights, not the path
    stages.run("caption new scenes", ["caption-images", *shared, *arguments])


def _attention_maps(output: Path) -> Path:
    return output / "attention.png"


def _pipeline_yaml(output: Path, shapes: dict[str, ShapesSplit], encoder: DemoEncoder) -> str:
    """Return the demo's pipeline.yaml.

    The decoder is small, since the vocabulary has about forty tokens. The captions of scenes have no noise, so plain
    training converges faster than the default, which is made for photos.
    """
    tree = {
        "seed": 0,
        "data": {
            "features_dir": str(output / "features"),
            "splits": {n: {"images": str(s.images), "annotations": str(s.annotations)} for n, s in shapes.items()},
        },
        "extract": {**encoder.settings, "shard_size": 256},
        "train": {
            "output": str(output / DECODER),
            "epochs": EPOCHS,
            "captions_per_image": 3,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "label_smoothing": 0.0,
            "ema_decay": 0.98,
            "vocabulary": {"min_count": 1},
            "decoder": {
                "family": "attention",
                "cell": "att2in",
                "output_layer": "hidden",
                "embed_size": 192,
                "hidden_size": 256,
                "attention_size": 96,
                "dropout": 0.3,
            },
        },
    }
    PipelineConfig.model_validate(tree)
    return yaml.safe_dump(tree, sort_keys=False)


def attribute_accuracies(captions: Mapping[int, str], scenes: Mapping[int, Scene]) -> dict[str, float]:
    """Return the fraction of captions that name each attribute correctly, and all four ("all correct").

    Args:
        captions: image id -> generated caption, at least one.
        scenes: image id -> rendered scene.
    """
    counts = dict.fromkeys((*CHANCE, "all correct"), 0)
    for image_id, caption in captions.items():
        predicted = parse(caption)
        correct = [predicted[name] == getattr(scenes[image_id], name) for name in CHANCE]
        for name, is_correct in zip(CHANCE, correct, strict=True):
            counts[name] += is_correct
        counts["all correct"] += all(correct)
    return {name: count / len(captions) for name, count in counts.items()}


def _summary(output: Path, test: ShapesSplit, seconds: Mapping[str, float]) -> list[str]:
    results = {
        name: json.loads((output / name / "evaluation" / "test.beam-3.json").read_text())
        for name in (DECODER, ABLATION)
    }
    history = [json.loads(line) for line in (output / DECODER / "metrics.jsonl").read_text().splitlines()]
    best = max(history, key=lambda row: row["val_cider"])
    lines = ["", f"{'stage':<34}{'seconds':>9}"]
    lines += [f"  {stage:<32}{spent:9.1f}" for stage, spent in seconds.items()]
    lines += [f"  {'total':<32}{sum(seconds.values()):9.1f}", ""]
    lines += [f"images: {IMAGES['train']} train, {IMAGES['val']} validation, {IMAGES['test']} test"]
    lines += [f"validation perplexity: {best['val_perplexity']:.2f}", ""]
    lines += _results_table(results, test)
    lines += ["", f"{EXAMPLES} generated captions, each with one of its five references:"]
    for entry in results[DECODER]["captions"][:EXAMPLES]:
        lines += [
            f"  {entry['file_name']}",
            f"    generated: {entry['caption']}",
            f"    reference: {entry['references'][0]}",
        ]
    return [*lines, "", f"attention maps: {_attention_maps(output)}"]


def _results_table(results: Mapping[str, Any], test: ShapesSplit) -> list[str]:
    captions = {name: {e["image_id"]: e["caption"] for e in result["captions"]} for name, result in results.items()}
    accuracies = {name: attribute_accuracies(texts, test.scenes) for name, texts in captions.items()}
    chance = {**CHANCE, "all correct": math.prod(CHANCE.values())}
    lines = [f"{'test scenes (combinations not in training)':<44}{'decoder':>9}{'zero features':>15}{'chance':>8}"]
    lines += ["  attribute accuracy"]
    for name in accuracies[DECODER]:
        lines += [
            f"    {name:<40}{accuracies[DECODER][name]:9.2f}{accuracies[ABLATION][name]:15.2f}{chance[name]:8.2f}"
        ]
    for name in ("BLEU-4", "CIDEr"):
        lines += [f"  {name:<42}{results[DECODER]['metrics'][name]:9.2f}{results[ABLATION]['metrics'][name]:15.2f}"]
    return lines


if __name__ == "__main__":
    main()
