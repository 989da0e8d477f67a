"""Signals end a training command with a checkpoint of the current step."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gridcap.train.engine.checkpoint import find_checkpoint, load_checkpoint

COMMAND = (sys.executable, "-c", "from gridcap.train.cli import train_decoder; train_decoder()")
ARGUMENTS = ("--epochs", "100000", "--output", "runs/s", "--checkpoint-minutes", "1000", "--batch-size", "2")
NO_VALIDATION = ("--set", "data.features_dir=elsewhere", "--features", "features/train.h5")
TIMEOUT = 300  # seconds


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored():
    """Restore the default of SIGHUP, which nohup ignores: child processes inherit it."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def environment(**variables):
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))}
    return cleared | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])} | variables


def wait_for_steps(run, is_alive):
    """Wait until the run has logged steps of its second epoch."""
    log = run / "steps.jsonl"
    while not (log.exists() and '"epoch": 2' in log.read_text()):
        assert is_alive(), "the command ended early"
        time.sleep(0.05)


def assert_checkpoint_is_usable(run):
    last = find_checkpoint(run, "last")
    assert load_checkpoint(run, "last").path == last
    assert not list((run / "checkpoints").glob(".*")), "no temporary files"
    assert not (run / ".lease.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_item_31_signal_ends_the_command_with_a_checkpoint_and_a_one_line_message(project, number):
    with open(project / "log.txt", "wb") as output:
        process = subprocess.Popen(
            [*COMMAND, *ARGUMENTS, *NO_VALIDATION], stdout=output, stderr=output, env=environment()
        )
    wait_for_steps(project / "runs/s", lambda: process.poll() is None)
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 128 + number
    text = (project / "log.txt").read_text()
    assert "interrupted; rerun the command with --resume to continue" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert_checkpoint_is_usable(project / "runs/s")


def test_item_31_closed_terminal_ends_the_command_with_a_checkpoint(project):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, *ARGUMENTS, *NO_VALIDATION], environment())
    os.set_blocking(terminal, False)

    def is_alive():
        with contextlib.suppress(OSError):
            os.read(terminal, 1 << 16)  # a full terminal buffer would block the command
        return os.waitpid(pid, os.WNOHANG) == (0, 0)

    wait_for_steps(project / "runs/s", is_alive)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert_checkpoint_is_usable(project / "runs/s")


def start_rank(rank, port, project):
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(project / f"log-{rank}.txt", "wb") as output:
        return subprocess.Popen(
            [*COMMAND, *ARGUMENTS, *NO_VALIDATION], stdout=output, stderr=output, env=environment(**variables)
        )


def test_item_10_signal_to_one_rank_stops_all_ranks_with_a_checkpoint(project):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [start_rank(rank, port, project) for rank in (0, 1)]
    try:
        wait_for_steps(project / "runs/s", lambda: all(rank.poll() is None for rank in ranks))
        ranks[1].send_signal(signal.SIGTERM)
        statuses = [rank.wait(TIMEOUT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert statuses == [128 + signal.SIGINT, 128 + signal.SIGTERM]
    assert_checkpoint_is_usable(project / "runs/s")


BROADCAST = """
import sys
import torch
import torch.distributed as dist
from gridcap.train.engine.distributed import Ranks
ranks = Ranks(int(sys.argv[1]), 2)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=ranks.rank, world_size=2)
tensors = [torch.full((3,), float(ranks.rank)), torch.tensor(ranks.rank), torch.tensor([ranks.rank == 0])]
ranks.broadcast(tensors)
print([tensor.tolist() for tensor in tensors], [ranks.any(False), ranks.any(ranks.rank == 1)])
dist.destroy_process_group()
"""


def test_item_10_ranks_start_from_the_weights_of_rank_0(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BROADCAST, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
    assert outputs == ["[[0.0, 0.0, 0.0], 0, [True]] [False, True]\n"] * 2
