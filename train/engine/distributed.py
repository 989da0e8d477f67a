"""Data-parallel training with several processes, started by torchrun or as the tasks of a Slurm step.

Each rank computes the gradients of its share of the images of a step. The gradients are summed over all ranks, and
every rank applies the same optimizer step. DistributedDataParallel is not needed: a decoder is small, its gradients fit
in one all-reduce, and the sum of the losses divided by the total number of tokens is exactly the loss of one process.
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

from gridcap.common.errors import TrainingError, UserError

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the range of ephemeral ports


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the collectives that training needs.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of processes.
        local_rank: index of this process on its machine; selects the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints (rank 0)."""
        return self.rank == 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, with one collective per dtype."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, total in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                tensor.copy_(total.reshape(tensor.shape))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def any(self, value: bool) -> bool:
        """Return whether the value is true on any rank. This does not wait for GPUs."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def all_gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


SINGLE_PROCESS = Ranks()


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read the rank of this process from the variables of torchrun or Slurm (srun).

    Returns:
        `SINGLE_PROCESS` if neither started this process, or if it is the only one.

    Raises:
        UserError: the variables are inconsistent.
    """
    for rank, world_size, local_rank in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and environment.get(world_size, "1") != "1":
            values = [environment[rank], environment[world_size], environment.get(local_rank, "0")]
            if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
                raise UserError(
                    f"inconsistent variables: {rank}={values[0]}, {world_size}={values[1]}, {local_rank}={values[2]}",
                    "fix the job script, or unset the variables to train in a single process",
                )
            return Ranks(*map(int, values))
    return SINGLE_PROCESS


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect all ranks for the duration of the block.

    torchrun provides the address of rank 0 (MASTER_ADDR, MASTER_PORT). Under srun, the address is the first node of the
    step, and the port is derived from the job and step ids.

    Raises:
        TrainingError: the ranks cannot connect.
    """
    if ranks.world_size == 1:
        yield
        return
    from_environment = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    address = os.environ.get("MASTER_ADDR") or _first_node()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # all_gather_object allocates on the current device
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = os.environ.get("MASTER_PORT") or str(_FIRST_PORT + (job * 101 + step) % _NUM_PORTS)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method="env://" if from_environment else f"tcp://{address}:{port}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise TrainingError(
            f"rank {ranks.rank} of {ranks.world_size} cannot connect to rank 0 at {address}:{port}: {error}",
            "start all ranks together, on machines that can reach each other, or set MASTER_ADDR and MASTER_PORT",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _first_node() -> str:
    """Return the host name of the first node of the Slurm step."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return "localhost"
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TrainingError(
            f"scontrol cannot expand the node list {nodes}: {error}",
            "set MASTER_ADDR to the first node and MASTER_PORT to a free port",
        ) from error
    return result.stdout.split()[0]
