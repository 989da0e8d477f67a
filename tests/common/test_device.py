"""What "auto" means here, and devices that are not here."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from gridcap.common.device import choose_compile, choose_device, choose_precision
from gridcap.common.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_cpu_is_everywhere() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto").type == ("cuda" if there else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "0", ""])
def test_a_device_that_is_not_here_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: ") as caught:
        choose_device(name)
    assert "auto" in caught.value.hint
    assert "\n" not in caught.value.message


def test_named_precisions_are_taken_at_their_word() -> None:
    assert choose_precision("float32", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float16", torch.device("cuda")) == torch.float16


def test_float16_on_a_cpu_is_refused() -> None:
    """As in the configuration, for a device that only "auto" chose."""
    with pytest.raises(UserError, match="float16"):
        choose_precision("float16", CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_bfloat16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    wanted = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr("gridcap.common.device._cpu_has_bfloat16", lambda: fast)
    assert choose_precision("auto", CPU) == wanted
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert choose_precision("auto", torch.device("cuda")) == wanted


def test_auto_precision_needs_no_gpu_to_answer_for_a_cpu() -> None:
    assert choose_precision("auto", CPU) in (torch.bfloat16, torch.float32)


# --------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """What torch.compile finds here; take something out of the set to take it from the machine."""
    there = {"g++", "clang++", "cc", "gcc", "triton", "Python.h"}
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "Python.h").touch()

    def headers() -> dict[str, str]:
        return {"include": str(tmp_path / ("with" if "Python.h" in there else "without"))}

    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(sysconfig, "get_paths", headers)
    return there


@pytest.mark.usefixtures("tools")
def test_auto_compiles_long_jobs_on_a_cpu() -> None:
    assert not choose_compile("auto", 19_999, CPU)
    assert choose_compile("auto", 20_000, CPU)
    assert not choose_compile("auto", 100_000_000, GPU), "until somebody has measured it there"


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("images", [0, 1, 100_000_000])
def test_on_and_off_are_taken_at_their_word(device: torch.device, images: int) -> None:
    assert choose_compile("on", images, device)
    assert not choose_compile("off", images, device)


@pytest.mark.parametrize(
    ("device", "lacking", "named"),
    [
        (CPU, {"g++", "clang++"}, r"the compiler (g|clang)\+\+"),
        (CPU, {"Python.h"}, "Python's header files"),
        (GPU, {"triton"}, "triton"),
        (GPU, {"cc", "gcc"}, "the compiler cc"),
    ],
)
def test_without_a_compiler_on_is_refused_and_auto_goes_without(
    tools: set[str], device: torch.device, lacking: set[str], named: str
) -> None:
    tools -= lacking
    with pytest.raises(UserError, match=f"--compile on: torch.compile needs {named}") as caught:
        choose_compile("on", 1, device)
    assert "\n" not in caught.value.message + caught.value.hint
    assert not choose_compile("auto", 100_000_000, device)
    assert not choose_compile("off", 1, device)


def test_the_compiler_named_by_the_environment_is_the_one_that_counts(
    tools: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(UserError, match="the compiler icpx"):
        choose_compile("on", 1, CPU)
    tools.add("icpx")
    assert choose_compile("on", 1, CPU)
