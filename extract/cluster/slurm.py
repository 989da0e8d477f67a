"""Slurm job arrays: submission, and waiting for the jobs."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.errors import GridcapError, UserError
from gridcap.common.files import write_text
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural
from gridcap.extract.cluster.job_script import slurm_folder
from gridcap.extract.indexing import refresh_listings
from gridcap.extract.plan import Plan

POLL_INTERVAL = 2.0  # seconds between two counts of the shards
POLLS_PER_QUERY = 5  # counts per query to Slurm's controller, which many users share
_FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
)


def submit(script: str, store: Path) -> str:
    """Write the job script next to the store, submit it, and return the job id.

    Raises:
        UserError: Slurm is not installed.
        GridcapError: sbatch failed.
    """
    path = slurm_folder(store) / "job.sh"
    write_text(path, script)
    try:
        done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "--submit slurm: sbatch not found on the PATH",
            f"run this on a login node, or submit {path} there with sbatch",
        ) from None
    if done.returncode != 0:
        message = (done.stderr.strip() or "no error message").splitlines()[0]
        raise GridcapError(
            f"{path}: sbatch failed: {message}", "check that Slurm is running, and check --partition, --time, --mem"
        )
    return done.stdout.strip().partition(";")[0]


def follow(job_id: str, output: Path, store: Path, plan: Plan) -> None:
    """Wait until all shards of the store exist, with a progress bar over its shards.

    Normally the last task writes the index. If all tasks have ended without an index, because each of them saw a stale
    listing of the shards, the caller must write it.

    Args:
        job_id: id of the job array.
        output: index file of the store.
        store: folder of the shards.
        plan: plan of the store.

    Raises:
        GridcapError: all tasks have ended but shards are missing; the message lists how the tasks ended.
    """
    tasks: dict[int, _Task] = {}
    polls = 0
    ended_before = False
    existing = len(plan.existing_shards(store))
    with progress_bar(total=plan.shards, initial=existing, unit="shard", desc=f"job {job_id}", disable=None) as bar:
        while True:
            queried = _query_tasks(job_id) if polls % POLLS_PER_QUERY == 0 else None
            existing = len(plan.existing_shards(store))
            bar.update(existing - bar.n)
            if existing == plan.shards and output.exists():
                return
            if queried is not None:
                for unlisted in tasks.keys() - queried.keys():
                    tasks[unlisted].ended = True
                tasks.update(queried)
                bar.set_postfix_str(_summary(tasks))
                if ended_before:
                    break
                ended_before = all(task.ended for task in tasks.values())
                if ended_before:  # count once more, without stale listings of a network file system
                    refresh_listings(store / folder for folder in plan.folders)
            polls += 1
            time.sleep(POLL_INTERVAL)
    if existing == plan.shards:
        return
    ends = "; ".join(f"task {i} {task.end}" for i, task in sorted(tasks.items())) or "Slurm no longer lists its tasks"
    raise GridcapError(
        f"job {job_id} has ended, but {plan.shards - existing} of {plural(plan.shards, 'shard')} are missing: {ends}",
        f"see the logs, {slurm_folder(store)}/{job_id}_*.log; rerun the command to write the missing shards",
    )


@dataclass
class _Task:
    """State of one task of the array."""

    state: str
    reason: str
    exit_code: str
    ended: bool

    @property
    def end(self) -> str:
        if self.state not in _FINAL_STATES:
            return f"{self.state} when last seen"
        return f"{self.state} ({self.exit_code})" if self.state == "FAILED" else self.state


def _query_tasks(job_id: str) -> dict[int, _Task] | None:
    """Query the tasks that Slurm lists, which include ended ones for some minutes; None if Slurm does not answer."""
    columns = "ArrayTaskID:|,State:|,Reason:|,exit_code:|"
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", f"--Format={columns}"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return {} if "Invalid job id" in done.stderr else None
    tasks = {}
    for line in done.stdout.splitlines():
        task, state, reason, exit_code = line.split("|")[:4]
        if task.isdigit():
            tasks[int(task)] = _Task(state, reason, exit_code, state in _FINAL_STATES)
    return tasks


def _summary(tasks: dict[int, _Task]) -> str:
    """Count the tasks per state, such as "2 running, 1 pending (Resources)"."""
    counts = Counter((task.state, task.reason if task.state == "PENDING" else "None") for task in tasks.values())
    return ", ".join(
        f"{count} {state.lower()}" + (f" ({reason})" if reason != "None" else "")
        for (state, reason), count in counts.items()
    )
