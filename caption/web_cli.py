"""The `gridcap serve` command."""

from __future__ import annotations

import errno
import importlib.util
import socket
import threading
from pathlib import Path

import click

from gridcap.caption.options import show_dry_run, warn_if_random, weights_option
from gridcap.common.command import Uses, flag, pipeline_command
from gridcap.common.config import CaptionConfig, PipelineConfig
from gridcap.common.errors import UserError

EXAMPLES = """
gridcap serve --checkpoint runs/mine
gridcap serve --checkpoint runs/a --checkpoint runs/b                   (compare two runs)
gridcap serve --checkpoint runs/mine --host 0.0.0.0 --port 8000         (reachable from the network)
"""


# Photos are decoded one at a time.
DECODING_KEYS = [f"caption.{name}" for name in CaptionConfig.model_fields if name != "batch_size"]
USES = Uses((*DECODING_KEYS, "extract.device", "seed"), "caption.max_length=20")


@pipeline_command("serve", EXAMPLES, uses=USES)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="folder of a run or of a checkpoint; repeat the option to compare several",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0 for all interfaces")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="port to listen on")
@weights_option
@flag("--decoding", "caption.decoding")
@flag("--beam-size", "caption.beam_size")
@flag("--length-penalty", "caption.length_penalty")
@flag("--max-length", "caption.max_length")
@flag("--seed", "seed")
@flag("--device", "extract.device")
def main(
    config: PipelineConfig, dry_run: bool, checkpoints: tuple[Path, ...], host: str, port: int, weights: Path | None
) -> None:
    """Serve a web page that captions uploaded photos.

    The page also shows attention maps. Photos are processed on this machine only. Press Ctrl-C to stop.
    """
    if dry_run:
        show_dry_run(config, checkpoints, f"serve {{}} at http://{host}:{port}")
        return
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gridcap serve requires Gradio, which is not installed", "pip install 'gridcap[web]'")
    _check_address(host, port)
    from gridcap.caption.captioner import Captioner

    captioners = [Captioner.load(path, device=config.extract.device, weights=weights) for path in checkpoints]
    warn_if_random(captioners)
    from gridcap.caption.web import make_page, serve

    page = make_page(captioners, [str(path) for path in checkpoints], config.caption, config.seed)
    url = serve(page, host, port)
    click.echo(f"serving at {url} (press Ctrl-C to stop)")
    try:
        threading.Event().wait()  # until Ctrl-C or a stop signal; Gradio's own loop hides both
    finally:
        page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Raise UserError if the page cannot be served at an address. Checked first: loading the models takes seconds."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"--port {port}: {error.strerror}", "pass another --port, 1024 or higher") from error
        raise UserError(f"--host {host}: {error.strerror}", "pass an address of this machine") from error
