"""Which device and which arithmetic "auto" means here. Loads torch only when called."""

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

from gridcap.common.errors import UserError

if TYPE_CHECKING:
    import torch


# Device type -> images from which compiling pays. On a CPU (AVX-512 without bfloat16, InceptionV3, float32, batches
# of 32) compiling took 27 to 58 s and saved 7 to 9 % of some 55 ms an image, which is even after 5 000 to 16 000
# images; and workers that share a job each compile. On a GPU "auto" is "off": an H100 makes 6 800 images a second as
# it is, and files are neither read nor grids written as quickly.
_WORTH_COMPILING = {"cpu": 20_000}


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}", "use auto, cpu, or cuda") from error
    return device


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_batch_size(setting: int | None, on_gpu: bool) -> int:
    """How many images are encoded together: nvJPEG's decoders and a GPU want many, a CPU's cache has room for few."""
    return setting or (256 if on_gpu else 32)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of that name; "auto" is bfloat16 where the hardware computes in it, else float32.

    Raises:
        UserError: float16 on a CPU, which would be slower and less exact than float32.
    """
    import torch

    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if name == "float16" and device.type != "cuda":
        raise UserError("--precision float16: needs a GPU", "use auto, float32 or bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_compile(setting: str, images: int, device: torch.device) -> bool:
    """Whether an encoder is to be compiled. "auto": if the job is long enough to pay for it, and it can be done.

    Compiled code may round differently, so this asks about the whole plan and not about what is left of it: every
    rerun and every worker must decide alike.

    Args:
        setting: auto, on or off.
        images: in the whole plan.
        device: to encode on.

    Raises:
        UserError: "on", and a compiler that torch.compile needs is not here.
    """
    if setting == "off" or (setting == "auto" and images < _WORTH_COMPILING.get(device.type, math.inf)):
        return False
    missing = _missing_for_compile(device)
    if missing and setting == "on":
        raise UserError(
            f"--compile on: torch.compile needs {missing}, and it is not here", "install it, or use --compile auto"
        )
    return not missing


def _missing_for_compile(device: torch.device) -> str | None:
    """The first thing torch.compile would ask for in vain: inductor writes C++ for a CPU, triton a launcher in C."""
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
    """Whether torch computes by oneDNN on this CPU in `precision`, and has these operators, which it keeps for its
    compiler; for bfloat16 they want a CPU that computes in it."""
    import torch

    return bool(
        precision in (torch.float32, choose_precision("auto", torch.device("cpu")))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.enabled
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )


@functools.cache
def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
