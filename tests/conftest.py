"""Fixtures shared by the tests of several packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torture.forge import sign_checkpoint

# Results must not depend on the load of the machine, which determines the default number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads this when it is imported: its kernels are tested on the CPU.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_NODE = Path(__file__).parent / "slurm_one_node.sh"
_SLURM_TIMEOUT = 300  # seconds to start or to stop Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a one-node Slurm and point this process to it while the tests of a module run."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        why = f"needs root and `apt-get install slurm-wlm munge`; missing: {missing or 'root'}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            subprocess.run([_NODE, "start", folder], check=True, timeout=_SLURM_TIMEOUT)
            yield
        finally:
            subprocess.run([_NODE, "stop", folder], timeout=_SLURM_TIMEOUT)


@pytest.fixture
def sign() -> Callable[[Path], None]:
    """Return a function that recomputes a checkpoint's checksums after its files were edited."""
    return sign_checkpoint


_BROWSER = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a headless Chromium, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs a browser: `apt-get install chromium`")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=_BROWSER)
        yield launched
        launched.close()
