"""Encoder weights: identity, download, and rejection of unusable files."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gridcap.extract.encoders.weights as weights_module
from gridcap.common.errors import WeightsError
from gridcap.extract.encoders.specs import CNNS
from gridcap.extract.encoders.weights import identify_weights
from tests.extract.encoders.conftest import load


def test_identity_of_random_weights_depends_on_encoder_and_seed() -> None:
    plain = identify_weights("inception_v3", "random")
    assert plain == identify_weights("inception_v3", "random:0")
    assert plain.name == "random:0"
    assert plain.random
    assert plain.as_dict()["random"] is True
    others = [identify_weights("inception_v3", "random:1"), identify_weights("resnet50", "random")]
    assert len({plain.sha256, *(o.sha256 for o in others)}) == 3


def weights_error(name: str, file: Path) -> WeightsError:
    """Return the error of loading a file; it must name the file."""
    with pytest.raises(WeightsError) as caught:
        load(name, file)
    assert str(file) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_pickled_model_raises(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "model.pth")
    error = weights_error("resnet50", tmp_path / "model.pth")
    assert "state dict" in error.hint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_raises_and_is_not_executed(tmp_path: Path, save: Callable[..., object]) -> None:
    trace = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {trace}",)

    file = tmp_path / "weights.pth"
    for value in (Malicious(), {"conv1.weight": Malicious()}, {"state_dict": {"conv1.weight": Malicious()}}):
        save(value, file)
        weights_error("resnet50", file)
        assert not trace.exists()


def test_the_error_does_not_suggest_disabling_weights_only(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "model.pth")
    error = weights_error("resnet50", tmp_path / "model.pth")
    assert "weights_only" not in f"{error.message} {error.hint}"
    assert "\x1b" not in error.message, "torch's message contains terminal colors"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b""),
        ("w.pth", b"\x80\x02not a pickle"),
        ("w.pth", b"<html>404</html>"),
        ("w.pth", b"hi\n"),
        ("w.safetensors", b""),
        ("w.safetensors", b"\xff" * 64),
    ],
)
def test_a_corrupted_file_raises(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "state dict" in weights_error("resnet50", tmp_path / name).hint


def test_a_text_file_is_not_a_state_dict(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("hi\n")  # the unpickler raises KeyError(105)
    assert weights_error("resnet50", tmp_path / "w.pt").message.endswith("w.pt: not a state dict of tensors")


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {}, torch.zeros(3)])
def test_a_file_without_a_state_dict_raises(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pth")
    weights_error("resnet50", tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "no.pth"))):
        identify_weights("inception_v3", str(tmp_path / "no.pth"))


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (identify_weights("resnet50", str(tmp_path / f"{x}.pth")) for x in "abc")
    assert a.sha256 == b.sha256 == hashlib.sha256(b"one").hexdigest()
    assert c.sha256 != a.sha256
    assert (a.name, a.random, a.file) == ("a.pth", False, tmp_path / "a.pth")


CONTENT = b"weights"
CONTENT_NAME = f"inception_v3_google-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty torch cache; return the path of the weights in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / CONTENT_NAME


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Wait times before retries, recorded instead of slept."""
    recorded: list[float] = []
    monkeypatch.setattr("gridcap.common.download.time.sleep", recorded.append)
    return recorded


@pytest.fixture
def served_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Serve inception_v3's ImageNet weights from another address."""

    def point(base: str) -> None:
        monkeypatch.setattr(weights_module, "imagenet_url", lambda encoder: f"{base}/{CONTENT_NAME}")

    return point


def test_imagenet_weights_are_downloaded_once(tmp_path: Path, cache: Path, served_from: Callable[[str], None]) -> None:
    server = tmp_path / "server"
    server.mkdir()
    (server / CONTENT_NAME).write_bytes(CONTENT)
    served_from(server.as_uri())
    first = identify_weights("inception_v3", "imagenet")
    assert first.file == cache
    assert cache.read_bytes() == CONTENT
    assert first.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert not first.random
    assert "IMAGENET1K_V1" in first.name

    (server / CONTENT_NAME).unlink()
    assert identify_weights("inception_v3", "imagenet") == first


def test_a_dry_run_downloads_nothing(tmp_path: Path, cache: Path, served_from: Callable[[str], None]) -> None:
    (tmp_path / CONTENT_NAME).write_bytes(CONTENT)
    served_from(tmp_path.as_uri())
    identity = identify_weights("inception_v3", "imagenet", download=False)
    assert not cache.exists()
    assert not identity.random


def download_error(cache: Path) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        identify_weights("inception_v3", "imagenet")
    assert str(cache) in caught.value.message
    assert "--weights" in caught.value.hint
    return caught.value


def test_a_download_with_a_wrong_checksum_is_not_kept(
    tmp_path: Path, cache: Path, served_from: Callable[[str], None]
) -> None:
    (tmp_path / CONTENT_NAME).write_bytes(CONTENT[:-1])
    served_from(tmp_path.as_uri())
    assert "download failed" in download_error(cache).message
    assert list(cache.parent.iterdir()) == []


def test_a_corrupted_file_in_the_cache_is_named(
    tmp_path: Path, cache: Path, served_from: Callable[[str], None]
) -> None:
    (tmp_path / CONTENT_NAME).write_bytes(CONTENT)
    served_from(tmp_path.as_uri())
    cache.parent.mkdir(parents=True)
    cache.write_bytes(CONTENT[:3])
    error = download_error(cache)
    assert "corrupted" in error.message
    assert "delete" in error.hint


@pytest.fixture
def broken_server() -> Iterator[Callable[[list[bytes]], str]]:
    """Start local servers that answer requests with the given bytes, the last ones repeatedly, and close."""
    sockets: list[socket.socket] = []

    def serve(answers: list[bytes]) -> str:
        remaining = list(answers)
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def loop() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(remaining.pop(0) if len(remaining) > 1 else remaining[0])

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.0 503 Service Unavailable\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\nweig",
        b"what is this\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nweig",
    ],
    ids=["closed", "unavailable", "truncated", "not HTTP", "truncated chunk"],
)
def test_a_failed_download_leaves_no_file(
    cache: Path, served_from: Callable[[str], None], broken_server: Callable[[list[bytes]], str], answer: bytes
) -> None:
    served_from(broken_server([answer]))
    assert "download failed" in download_error(cache).message
    assert list(cache.parent.iterdir()) == []


def test_item_23_a_download_is_repeated_after_a_network_error(
    cache: Path,
    served_from: Callable[[str], None],
    broken_server: Callable[[list[bytes]], str],
    waits: list[float],
) -> None:
    good = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(CONTENT), CONTENT)
    served_from(broken_server([b"HTTP/1.0 503 Service Unavailable\r\n\r\n", b"", good]))
    assert identify_weights("inception_v3", "imagenet").file == cache
    assert cache.read_bytes() == CONTENT
    assert waits == [2, 4]


@pytest.mark.parametrize("status", [b"404 Not Found", b"403 Forbidden"])
def test_item_23_a_permanent_error_is_not_repeated(
    cache: Path,
    served_from: Callable[[str], None],
    broken_server: Callable[[list[bytes]], str],
    waits: list[float],
    status: bytes,
) -> None:
    served_from(broken_server([b"HTTP/1.0 " + status + b"\r\n\r\n"]))
    assert status.decode().partition(" ")[2] in download_error(cache).message
    assert waits == []


def test_without_a_network_the_error_explains_the_manual_download(
    cache: Path, served_from: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served_from("https://download.pytorch.org/models")
    error = download_error(cache)
    assert "Temporary failure in name resolution" in error.message
    assert f"https://download.pytorch.org/models/{CONTENT_NAME}" in error.hint


@pytest.mark.parametrize("name", list(CNNS))
def test_imagenet_file_names_contain_a_checksum(name: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{8}", weights_module.hash_in(weights_module.imagenet_url(name).rpartition("/")[2]))
