"""Keep large buffers in the process: glibc's allocator, tuned once per command.

Untuned, glibc gives every large buffer back to the kernel and faults it in again for the next batch, which
halves the rate of convolutions and of JPEG decoding on the CPU. Every command calls `keep_large_buffers`
before it loads torch. Elsewhere than glibc (macOS, musl) it does nothing.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_large_buffers() -> bool:
    """Tell malloc to serve large blocks from the heap and to keep what is freed.

    Returns whether the allocator took the settings.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))
