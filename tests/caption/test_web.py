"""The page in a real browser: upload, caption, alternatives, looks, bad files; and that it asks for nothing outside."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import select
import socket
import struct
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from gridcap.caption.captioner import Captioner
from gridcap.caption.web_cli import main
from gridcap.common.config import CaptionConfig

gradio = pytest.importorskip("gradio") if not os.environ.get("CI") else __import__("gradio")
SEARCH = CaptionConfig(beam_size=3, max_length=9)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def captioner(fake: Any, checkpoint: Any) -> Captioner:
    return Captioner.load(checkpoint(end_bias=2.0), device="cpu")


@pytest.fixture
def served(captioner: Captioner) -> Iterator[Callable[..., str]]:
    """Serve the page for some captioners; its address."""
    from gridcap.caption.web import make_page, serve

    pages = []

    def start(*captioners: Captioner) -> str:
        some = captioners or (captioner,)
        page = make_page(some, [f"run {i}" for i in range(len(some))], SEARCH)
        pages.append(page)
        return serve(page, "127.0.0.1", free_port())

    yield start
    for page in pages:
        page.close()


@pytest.fixture
def browse(browser: Any, served: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Open the page in a browser; what it asks outside, and errors in its scripts, fail the test."""
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
            lambda asked: (
                None if asked.url.startswith((address, "data:", "blob:", "about:")) else problems.append(asked.url)
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


def test_a_photograph_gets_its_caption_the_others_and_the_looks(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any
) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse()
    upload(opened, photo)
    wanted = captioner.alternatives(photo, SEARCH)
    assert len(wanted) > 1
    assert alternatives(opened) == [caption.text for caption in wanted]
    shown = opened.frame_locator("iframe").first
    assert " ".join(shown.locator(".caption").text_content().split()) == wanted[0].text
    shown.locator(".word").first.hover()
    shown.get_by_text("of the look in one cell").wait_for()


_FILE = """async (data) => {
    const blob = await (await fetch("data:image/png;base64," + data)).blob();
    return new File([blob], "photo.png", { type: "image/png" });
}"""


@pytest.mark.parametrize("way", ["dropped", "pasted"])
def test_a_photograph_can_be_dropped_and_pasted(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path, way: str
) -> None:
    photo = tmp_path / "photo.png"
    Image.open(sorted(scenes(1).iterdir())[0]).save(photo)
    data = base64.b64encode(photo.read_bytes()).decode()
    opened = browse(permissions=["clipboard-read", "clipboard-write"])
    if way == "dropped":
        place = opened.locator("#photo button").first
        carried = opened.evaluate_handle(
            f"async (data) => {{ const it = new DataTransfer(); it.items.add(await ({_FILE})(data)); return it; }}",
            data,
        )
        place.dispatch_event("drop", {"dataTransfer": carried})
    else:
        opened.evaluate(
            f"async (data) => navigator.clipboard.write([new ClipboardItem({{'image/png': await ({_FILE})(data)}})])",
            data,
        )
        opened.locator("#photo").get_by_label("clipboard").click()
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, SEARCH)]


def test_several_checkpoints_stand_side_by_side(
    browse: Callable[..., Any], captioner: Captioner, checkpoint: Any, scenes: Any
) -> None:
    other = Captioner.load(checkpoint("lstm", seed=5, name="other"), device="cpu")
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse(captioner, other)
    upload(opened, photo)
    for column, one in enumerate((captioner, other)):
        assert alternatives(opened, column)[0] == one.alternatives(photo, SEARCH)[0].text
    opened.get_by_text("run 0").wait_for()
    opened.get_by_text("run 1").wait_for()


def test_users_at_the_same_time_are_served_one_after_the_other(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, inside, most = Captioner.alternatives, [0], [0]

    def counted(self: Captioner, *arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return real(self, *arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(Captioner, "alternatives", counted)
    photos = sorted(scenes(2).iterdir())
    first = browse()
    second = first.context.browser.new_context().new_page()
    second.goto(first.url)
    second.wait_for_selector("#photo")
    for opened, photo in zip((first, second), photos, strict=True):
        upload(opened, photo)
    for opened, photo in zip((first, second), photos, strict=True):
        assert alternatives(opened)[0] == real(captioner, photo, SEARCH)[0].text
    assert most == [1]


def test_captions_can_be_drawn_by_chance(browse: Callable[..., Any], captioner: Captioner, scenes: Any) -> None:
    photo = sorted(scenes(1).iterdir())[0]
    opened = browse()
    upload(opened, photo)
    before = alternatives(opened)
    opened.get_by_text("Settings").click()
    opened.get_by_text("drawn by chance").click()
    wanted = [c.text for c in captioner.alternatives(photo, SEARCH.model_copy(update={"decoding": "sample"}))]
    assert wanted != before
    opened.locator("table.alternatives").get_by_text(wanted[0]).first.wait_for()
    assert alternatives(opened) == wanted


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"not an image", "not an image"),
        (b"", "empty file"),
        ("cut", "truncated"),
        ("huge", "pixels"),
        ("bomb", "too many pixels"),
    ],
)
def test_a_bad_file_gets_a_sentence(
    browse: Callable[..., Any], scenes: Any, tmp_path: Path, data: Any, said: str, capfd: Any
) -> None:
    path = tmp_path / "bad.jpg"
    if data == "cut":
        whole = sorted(scenes(1).iterdir())[0].read_bytes()
        data = whole[: len(whole) // 2]
    elif data == "huge":
        Image.fromarray(np.zeros((10_000, 5_001), np.uint8)).save(path)
    elif data == "bomb":  # a file of a few kilobytes that unpacks to a billion pixels
        small = io.BytesIO()
        Image.new("L", (8, 8)).save(small, "png")
        header = struct.pack(">II", 40_000, 40_000) + small.getvalue()[24:29]
        checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        path.write_bytes(small.getvalue()[:16] + header + checksum + small.getvalue()[33:])
    if isinstance(data, bytes):
        path.write_bytes(data)
    opened = browse()
    upload(opened, path)
    opened.locator(".toast-body").get_by_text(said).wait_for()
    assert "cannot be captioned" in opened.locator(".toast-body").first.inner_text()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_file_that_is_too_large_gets_a_sentence_and_the_next_is_captioned(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path
) -> None:
    from gridcap.caption.web import MOST_BYTES

    (tmp_path / "large.jpg").write_bytes(bytes(MOST_BYTES + 1))
    opened = browse()
    upload(opened, tmp_path / "large.jpg")
    opened.locator(".toast-body").get_by_text("maximum").wait_for()
    photo = sorted(scenes(1).iterdir())[0]
    upload(opened, photo)
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, SEARCH)]


def test_an_upload_of_a_gigabyte_is_cut_off_and_not_kept(
    served: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever writes requests by hand meets the same limit as the browser."""
    from gridcap.caption.web import MOST_BYTES

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    address = urllib.parse.urlsplit(served())
    head = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    whole, sent = 1 << 30, 0
    status = b""
    with socket.create_connection((address.hostname, address.port), timeout=60) as line:
        asked = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(head) + whole}\r\n"
        line.sendall(f"{asked}Content-Type: multipart/form-data; boundary=X\r\n\r\n".encode() + head)
        with contextlib.suppress(ConnectionError):
            while sent < whole and not select.select([line], [], [], 0)[0]:
                sent += line.send(bytes(1 << 20))
        with contextlib.suppress(ConnectionError):
            status = line.recv(100)
    assert sent < whole // 2, "and no more was taken"
    assert b" 413 " in status
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= MOST_BYTES


def test_a_file_name_that_is_html_is_no_html_on_the_page(
    browse: Callable[..., Any], captioner: Captioner, scenes: Any, tmp_path: Path
) -> None:
    photo = tmp_path / "<img src=x onerror=document.title='ran'>.png"
    Image.open(sorted(scenes(1).iterdir())[0]).save(photo)
    opened = browse()
    upload(opened, photo)
    assert alternatives(opened) == [caption.text for caption in captioner.alternatives(photo, SEARCH)]
    assert opened.title() == "Gridcap"


def test_a_phone_needs_no_sideways_scrolling(browse: Callable[..., Any], scenes: Any) -> None:
    opened = browse(viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True)
    upload(opened, sorted(scenes(1).iterdir())[0])
    alternatives(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 375


def test_nothing_is_written_beside_the_code() -> None:
    assert not list(Path(__file__).parents[2].joinpath("caption").glob("*.pyi")), "as Gradio does for subclasses"


# --- the command


def run(*arguments: object, status: int) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.output


def test_it_listens_on_this_machine_alone_unless_told_otherwise(checkpoint: Any) -> None:
    assert "http://127.0.0.1:7860" in run("--checkpoint", checkpoint(), "--dry-run", status=0)
    assert "http://0.0.0.0:80" in run(
        "--checkpoint", checkpoint(), "--dry-run", "--host", "0.0.0.0", "--port", 80, status=0
    )


def test_a_taken_port_is_a_users_error(fake: Any, checkpoint: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "choose another --port" in run("--checkpoint", checkpoint(), "--port", port, status=2)


def test_without_gradio_it_says_what_to_install(fake: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gridcap.caption.web_cli.importlib.util.find_spec", lambda name: None)
    assert "pip install 'gridcap[web]'" in run("--checkpoint", checkpoint(), status=2)
