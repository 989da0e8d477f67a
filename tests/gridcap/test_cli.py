"""gridcap: the list of the commands, and completion as its help gives it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gridcap.cli import main

COMMANDS = [
    "download-coco",
    "extract-features",
    "import-features",
    "inspect-features",
    "verify-features",
    "train-decoder",
    "evaluate-decoder",
    "caption-images",
    "caption-web",
]


def run(*arguments):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_has_a_line_in_the_order_of_use():
    lines = run().partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert all(line.endswith(".") and len(line) <= 110 for line in lines)
    assert run("--names").split() == COMMANDS


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_completion_of_the_help_completes_flags():
    (code,) = re.findall(r"  for c in .*?done", run("--help"), re.S)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    completing = f"""{code}
COMP_WORDS=(train-decoder --learning) COMP_CWORD=1
_train_decoder_completion train-decoder
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", completing], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["--learning-rate"], done.stderr
