"""What "auto" means here, and devices that are not here."""

from __future__ import annotations

import pytest
import torch

from common.device import choose_device, choose_precision
from common.errors import UserError

CPU = torch.device("cpu")


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
    assert "\n" not in caught.value.what


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
    monkeypatch.setattr("common.device._cpu_has_bfloat16", lambda: fast)
    assert choose_precision("auto", CPU) == wanted
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert choose_precision("auto", torch.device("cuda")) == wanted


def test_auto_precision_needs_no_gpu_to_answer_for_a_cpu() -> None:
    assert choose_precision("auto", CPU) in (torch.bfloat16, torch.float32)
