"""caption-web: the page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from gridcap.caption.options import warn_if_random, weights_option
from gridcap.common.command import flag, pipeline_command, show_config
from gridcap.common.config import PipelineConfig
from gridcap.common.errors import UserError

EXAMPLES = """
caption-web --checkpoint runs/mine
caption-web --checkpoint runs/a --checkpoint runs/b                   (side by side)
caption-web --checkpoint runs/mine --host 0.0.0.0 --port 8000         (for everybody in the network)
"""


@pipeline_command("caption-web", EXAMPLES)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder of a run or of a checkpoint. Several are shown side by side: give it again.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is everywhere.")
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
    """Serve a web page: a photo in, captions out, and where the decoder looked.

    Nothing leaves this machine. Ctrl-C ends it.
    """
    from gridcap.train.engine.checkpoint import find_checkpoint

    if dry_run:
        click.echo("configuration")
        show_config(config, "caption")
        found_at = ", ".join(str(find_checkpoint(path)) for path in checkpoints)
        click.echo(f"dry run: would serve {found_at} at http://{host}:{port}")
        return
    if importlib.util.find_spec("gradio") is None:
        raise UserError("caption-web needs Gradio, and it is not installed", "pip install 'gridcap[web]'")
    from gridcap.caption.captioner import Captioner

    captioners = [Captioner.load(path, device=config.extract.device, weights=weights) for path in checkpoints]
    warn_if_random(captioners)
    from gridcap.caption.web import make_page, serve

    page = make_page(captioners, [str(path) for path in checkpoints], config.caption)
    try:
        url = serve(page, host, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error}", "choose another --port") from error
    click.echo(f"the page is at {url} (Ctrl-C ends it)")
    page.block_thread()
