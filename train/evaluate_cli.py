"""evaluate-decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.annotations import captions_alone, load_split
from common.command import flag, pipeline_command, show_config
from common.config import PipelineConfig
from common.errors import GridcapError
from common.store import FeatureStore, check_same_features

if TYPE_CHECKING:
    from train.evaluate import Evaluation

EXAMPLES = """
evaluate-decoder --checkpoint runs/mine --features features/test.h5
evaluate-decoder --checkpoint runs/mine --features test.h5 --annotations captions_test.json --beam-size 5
evaluate-decoder --checkpoint runs/a --checkpoint runs/b --features features/test.h5     (both decode together)
evaluate-decoder --checkpoint runs/mine --features features/test.h5 --search sample --top-p 0.9 --seed 1
"""


def _training_captions(config: PipelineConfig) -> tuple[list[str] | None, str]:
    """The captions that a run was trained on, or None and why not.

    They are read again from the run's captions file, the subset of its split included; whether a captions file of
    its own was used only in part is not known.
    """
    given, split = config.train.annotations, config.data.splits.get("train")
    if given is not None:
        split = captions_alone(given)
    if split is None or split.annotations is None:
        return None, "needs the training captions, and the run's configuration does not say where they are"
    if not split.annotations.is_file():
        return None, f"needs the training captions, and {split.annotations} is not there"
    try:
        loaded = load_split(split, "train", config.seed, config.data.max_bad)
    except (GridcapError, OSError) as error:
        return None, f"needs the training captions: {error}"
    return [text for record in loaded.records for text in record.captions], ""


@pipeline_command("evaluate-decoder", EXAMPLES)
@click.option(
    "--checkpoint", "checkpoints", type=click.Path(path_type=Path), required=True, multiple=True,
    help="Folder of a run or of a checkpoint; given several times, their predictions are averaged.",
)  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), required=True, help="Feature store to evaluate on.")
@click.option("--annotations", type=click.Path(path_type=Path), help="Its captions  [default: those of its split]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="JSON file for the result  [default: <first run>/evaluation/<features>.json]",
)
@flag("--search", "caption.search")
@flag("--beam-size", "caption.beam_size")
@flag("--length-penalty", "caption.length_penalty")
@flag("--block-trigrams", "caption.block_trigrams")
@flag("--temperature", "caption.temperature")
@flag("--top-k", "caption.top_k")
@flag("--top-p", "caption.top_p")
@flag("--max-length", "caption.max_length")
@flag("--batch-size", "caption.batch_size")
@flag("--device", "train.device")
@flag("--seed", "seed")
def evaluate_decoder(
    config: PipelineConfig,
    dry_run: bool,
    checkpoints: tuple[Path, ...],
    features: Path,
    annotations: Path | None,
    output: Path | None,
) -> None:
    """Caption a feature store and score the captions with the field's metrics.

    Writes a JSON file with the metrics and every caption, and beside it a CSV file with the scores of every image
    and the captions in COCO's results format. Exit status: 0 done, 1 failure, 2 wrong use.
    """
    from train.checkpoint import run_folder
    from train.ensemble import load_ensemble
    from train.evaluate import NOVEL, evaluate, write_evaluation
    from train.inputs import captions_for, warn_if_random

    click.echo("configuration")
    show_config(config, "caption")
    loaded = load_ensemble(checkpoints)
    store = FeatureStore(features)
    data = captions_for(store, annotations, [config, loaded.config], "test", "--annotations")
    warn_if_random(store)
    check_same_features(loaded.provenance, store.provenance, f"{loaded.path} was trained on", f"{features} holds")
    output = output or run_folder(checkpoints[0]) / "evaluation" / f"{features.stem}.json"
    what = ", ".join(str(path) for path in (loaded.path, *checkpoints[1:]))
    if dry_run:
        click.echo(f"dry run: would evaluate {what} on {len(data)} images into {output}")
        return
    training, why = _training_captions(loaded.config)
    result = evaluate(loaded, data, config.caption, config.train.device, training, config.seed)
    if training is None:
        result.scores.left_out[NOVEL] = why
    written = write_evaluation(result, output)
    click.echo(f"{what} on {len(data)} images, {_search(config)}, tokens by {result.scores.tokenizer}")
    _show(result)
    click.echo(f"done: {', '.join(map(str, written))}")


def _search(config: PipelineConfig) -> str:
    """How the captions were decoded, in words."""
    caption = config.caption
    if caption.search == "beam":
        return f"beam {caption.beam_size}"
    limits = "".join(f", {name} {v}" for name in ("top_k", "top_p") if (v := getattr(caption, name)) is not None)
    return f"sampled at temperature {caption.temperature:g}{limits}, seed {config.seed}"


def _show(result: Evaluation) -> None:
    """Metrics, then what the captions are like, then what was left out and why."""
    for name, value in result.scores.values.items():
        click.echo(f"  {name:<17} {value:8.4f}")
    found = result.language
    lines = {
        "words used": f"{found['words_used']:8} of {found['vocabulary_words']} in the vocabulary",
        "distinct captions": f"{found['distinct_captions']:8.1%} of the captions",
        "novel captions": f"{found['novel_captions']:8.1%} are no training caption"
        if "novel_captions" in found
        else "",
        "mean length": f"{found['mean_length']:8.2f} words; of the references {found['mean_reference_length']:.2f}",
    }
    click.echo("")
    for name, text in lines.items():
        if text:
            click.echo(f"  {name:<17} {text}")
    if result.scores.left_out:
        click.echo("")
    for name, why in result.scores.left_out.items():
        click.echo(f"  {name.replace('_', ' '):<17} left out: {why}")
