"""The `gridcap serve` command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from gridcap.caption.options import USES, show_dry_run, warn_if_random, weights_option
from gridcap.common.command import flag, pipeline_command
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError

EXAMPLES = """
gridcap serve --checkpoint runs/mine
gridcap serve --checkpoint runs/a --checkpoint runs/b                   (compare two runs)
gridcap serve --checkpoint runs/mine --host 0.0.0.0 --port 8000         (reachable from the network)
"""


@pipeline_command("serve", EXAMPLES, uses=USES)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder of a run or of a checkpoint. Repeat the option to compare several.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all interfaces."
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port to listen on.")
@weights_option
@flag("--decoding", "caption.decoding")
@flag("--beam-size", "caption.beam_size")
@flag("--length-penalty", "caption.length_penalty")
@flag("--max-length", "caption.max_length")
@flag("--device", "extract.device")
def main(
    config: PipelineConfig, dry_run: bool, checkpoints: tuple[Path, ...], host: str, port: int, weights: Path | None
) -> None:
    """Serve a web page that captions uploaded photos and shows attention maps.

    Photos are processed on this machine only. Press Ctrl-C to stop.
    """
    if dry_run:
        show_dry_run(config, checkpoints, f"serve {{}} at http://{host}:{port}")
        return
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gridcap serve requires Gradio, which is not installed", "pip install 'gridcap[web]'")
    from gridcap.caption.captioner import Captioner

    captioners = [Captioner.load(path, device=config.extract.device, weights=weights) for path in checkpoints]
    warn_if_random(captioners)
    from gridcap.caption.web import make_page, serve

    page = make_page(captioners, [str(path) for path in checkpoints], config.caption)
    try:
        url = serve(page, host, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error}", "pass another --port") from error
    click.echo(f"serving at {url} (press Ctrl-C to stop)")
    page.block_thread()
