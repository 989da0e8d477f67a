"""Choice of device, precision, and compilation: what "auto" means on this machine. Loads torch only when called."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from gridcap.common.errors import UserError, explain_out_of_memory, first_line
from gridcap.common.process import apply_threads

if TYPE_CHECKING:
    import torch


# Device type -> number of images from which compilation pays off. On a CPU (AVX-512 without bfloat16, InceptionV3,
# float32, batches of 32), compiling took 27 to 58 s and saved 7% to 9% of about 55 ms per image. This breaks even after
# 5,000 to 16,000 images, and each process that shares a job compiles. On a GPU, "auto" means "off": an H100 encodes
# 6,800 images/s without compilation, faster than images can be read or grids written.
_MIN_IMAGES_TO_COMPILE = {"cpu": 20_000}


SUPPORTED_DEVICES = ("cpu", "cuda")  # what the training step and the feature reader are written for


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first CUDA GPU if there is one, else the CPU.

    In a command, the first call also sets the number of CPU threads (see `gridcap.common.process`).

    Raises:
        UserError: the device does not exist on this machine, or its type is not supported.
    """
    import torch

    apply_threads()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device", _device_hint()) from error
    if device.type not in SUPPORTED_DEVICES:
        raise UserError(f"--device {name}: {device.type} devices are not supported", _device_hint())
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        if (out_of_memory := explain_out_of_memory(error)) is not None:
            raise out_of_memory from error
        raise UserError(f"--device {name}: {first_line(error)}", _device_hint()) from error
    return device


def _device_hint() -> str:
    import torch

    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return f"supported: auto, cpu, cuda, cuda:N; available on this machine: {', '.join(available)}"


def choose_batch_size(setting: int | None, on_gpu: bool) -> int:
    """Return the number of images per batch: large for a GPU and nvJPEG, small for the cache of a CPU."""
    return setting or (256 if on_gpu else 32)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a precision; "auto" is bfloat16 if the hardware supports it natively, else float32.

    Raises:
        UserError: float16 on a CPU, which would be slower and less accurate than float32.
    """
    import torch

    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if name == "float16" and device.type != "cuda":
        raise UserError("--precision float16: requires a GPU", "use auto, float32, or bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_compile(setting: str, images: int, device: torch.device) -> bool:
    """Return whether to compile the encoder; "auto": if the job is large enough and compilation is possible.

    Compiled code may round differently, so the decision depends on the size of the whole plan, not on the remaining
    part: every rerun and every process must make the same choice.

    Args:
        setting: auto, on, or off.
        images: number of images in the whole plan.
        device: device of the encoder.

    Raises:
        UserError: the setting is "on" and a compiler that torch.compile needs is missing.
    """
    if setting == "off" or (setting == "auto" and images < _MIN_IMAGES_TO_COMPILE.get(device.type, math.inf)):
        return False
    missing = _missing_for_compile(device)
    if missing and setting == "on":
        raise UserError(
            f"--compile on: torch.compile requires {missing}, which is missing", "install it, or use --compile auto"
        )
    return not missing


def _missing_for_compile(device: torch.device) -> str | None:
    """Return the first missing requirement of torch.compile: Inductor compiles C++ on a CPU, Triton a C launcher."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(map(shutil.which, compilers)):
        return f"the compiler {compilers[0]}"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's header files (Debian, Ubuntu: python3-dev)"
    return None


def has_onednn(precision: torch.dtype, *operators: str) -> bool:
    """Return whether oneDNN supports a precision on this CPU, and whether torch has these oneDNN operators.

    The operators are internal to torch's compiler. In bfloat16, they need a CPU with native support.
    """
    import torch

    return bool(
        precision in (torch.float32, choose_precision("auto", torch.device("cpu")))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.enabled
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )


@functools.cache
def _cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16 natively; emulation is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
