"""Exceptions of the library."""

from __future__ import annotations

import errno
import importlib
import inspect
import pickle
import pkgutil
import ssl
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

import gridcap
from gridcap.common.errors import (
    AnnotationError,
    CheckpointError,
    ConfigError,
    DownloadError,
    ExtractionError,
    GridcapError,
    MismatchError,
    OutOfMemoryError,
    StoreError,
    TrainingError,
    UserError,
    WeightsError,
    from_os_error,
)


def library_exceptions() -> Iterator[type[BaseException]]:
    """Yield every exception class that a module of gridcap defines."""
    for module in pkgutil.walk_packages(gridcap.__path__, "gridcap."):
        try:
            contents = vars(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if error.name != "gradio":  # optional
                raise
            continue
        for value in contents.values():
            if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == module.name:
                yield value


def make(error_class: type[BaseException]) -> BaseException:
    """Return an exception of a class, with texts for the parameters of its constructor."""
    if error_class.__init__ in (Exception.__init__, ValueError.__init__, KeyboardInterrupt.__init__):
        return error_class("text")
    parameters = list(inspect.signature(error_class.__init__).parameters.values())[1:]
    return error_class(*(f"text of {p.name}" for p in parameters if p.default is p.empty))


@pytest.mark.parametrize("error_class", sorted(set(library_exceptions()), key=str), ids=lambda c: c.__qualname__)
def test_item_27_every_exception_survives_pickling(error_class: type[BaseException]) -> None:
    error = make(error_class)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


def fail() -> None:
    raise StoreError("features/train.h5: truncated", "extract it again")


def test_item_27_an_error_in_a_process_pool_arrives_with_message_and_hint() -> None:
    with ProcessPoolExecutor(1) as pool, pytest.raises(StoreError) as caught:
        pool.submit(fail).result()
    assert (caught.value.message, caught.value.hint) == ("features/train.h5: truncated", "extract it again")


@pytest.mark.parametrize("error_class", [UserError, ConfigError])
def test_item_13_usage_errors_exit_with_2(error_class: type[GridcapError]) -> None:
    assert error_class.exit_status == 2


@pytest.mark.parametrize(
    "error_class",
    [
        GridcapError,
        AnnotationError,
        CheckpointError,
        DownloadError,
        ExtractionError,
        MismatchError,
        OutOfMemoryError,
        StoreError,
        TrainingError,
        WeightsError,
    ],
)
def test_item_13_other_errors_exit_with_1(error_class: type[GridcapError]) -> None:
    """A retry can succeed after a race or a failed download. Kubernetes does not retry after status 2."""
    assert error_class.exit_status == 1


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_item_23_network_errors_do_not_suggest_permissions(error: OSError) -> None:
    """The number of an SSLError is that of OpenSSL: 1 does not mean that an operation is not permitted."""
    explained = from_os_error(error)
    assert "network" in explained.hint
    assert "permission" not in explained.hint
