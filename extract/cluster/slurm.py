"""Extraction as a Slurm job array: the job script, its submission, and waiting for the jobs.

submitit is not used: it pickles a Python function and handles signals itself, requeueing a fixed number of times
regardless of progress. Our command can simply be rerun, and a self-contained script can be read, kept, and edited.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.errors import EXIT_FAILURE, GridcapError, UserError
from gridcap.common.files import write_text
from gridcap.common.progress import progress_bar
from gridcap.common.text import plural
from gridcap.extract.indexing import refresh_listings
from gridcap.extract.plan import Plan

GRACE = 60
"""Seconds between the warning signal and the time limit. A worker stops within ten seconds; Slurm's timer is coarse."""

POLL_INTERVAL = 2.0  # seconds between two counts of the shards
POLLS_PER_QUERY = 5  # counts per query to Slurm's controller, which many users share
_FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
)


@dataclass(frozen=True)
class SlurmRequest:
    """Resources to request from Slurm; None keeps the cluster's default.

    Attributes:
        workers: number of tasks in the array.
        partition, time, mem: in sbatch's syntax.
        gpus_per_task, cpus_per_task: per task of the array.
    """

    workers: int
    partition: str | None = None
    time: str | None = None
    gpus_per_task: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None


def slurm_folder(store: Path) -> Path:
    """Return the folder of the job script and the logs: features/train -> features/train.slurm."""
    return store.with_name(f"{store.name}.slurm")


def job_script(command: Sequence[str], request: SlurmRequest, store: Path, cwd: Path) -> str:
    """Return the text of the job script.

    Args:
        command: command of one task, with absolute paths of the interpreter and the program.
        request: resources to request.
        store: folder of the shards.
        cwd: folder in which the command runs.
    """
    options = {
        "job-name": f"gridcap-{store.name}",
        "array": f"0-{request.workers - 1}",
        "ntasks": "1",
        "partition": request.partition,
        "time": request.time,
        "gpus-per-task": request.gpus_per_task,
        "cpus-per-task": request.cpus_per_task,
        "mem": request.mem,
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR2@{GRACE}",
        "output": f"{str(slurm_folder(store.absolute())).replace('%', '%%')}/%A_%a.log",
    }
    directives = "\n".join(
        f"#SBATCH --{name}" + (f"={_quote_directive(str(value))}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    )
    threads = f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{request.cpus_per_task}}}\n" if request.cpus_per_task else ""
    return f"""#!/usr/bin/env bash
{directives}

# Written by extract-features --submit. Each task writes its share of the shards, and the last one to finish writes the
# index. Submitting the script again writes the missing shards.

cd {shlex.quote(str(cwd))} || exit {EXIT_FAILURE}
store={shlex.quote(str(store.absolute()))}
command=(
{_quote_command(command)}
)
export PYTHONUNBUFFERED=1
unset SLURM_STEP_ID RANK WORLD_SIZE LOCAL_RANK # inherited from the submitting shell, they would set a wrong rank
{threads}
existing_shards() {{ # of this task
  find "$store" -name '[0-9]*.h5' | awk -F/ -v n={request.workers} -v i="$SLURM_ARRAY_TASK_ID" \\
    '{{ sub(/\\.h5$/, "", $NF); if ($NF % n == i) count++ }} END {{ print count + 0 }}'
}}
was_preempted() {{ [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; }}

# Slurm sends its warning to this shell only (--signal=B), which forwards it; scancel sends SIGTERM to every process.
# The shell must survive both to requeue the task.
worker= signalled=
warn() {{
  signalled=yes
  echo "warning signal from Slurm: stopping task $SLURM_ARRAY_TASK_ID"
  [[ $worker ]] && kill -USR2 "$worker"
}}
trap warn USR2
trap 'signalled=yes' TERM

before=$(existing_shards)
"${{command[@]}}" &
worker=$!
[[ $signalled ]] && warn # the signal arrived before the worker started
while true; do
  signalled=
  wait "$worker"
  status=$?
  [[ $signalled ]] || break # otherwise the signal interrupted `wait`
done

# Slurm does not requeue a job that exits while it is being preempted, so the script does. If Slurm was faster, the job
# no longer counts as preempted and exits.
requeue() {{
  echo "requeued: task $SLURM_ARRAY_TASK_ID resumes when Slurm restarts it"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
}}
if ((status == 140 || status == 143)) && was_preempted; then
  requeue
elif ((status == 140)); then
  if (($(existing_shards) > before)); then
    requeue
  else
    echo "error: no shard was completed within the time limit, so this task is not requeued"
    echo "  what to do: raise --time, or create a new store with a smaller --shard-size"
    status={EXIT_FAILURE}
  fi
fi
exit "$status"
"""


def _quote_directive(value: str) -> str:
    """Quote a value for an #SBATCH line, which sbatch parses itself."""
    if not any(c in value for c in " \t'\"\\#"):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _quote_command(command: Sequence[str]) -> str:
    """Quote a command for the shell: the program on one line, then one line per flag with its value."""
    lines: list[str] = []
    for argument in command:
        if not lines or argument.startswith("--"):
            lines.append(shlex.quote(argument))
        else:
            lines[-1] += f" {shlex.quote(argument)}"
    return "\n".join(f"  {line}" for line in lines)


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
