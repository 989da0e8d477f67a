"""The web page in a real browser: captions, attention maps, invalid files, and no external requests."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import select
import signal
import socket
import struct
import threading
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from gridcap.caption.captioner import Captioner
from gridcap.caption.web_cli import main
from gridcap.common.config import CaptionConfig

gradio = pytest.importorskip("gradio") if not os.environ.get("CI") else __import__("gradio")
BEAM = CaptionConfig(beam_size=3, max_length=9)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def captioner(fake: Any, checkpoint: Any) -> Captioner:
    return Captioner.load(checkpoint(end_bias=2.0), device="cpu")


@pytest.fixture
def served(captioner: Captioner) -> Iterator[Callable[..., str]]:
    """Return a function that serves the page for some captioners and returns its URL."""
    from gridcap.caption.web import make_page, serve

    pages = []

    def start(*captioners: Captioner) -> str:
        columns = captioners or (captioner,)
        page = make_page(columns, [f"run {i}" for i in range(len(columns))], BEAM)
        pages.append(page)
        return serve(page, "127.0.0.1", free_port())

    yield start
    for page in pages:
        page.close()


@pytest.fixture
def browse(browser: Any, served: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the page in a browser; external requests and script errors fail the test."""
    contexts: list[Any] = []
    problems: list[str] = []

    def start(*captioners: Captioner, **options: Any) -> Any:
        address = served(*captioners)
        contexts.append(browser.new_context(**options))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(60_000)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:", "blob:", "about:")) else problems.append(request.url)
            ),
        )
        opened.goto(address)
        opened.wait_for_selector("#photo")
        return opened

    yield start
    for context in contexts:
        context.close()
    assert problems == []


def upload(opened: Any, photo: Path) -> None:
    opened.set_input_files("#photo input[type=file]", photo)


def alternatives(opened: Any, column: int = 0) -> list[str]:
    table = opened.locator("table.alternatives").nth(column)
    table.wait_for()
    return [row.locator("td").first.inner_text() for row in table.locator("tbody tr").all()]


def test_upload_shows_captions_and_attention_maps(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any
) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse()
    upload(opened, photo)
    expected = captioner.alternatives(photo, BEAM)
    assert len(expected) > 1
    assert alternatives(opened) == [caption.text for caption in expected]
    frame = opened.frame_locator("iframe").first
    assert " ".join(frame.locator(".caption").text_content().split()) == expected[0].text
    frame.locator(".token").first.hover()
    frame.get_by_text("peak attention weight").wait_for()


_FILE = """async (data) => {
    const blob = await (await fetch("data:image/png;base64," + data)).blob();
    return new File([blob], "photo.png", { type: "image/png" });
}"""


@pytest.mark.parametrize("method", ["drop", "paste"])
def test_photos_can_be_dropped_and_pasted(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path, method: str
) -> None:
    photo = tmp_path / "photo.png"
    Image.open(sorted(scenes(1).iterdir())[0]).save(photo)
    data = base64.b64encode(photo.read_bytes()).decode()
    opened = browse(permissions=["clipboard-read", "clipboard-write"])
    if method == "drop":
        target = opened.locator("#photo button").first
        transfer = opened.evaluate_handle(
            f"async (data) => {{ const it = new DataTransfer(); it.items.add(await ({_FILE})(data)); return it; }}",
            data,
        )
        target.dispatch_event("drop", {"dataTransfer": transfer})
    else:
        opened.evaluate(
            f"async (data) => navigator.clipboard.write([new ClipboardItem({{'image/png': await ({_FILE})(data)}})])",
            data,
        )
        opened.locator("#photo").get_by_label("clipboard").click()
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, BEAM)]


def test_several_checkpoints_are_shown_in_columns(
    browse: Callable[..., Any], captioner: Captioner, checkpoint: Any, scenes: Any
) -> None:
    other = Captioner.load(checkpoint("lstm", seed=5, name="other"), device="cpu")
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse(captioner, other)
    upload(opened, photo)
    for column, one in enumerate((captioner, other)):
        assert alternatives(opened, column)[0] == one.alternatives(photo, BEAM)[0].text
    opened.get_by_text("run 0").wait_for()
    opened.get_by_text("run 1").wait_for()


def test_concurrent_requests_are_processed_one_at_a_time(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, active, peak = Captioner.alternatives, [0], [0]

    def counted(self: Captioner, *arguments: Any) -> Any:
        active[0] += 1
        peak[0] = max(peak[0], active[0])
        try:
            return real(self, *arguments)
        finally:
            active[0] -= 1

    monkeypatch.setattr(Captioner, "alternatives", counted)
    photos = sorted(scenes(2).iterdir())
    first = browse()
    second = first.context.browser.new_context().new_page()
    second.goto(first.url)
    second.wait_for_selector("#photo")
    for opened, photo in zip((first, second), photos, strict=True):
        upload(opened, photo)
    for opened, photo in zip((first, second), photos, strict=True):
        assert alternatives(opened)[0] == real(captioner, photo, BEAM)[0].text
    assert peak == [1]


def test_captions_can_be_sampled(browse: Callable[..., Any], captioner: Captioner, scenes: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse()
    upload(opened, photo)
    before = alternatives(opened)
    opened.get_by_text("Settings").click()
    opened.get_by_text("Sampling", exact=True).click()
    expected = [c.text for c in captioner.alternatives(photo, BEAM.model_copy(update={"decoding": "sample"}))]
    assert expected != before
    opened.locator("table.alternatives").get_by_text(expected[0]).first.wait_for()
    assert alternatives(opened) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "not an image"),
        (b"", "empty file"),
        ("cut", "truncated"),
        ("huge", "pixels"),
        ("bomb", "too many pixels"),
    ],
)
def test_invalid_file_is_reported_with_the_reason(
    browse: Callable[..., Any], scenes: Any, tmp_path: Path, data: Any, message: str, capfd: Any
) -> None:
    path = tmp_path / "broken.jpg"
    if data == "cut":
        whole = sorted(scenes(1).iterdir())[0].read_bytes()
        data = whole[: len(whole) // 2]
    elif data == "huge":
        Image.fromarray(np.zeros((10_000, 5_001), np.uint8)).save(path)
    elif data == "bomb":  # a few kilobytes that decompress to a billion pixels
        small = io.BytesIO()
        Image.new("L", (8, 8)).save(small, "png")
        header = struct.pack(">II", 40_000, 40_000) + small.getvalue()[24:29]
        checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        path.write_bytes(small.getvalue()[:16] + header + checksum + small.getvalue()[33:])
    if isinstance(data, bytes):
        path.write_bytes(data)
    opened = browse()
    upload(opened, path)
    opened.locator(".toast-body").get_by_text(message).wait_for()
    assert "cannot be captioned" in opened.locator(".toast-body").first.inner_text()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_oversized_file_is_rejected_and_the_next_is_captioned(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path
) -> None:
    from gridcap.caption.web import MAX_BYTES

    (tmp_path / "large.jpg").write_bytes(bytes(MAX_BYTES + 1))
    opened = browse()
    upload(opened, tmp_path / "large.jpg")
    opened.locator(".toast-body").get_by_text("maximum").wait_for()
    photo = sorted(scenes(1).iterdir())[0]
    upload(opened, photo)
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, BEAM)]


def test_oversized_upload_is_aborted_and_deleted(
    served: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The size limit is enforced by the server, not only by the browser."""
    from gridcap.caption.web import MAX_BYTES

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    address = urllib.parse.urlsplit(served())
    head = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    total, sent = 1 << 30, 0
    status = b""
    with socket.create_connection((address.hostname, address.port), timeout=60) as line:
        header = (
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(head) + total}\r\n"
        )
        line.sendall(f"{header}Content-Type: multipart/form-data; boundary=X\r\n\r\n".encode() + head)
        with contextlib.suppress(ConnectionError):
            while sent < total and not select.select([line], [], [], 0)[0]:
                sent += line.send(bytes(1 << 20))
        with contextlib.suppress(ConnectionError):
            status = line.recv(100)
    assert sent < total // 2, "the upload was not aborted"
    assert b" 413 " in status
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= MAX_BYTES


def test_file_names_are_escaped(browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path) -> None:
    photo = tmp_path / "<img src=x onerror=document.title='ran'>.png"
    Image.open(sorted(scenes(1).iterdir())[0]).save(photo)
    opened = browse()
    upload(opened, photo)
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, BEAM)]
    assert opened.title() == "Gridcap"


def test_no_horizontal_scrolling_on_a_phone(browse: Callable[..., Any], scenes: Any) -> None:
    opened = browse(viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True)
    upload(opened, sorted(scenes(1).iterdir())[0])
    alternatives(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 375


def test_gradio_writes_no_stub_files_next_to_the_code() -> None:
    assert not list(Path(__file__).parents[2].joinpath("caption").glob("*.pyi")), (
        "Gradio writes them for subclasses of its components"
    )


# --- the command


def run(*arguments: object, status: int) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def test_listens_on_localhost_by_default(checkpoint: Any) -> None:
    assert "http://127.0.0.1:7860" in run("--checkpoint", checkpoint(), "--dry-run", status=0)
    assert "http://0.0.0.0:80" in run(
        "--checkpoint", checkpoint(), "--dry-run", "--host", "0.0.0.0", "--port", 80, status=0
    )


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        (CaptionConfig(beam_size=15, max_length=60, mbr=True), 0),
        (CaptionConfig(beam_size=1), 0),
        (CaptionConfig(decoding="sample", temperature=0.05), 7),
    ],
    ids=["large values", "greedy", "sampling"],
)
def test_controls_start_with_the_configured_values(captioner: Captioner, settings: CaptionConfig, seed: int) -> None:
    """A slider whose value exceeds its maximum makes every request fail."""
    from gridcap.caption.web import make_page

    page = make_page([captioner], ["run"], settings, seed)
    controls = {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}
    expected = {
        "Decoding": settings.decoding,
        "Beam size, or number of samples": settings.beam_size,
        "Maximum length in tokens": settings.max_length,
        "Sampling temperature": settings.temperature,
        "Sampling seed": seed,
    }
    assert {label: controls[label].preprocess(controls[label].value) for label in expected} == expected


def test_unused_settings_are_usage_errors(fake: Any, checkpoint: Any) -> None:
    for key in ("data.follow_links=true", "extract.num_workers=2", "caption.batch_size=2"):
        assert "does not use" in run("--checkpoint", checkpoint(), "--set", key, "--dry-run", status=2)


def test_address_of_another_machine_is_a_usage_error(checkpoint: Any) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        output = run("--checkpoint", checkpoint(), "--host", host, status=2)
        assert f"--host {host}: " in output
        assert "pass an address of this machine" in output


def test_port_in_use_is_a_usage_error(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: pytest.fail("the checkpoint was loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert "pass another --port" in run("--checkpoint", checkpoint(), "--port", port, status=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_closes_the_page_and_sets_the_exit_status(
    fake: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Gradio's own loop prints a message of its own, and the status would be 0."""
    closed: list[dict[str, Any]] = []

    def start(*_: Any) -> str:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return "http://127.0.0.1:7860"

    monkeypatch.setattr("gridcap.caption.web_cli._check_address", lambda *_: None)
    monkeypatch.setattr("gridcap.caption.web.make_page", lambda *_: SimpleNamespace(close=lambda **o: closed.append(o)))
    monkeypatch.setattr("gridcap.caption.web.serve", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore Ctrl-C
    try:
        output = run("--checkpoint", checkpoint(), "--device", "cpu", status=128 + number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert output.rstrip().endswith("interrupted; rerun the command")
    assert "Keyboard interruption" not in output
    assert closed == [{"verbose": False}]


def test_missing_gradio_names_the_install_command(fake: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridcap.caption.web_cli.importlib.util.find_spec", lambda name: None)
    assert "pip install 'gridcap[web]'" in run("--checkpoint", checkpoint(), status=2)
