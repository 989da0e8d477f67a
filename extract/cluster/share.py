"""Assignment of shards to processes, derived from the launcher's environment without any communication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gridcap.common.errors import UserError
from gridcap.common.resources import available_cores

OVERRIDE_HINT = "pass --rank and --world-size"
SLURM_ARRAY = "Slurm array"


@dataclass(frozen=True)
class Share:
    """The shards of one process: every `world_size`-th shard, starting at `rank`.

    A share depends on these two numbers only, so processes that start at different times agree.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        source: where the two numbers come from, for messages.
    """

    rank: int = 0
    world_size: int = 1
    source: str = field(default="", compare=False)

    def of(self, shards: int) -> range:
        """Return the shard numbers of this process, out of `shards`."""
        return range(self.rank, shards, self.world_size)

    def subdivide(self, rank: int, world_size: int, source: str) -> Share:
        """Return the part of this share that one of `world_size` processes takes.

        The parts add up to this share, regardless of how other shares are divided: the tasks of one Slurm array may
        run on machines with different numbers of GPUs.
        """
        return Share(self.rank + self.world_size * rank, self.world_size * world_size, source)

    def __str__(self) -> str:
        source = self.source
        if source.startswith(SLURM_ARRAY) and self.world_size > 1:
            source += "; for an array over splits, give each task its own store with --rank 0 --world-size 1"
        return f"rank {self.rank} of {self.world_size}" + (f" ({source})" if source else "")


WHOLE = Share()


def find_share(environ: Mapping[str, str], rank: int | None, world_size: int | None) -> Share:
    """Return the share of this process: from the flags, else from torchrun, Slurm, or Kubernetes, else all shards.

    Args:
        environ: environment variables.
        rank: value of `--rank`.
        world_size: value of `--world-size`. Without `--rank` it is for Kubernetes, which tells a pod its index but
            not the number of pods.

    Raises:
        UserError: a number is missing, out of range, or malformed; names the flag or variable.
    """
    if rank is not None:
        if world_size is None:
            raise UserError(f"--rank {rank}: the number of processes is missing", "pass --world-size too")
        return _checked(rank, world_size, "flags", f"--rank {rank} --world-size {world_size}")
    launcher = _torchrun(environ)
    array = _slurm_array(environ)
    step = _slurm_step(environ)
    if launcher is None and array is None and step is None:
        return _kubernetes(environ, world_size)
    if world_size is not None:
        raise UserError(
            f"--world-size {world_size}: the rank of this process is missing",
            "pass --rank too, or omit both: Slurm or torchrun has already set the rank",
        )
    inner = launcher or step
    if array is None:
        return inner or WHOLE
    return array.subdivide(inner.rank, inner.world_size, f"{array.source}, {inner.source}") if inner else array


def local_device(environ: Mapping[str, str], device: str, gpus: int) -> str:
    """Return the device of this process: processes on one machine take its GPUs in turn.

    Args:
        environ: environment variables, in which torchrun, Slurm, or `--devices` set the local rank.
        device: configured device; only "auto" and "cuda" are replaced.
        gpus: number of GPUs visible to this process.
    """
    rank = local_rank(environ)
    if rank is None or gpus < 2 or device not in ("auto", "cuda"):
        return device
    return f"cuda:{rank % gpus}"


def local_rank(environ: Mapping[str, str]) -> int | None:
    """Return the rank of this process on its machine, or None if no launcher started it.

    Raises:
        UserError: the variable is malformed.
    """
    rank = _integer(environ, "LOCAL_RANK")
    return _integer(environ, "SLURM_LOCALID") if rank is None and "SLURM_STEP_ID" in environ else rank


def own_cores(environ: Mapping[str, str]) -> int:
    """Return the number of cores for this process, if the processes of this machine divide the cores.

    torchrun and `--devices` start processes that may all use the same cores; Slurm gives each task cores of its own.

    Raises:
        UserError: a variable is malformed.
    """
    count = _integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_RANK" in environ else None
    return max(1, available_cores() // max(1, count or 1))


def _torchrun(environ: Mapping[str, str]) -> Share | None:
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        missing, present = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
        raise UserError(
            f"{present}={environ[present]} is set but {missing} is not; torchrun sets both",
            f"unset {present}, or {OVERRIDE_HINT}",
        )
    return _checked(rank, world_size, "torchrun", f"RANK={rank} WORLD_SIZE={world_size}")


def _slurm_array(environ: Mapping[str, str]) -> Share | None:
    task, count = _integer(environ, "SLURM_ARRAY_TASK_ID"), _integer(environ, "SLURM_ARRAY_TASK_COUNT")
    if task is None:
        return None
    if count is None:
        raise UserError(f"SLURM_ARRAY_TASK_ID={task} is set but SLURM_ARRAY_TASK_COUNT is not", OVERRIDE_HINT)
    first = _integer(environ, "SLURM_ARRAY_TASK_MIN") or 0
    step = _integer(environ, "SLURM_ARRAY_TASK_STEP") or 1
    index, remainder = divmod(task - first, step)
    if remainder or not 0 <= index < count:  # --array=0,5,7: Slurm does not tell a task the ids of the others
        raise UserError(
            f"SLURM_ARRAY_TASK_ID={task}: the {count} task ids of the array are not evenly spaced "
            f"(expected steps of {step} from {first})",
            f"submit with --array=0-{count - 1}, or {OVERRIDE_HINT}",
        )
    return Share(index, count, SLURM_ARRAY)


def _slurm_step(environ: Mapping[str, str]) -> Share | None:
    """Return the share of an srun task. A batch script without srun is one process, regardless of --ntasks."""
    if "SLURM_STEP_ID" not in environ:
        return None
    rank, world_size = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_STEP_NUM_TASKS")
    if rank is None or world_size is None:
        return None
    return _checked(rank, world_size, "srun", f"SLURM_PROCID={rank} SLURM_STEP_NUM_TASKS={world_size}")


def _kubernetes(environ: Mapping[str, str], world_size: int | None) -> Share:
    index = _integer(environ, "JOB_COMPLETION_INDEX")
    if index is None:
        if world_size is not None:
            raise UserError(
                f"--world-size {world_size}: the rank of this process is missing", "pass --rank too, from 0"
            )
        return WHOLE
    if world_size is None:
        raise UserError(
            f"JOB_COMPLETION_INDEX={index}: Kubernetes does not tell a pod the number of pods",
            "pass --world-size with the value of `completions` in the Job",
        )
    return _checked(index, world_size, "Kubernetes", f"JOB_COMPLETION_INDEX={index} --world-size {world_size}")


def _checked(rank: int, world_size: int, source: str, setting: str) -> Share:
    if not 0 <= rank < world_size:
        raise UserError(f"{setting}: rank out of range", "ranks range from 0 to the world size minus 1")
    return Share(rank, world_size, source)


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text!r}: not a non-negative integer", f"unset {name}, or {OVERRIDE_HINT}")
    return int(text)
