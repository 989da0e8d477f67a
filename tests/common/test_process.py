"""Process-wide settings: user settings are kept, and the number of threads is applied once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gridcap.common import process
from gridcap.common.process import apply_threads, spin_briefly, tune_process
from gridcap.common.resources import ThreadChoice


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "30000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_spin_briefly_keeps_the_settings_of_the_user(
    environment: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # registers the variable, so that it is restored after the test
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    variables = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert variables == expected


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    process._Threads.requested, process._Threads.pending = None, False


@pytest.mark.usefixtures("restored_threads")
def test_item_29_the_requested_number_of_threads_is_applied_once(capsys: pytest.CaptureFixture[str]) -> None:
    tune_process(3)
    apply_threads()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    apply_threads()
    assert torch.get_num_threads() == 1, "a later call does nothing"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("restored_threads")
def test_item_29_a_reduced_number_of_threads_is_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ThreadChoice(1, "other processes use 1 of 2 cores")
    monkeypatch.setattr(process, "choose_threads", lambda *_: choice)
    tune_process()
    apply_threads()
    assert torch.get_num_threads() == 1
    expected = "note: using 1 CPU thread, because other processes use 1 of 2 cores (--threads overrides this)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("restored_threads")
def test_item_29_omp_num_threads_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    tune_process()
    apply_threads()
    assert torch.get_num_threads() == 2, "torch has read the variable when it was loaded"
