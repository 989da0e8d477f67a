"""The soft limit of open files is raised, never lowered."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from gridcap.common.open_files import initial_open_file_limit, open_file_limit, raise_open_file_limit
print(raise_open_file_limit(), open_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
assert initial_open_file_limit() == int(sys.argv[1])
"""


@pytest.mark.parametrize(("soft", "hard", "want"), [(64, 64, 64), (64, 500, 500), (64, 10_000, 8192)])
def test_item_06_soft_limit_is_raised_up_to_the_hard_limit(soft: int, hard: int, want: int) -> None:
    command = [sys.executable, "-c", CODE, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(want), str(want), str(want), str(hard)]
