"""Shares: read from every launcher's environment, and always a partition of the shards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcap.common.errors import UserError
from gridcap.extract.cluster.share import Share, find_share, local_device, local_rank


def array(task: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """Return the environment of an array task."""
    values = {"ID": task, "COUNT": count, "MIN": first, "MAX": first + (count - 1) * step, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def step(task: int, tasks: int) -> dict[str, str]:
    """Return the environment of an srun task."""
    return {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": str(tasks)}


def torchrun(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


BATCH_SCRIPT = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
}  # a batch script without srun


@pytest.mark.parametrize(
    ("environ", "flags", "share"),
    [
        ({}, (None, None), Share(0, 1)),
        ({}, (2, 8), Share(2, 8)),
        (torchrun(3, 4) | array(1, 2), (2, 8), Share(2, 8)),  # flags override everything
        (torchrun(3, 4), (None, None), Share(3, 4)),
        (array(2, 8), (None, None), Share(2, 8)),
        (array(7, 3, first=5), (None, None), Share(2, 3)),
        (array(14, 3, first=10, step=4), (None, None), Share(1, 3)),
        (array(1, 2) | BATCH_SCRIPT, (None, None), Share(1, 2)),
        (BATCH_SCRIPT, (None, None), Share(0, 1)),
        (step(3, 4) | {"SLURM_NTASKS": "16"}, (None, None), Share(3, 4)),
        (array(1, 2) | step(3, 4), (None, None), Share(1 + 2 * 3, 8)),
        (array(1, 2) | torchrun(3, 4), (None, None), Share(1 + 2 * 3, 8)),
        (torchrun(3, 8) | step(0, 2), (None, None), Share(3, 8)),  # srun starts torchrun, whose ranks span all nodes
        ({"JOB_COMPLETION_INDEX": "2"}, (None, 5), Share(2, 5)),
        (torchrun(1, 2) | {"JOB_COMPLETION_INDEX": "0"}, (None, None), Share(1, 2)),
    ],
)
def test_find_share_reads_flags_and_launcher_variables(
    environ: dict[str, str], flags: tuple[int | None, int | None], share: Share
) -> None:
    assert find_share(environ, *flags) == share


@pytest.mark.parametrize(
    ("environ", "flags", "named"),
    [
        ({}, (2, None), "--world-size"),
        ({}, (None, 4), "--rank"),
        ({}, (4, 4), "--rank 4"),
        ({}, (-1, 4), "--rank -1"),
        ({}, (0, 0), "--world-size 0"),
        (array(0, 4), (None, 4), "--rank"),
        (torchrun(0, 4), (None, 4), "--rank"),
        ({"RANK": "0"}, (None, None), "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, (None, None), "RANK"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, (None, None), "RANK='two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, (None, None), "RANK=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, (None, None), "RANK='-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, (None, None), "RANK=''"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, (None, None), "SLURM_ARRAY_TASK_COUNT"),
        (array(0, 4) | {"SLURM_ARRAY_TASK_ID": "x"}, (None, None), "SLURM_ARRAY_TASK_ID='x'"),
        (array(5, 3), (None, None), "SLURM_ARRAY_TASK_ID=5"),  # --array=0,1,5
        (array(3, 3, step=2), (None, None), "SLURM_ARRAY_TASK_ID=3"),
        (step(0, 2) | {"SLURM_PROCID": "²"}, (None, None), "SLURM_PROCID"),
        ({"JOB_COMPLETION_INDEX": "2"}, (None, None), "JOB_COMPLETION_INDEX"),
        ({"JOB_COMPLETION_INDEX": "5"}, (None, 5), "JOB_COMPLETION_INDEX=5"),
    ],
)
def test_invalid_ranks_are_usage_errors_that_name_the_variable(
    environ: dict[str, str], flags: tuple[int | None, int | None], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        find_share(environ, *flags)
    assert named in f"{caught.value.message} {caught.value.hint}"


counts = st.integers(1, 12)


def assert_partition(shares: list[Share], shards: int) -> None:
    assert sorted(shard for share in shares for shard in share.of(shards)) == list(range(shards))


@given(tasks=counts, first=st.integers(0, 9), stride=st.integers(1, 5), inner=counts, shards=st.integers(0, 60))
def test_shares_are_a_partition_under_every_launcher(
    tasks: int, first: int, stride: int, inner: int, shards: int
) -> None:
    numbers = [array(first + stride * i, tasks, first, stride) for i in range(tasks)]
    assert_partition([find_share(n, None, None) for n in numbers], shards)
    for launcher in (torchrun, step):
        assert_partition([find_share(launcher(j, inner), None, None) for j in range(inner)], shards)
        both = [n | launcher(j, inner) for n in numbers for j in range(inner)]
        assert_partition([find_share(environ, None, None) for environ in both], shards)
    pods = [{"JOB_COMPLETION_INDEX": str(i)} for i in range(tasks)]
    assert_partition([find_share(environ, None, tasks) for environ in pods], shards)


@given(parts=st.lists(counts, min_size=1, max_size=6), shards=st.integers(0, 60))
def test_machines_with_different_gpu_counts_partition_the_shards(parts: list[int], shards: int) -> None:
    shares = [
        find_share(array(i, len(parts)) | torchrun(j, n), None, None) for i, n in enumerate(parts) for j in range(n)
    ]
    assert_partition(shares, shards)


def test_str_names_the_source() -> None:
    assert str(find_share(array(2, 8), None, None)).startswith("rank 2 of 8 (Slurm array; ")
    assert str(find_share(array(0, 2) | step(1, 2), None, None)).startswith("rank 2 of 4 (Slurm array, srun; ")
    assert str(find_share({}, 0, 2)) == "rank 0 of 2 (flags)"
    assert "Kubernetes" in str(find_share({"JOB_COMPLETION_INDEX": "0"}, None, 2))
    assert "torchrun" in str(find_share(torchrun(0, 2), None, None))


def test_item_25_an_array_says_how_it_was_interpreted_and_how_to_override_that() -> None:
    text = str(find_share(array(1, 3), None, None))
    assert "Slurm array" in text
    assert "--rank 0 --world-size 1" in text
    assert find_share(array(1, 3), 0, 1) == Share(0, 1)


@pytest.mark.parametrize(
    ("environ", "device", "gpus", "chosen"),
    [
        ({}, "auto", 4, "auto"),
        ({"LOCAL_RANK": "3"}, "auto", 4, "cuda:3"),
        ({"LOCAL_RANK": "5"}, "cuda", 4, "cuda:1"),
        ({"LOCAL_RANK": "3"}, "auto", 1, "auto"),  # Slurm or Kubernetes made one GPU visible per process
        ({"LOCAL_RANK": "3"}, "auto", 0, "auto"),
        ({"LOCAL_RANK": "3"}, "cpu", 4, "cpu"),
        ({"LOCAL_RANK": "3"}, "cuda:0", 4, "cuda:0"),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, "auto", 2, "cuda:1"),
        ({"SLURM_LOCALID": "0"}, "auto", 2, "auto"),  # a batch script is a single process
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, "auto", 2, "cuda:1"),
    ],
)
def test_local_device_assigns_one_gpu_per_local_rank(
    environ: dict[str, str], device: str, gpus: int, chosen: str
) -> None:
    assert local_device(environ, device, gpus) == chosen


def test_malformed_local_rank_is_named() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK='first'"):
        local_rank({"LOCAL_RANK": "first"})
