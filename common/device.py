"""Which device and which arithmetic "auto" means here. Loads torch only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    import torch


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


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
