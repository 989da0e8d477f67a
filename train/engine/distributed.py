"""Several processes that train one decoder: torchrun, or the tasks of a Slurm step.

Each process computes the gradients of its share of every step's images; they are added up, and all processes take
the same step. Torch's DistributedDataParallel is not needed for that: a decoder is small, its gradients are one
tensor to add up, and the sum of the losses divided by the number of words everywhere is exactly the loss of one
process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gridcap.common.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: its number on its machine: the GPU it uses.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one exchange a number type."""
        if self.world == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, total in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                tensor.copy_(total.reshape(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value, for all."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place, as torchrun or Slurm (srun) says it; alone without either.

    Raises:
        UserError: torchrun's or Slurm's variables contradict themselves.
    """
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and environment.get(world, "1") != "1":
            values = [environment[rank], environment[world], environment.get(local, "0")]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                raise UserError(
                    f"{rank}={values[0]}, {world}={values[1]}, {local}={values[2]} do not say which process this is",
                    "mend the job script, or unset them to train in one process",
                )
            return Ranks(*map(int, values))
    return ALONE


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the processes for the time of the block.

    torchrun says where the first one listens (MASTER_ADDR, MASTER_PORT). Under srun it is the step's first
    machine, and a port made from the numbers of job and step.

    Raises:
        UserError: they do not find each other.
    """
    if ranks.world == 1:
        yield
        return
    given = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    address = os.environ.get("MASTER_ADDR") or _first_machine()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where objects are gathered
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = os.environ.get("MASTER_PORT") or str(20_000 + (job * 101 + step) % 12_000)  # below those given to anybody
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if given else f"tcp://{address}:{port}",
            rank=ranks.rank,
            world_size=ranks.world,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise UserError(
            f"process {ranks.rank} of {ranks.world} cannot reach the first one at {address}:{port}: {error}",
            "start all of them together, on machines that reach each other; or set MASTER_ADDR and MASTER_PORT",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first_machine() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return "localhost"
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol cannot say which machine of {nodes} is the first: {error}",
            "set MASTER_ADDR to it, and MASTER_PORT to a free port",
        ) from error
    return shown.stdout.split()[0]
