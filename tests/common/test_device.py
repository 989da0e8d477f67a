"""Choice of device, precision, and compilation."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from gridcap.common.device import choose_compile, choose_device, choose_precision
from gridcap.common.errors import OutOfMemoryError, UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_cpu_is_always_available() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_device_prefers_the_gpu(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_device("auto").type == ("cuda" if has_gpu else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "0", ""])
def test_an_unavailable_device_is_an_error_with_its_name(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: ") as caught:
        choose_device(name)
    assert "auto" in caught.value.hint
    assert "\n" not in caught.value.message


def test_item_28_an_unknown_device_lists_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        choose_device("foo")
    assert caught.value.message == "--device foo: no such device"
    assert caught.value.hint.endswith("available on this machine: cpu, cuda:0, cuda:1")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta"])
def test_item_28_a_device_type_that_is_not_supported_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: .* devices are not supported") as caught:
        choose_device(name)
    assert caught.value.hint.startswith("supported: auto, cpu, cuda, cuda:N; available on this machine: cpu")


def test_item_16_a_full_gpu_is_not_a_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(OutOfMemoryError, match="out of GPU memory"):
        choose_device("cpu")


def test_named_precisions_are_not_changed() -> None:
    assert choose_precision("float32", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float16", torch.device("cuda")) == torch.float16


def test_float16_on_the_cpu_is_an_error() -> None:
    """The configuration cannot check this for device "auto"."""
    with pytest.raises(UserError, match="float16"):
        choose_precision("float16", CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_bfloat16_only_with_hardware_support(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    wanted = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr("gridcap.common.device._cpu_has_bfloat16", lambda: fast)
    assert choose_precision("auto", CPU) == wanted
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert choose_precision("auto", torch.device("cuda")) == wanted


def test_auto_precision_for_the_cpu_does_not_need_a_gpu() -> None:
    assert choose_precision("auto", CPU) in (torch.bfloat16, torch.float32)


# --------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Return the tools that torch.compile finds on a simulated machine. Remove one from the set to uninstall it."""
    installed = {"g++", "clang++", "cc", "gcc", "triton", "Python.h"}
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "Python.h").touch()

    def headers() -> dict[str, str]:
        return {"include": str(tmp_path / ("with" if "Python.h" in installed else "without"))}

    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in installed else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(sysconfig, "get_paths", headers)
    return installed


@pytest.mark.usefixtures("tools")
def test_auto_compiles_large_jobs_on_the_cpu() -> None:
    assert not choose_compile("auto", 19_999, CPU)
    assert choose_compile("auto", 20_000, CPU)
    assert not choose_compile("auto", 100_000_000, GPU)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("images", [0, 1, 100_000_000])
def test_compile_on_and_off_do_not_depend_on_the_job(device: torch.device, images: int) -> None:
    assert choose_compile("on", images, device)
    assert not choose_compile("off", images, device)


@pytest.mark.parametrize(
    ("device", "missing", "message"),
    [
        (CPU, {"g++", "clang++"}, r"the compiler (g|clang)\+\+"),
        (CPU, {"Python.h"}, "Python's header files"),
        (GPU, {"triton"}, "triton"),
        (GPU, {"cc", "gcc"}, "the compiler cc"),
    ],
)
def test_without_a_compiler_on_is_an_error_and_auto_does_not_compile(
    tools: set[str], device: torch.device, missing: set[str], message: str
) -> None:
    tools -= missing
    with pytest.raises(UserError, match=f"--compile on: torch.compile requires {message}") as caught:
        choose_compile("on", 1, device)
    assert "\n" not in caught.value.message + caught.value.hint
    assert not choose_compile("auto", 100_000_000, device)
    assert not choose_compile("off", 1, device)


def test_the_compiler_in_the_environment_variable_is_used(tools: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(UserError, match="the compiler icpx"):
        choose_compile("on", 1, CPU)
    tools.add("icpx")
    assert choose_compile("on", 1, CPU)
