"""How long threads that wait for work keep a core busy: torch's OpenMP, told once per command."""

from __future__ import annotations

import os

_SPINS = "30000"


def spin_briefly() -> None:
    """Have GNU's OpenMP give a core away a tenth of a millisecond after a thread has nothing to do, and not ten times
    as late; every command calls this before it loads torch, which reads it then.

    On as many cores as torch has threads, the one that reads the next batch finds none free: a trainer waited twice
    as long for its batches, and computed no faster (two cores, InceptionV3's grids into an LSTM). With no spinning at
    all (OMP_WAIT_POLICY=passive) its steps take a third longer. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
