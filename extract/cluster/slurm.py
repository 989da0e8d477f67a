"""Extraction as an array of Slurm jobs: a script that can be read, `sbatch`, and a look at what becomes of it.

Not by submitit: it pickles a Python function and decides itself what a signal does, requeueing a fixed number of
times whether or not anything was made. Our command needs neither: it can be run again as it is, and a script that
says everything can be shown, kept and changed by hand.
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
from gridcap.extract.plan import Plan

GRACE = 60
"""Seconds between the warning and the time limit: a shard is given up within ten, and Slurm's clock is coarse."""

_LOOK = 2.0  # seconds between two looks at the shards
_ASK = 5  # looks for each question to Slurm's controller, which many users share
_ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
)


@dataclass(frozen=True)
class SlurmRequest:
    """What is asked of Slurm; None leaves it to the cluster's default.

    Attributes:
        workers: tasks of the array.
        partition, time, mem: as sbatch takes them.
        gpus_per_task, cpus_per_task: for each task of the array.
    """

    workers: int
    partition: str | None = None
    time: str | None = None
    gpus_per_task: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None


def slurm_folder(store: Path) -> Path:
    """Where the script and the logs go: features/train -> features/train.slurm."""
    return store.with_name(f"{store.name}.slurm")


def job_script(command: Sequence[str], request: SlurmRequest, store: Path, here: Path) -> str:
    """The text of the job script.

    Args:
        command: of one worker, with absolute paths of the interpreter and the program.
        request: what to ask of Slurm.
        store: the folder of the shards.
        here: the folder in which the command runs.
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
    asked = "\n".join(
        f"#SBATCH --{name}" + (f"={_quoted(str(value))}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    )
    threads = f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{request.cpus_per_task}}}\n" if request.cpus_per_task else ""
    return f"""#!/usr/bin/env bash
{asked}

# Written by extract-features --submit. Each task makes its share of the shards; whoever finishes last writes the
# index. Submitted again, it makes what is missing.

cd {shlex.quote(str(here))} || exit 2
store={shlex.quote(str(store.absolute()))}
command=(
{_folded(command)}
)
export PYTHONUNBUFFERED=1
unset SLURM_STEP_ID RANK WORLD_SIZE LOCAL_RANK # left over from where it was submitted, they would number the worker
{threads}
existing_shards() {{ # of this task
  find "$store" -name '[0-9]*.h5' | awk -F/ -v n={request.workers} -v i="$SLURM_ARRAY_TASK_ID" \\
    '{{ sub(/\\.h5$/, "", $NF); if ($NF % n == i) count++ }} END {{ print count + 0 }}'
}}
was_preempted() {{ [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; }}

# Slurm sends its warning to this shell alone (--signal=B), which hands it on; scancel's SIGTERM goes to every process
# by itself. The shell must outlive both, to requeue.
worker= signalled=
warn() {{
  signalled=yes
  echo "warned by Slurm: task $SLURM_ARRAY_TASK_ID is told to stop"
  [[ $worker ]] && kill -USR2 "$worker"
}}
trap warn USR2
trap 'signalled=yes' TERM

before=$(existing_shards)
"${{command[@]}}" &
worker=$!
[[ $signalled ]] && warn # it came before there was a worker
while true; do
  signalled=
  wait "$worker"
  status=$?
  [[ $signalled ]] || break # otherwise it was the signal that ended the waiting
done

# A job that ends by itself while it is being preempted is not requeued by Slurm, so it is done here. If Slurm was
# first, the job no longer counts as preempted, and ends.
requeue() {{
  echo "requeued: task $SLURM_ARRAY_TASK_ID goes on when Slurm starts it again"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
}}
if ((status == 140 || status == 143)) && was_preempted; then
  requeue
elif ((status == 140)); then
  if (($(existing_shards) > before)); then
    requeue
  else
    echo "error: not one shard was finished within the time limit, so this task is not requeued"
    echo "  what to do: raise --time, or begin a new store with a smaller --shard-size"
    status={EXIT_FAILURE}
  fi
fi
exit "$status"
"""


def _quoted(value: str) -> str:
    """For a #SBATCH line, where sbatch itself, not the shell, takes quotes away."""
    if not any(c in value for c in " \t'\"\\#"):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _folded(command: Sequence[str]) -> str:
    """Quoted for the shell: the program on a line, then each flag with its value."""
    lines: list[str] = []
    for word in command:
        if not lines or word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join(f"  {line}" for line in lines)


def submit(script: str, store: Path) -> str:
    """Write the job script beside the store and give it to Slurm; the number of the job.

    Raises:
        UserError: there is no Slurm here.
        GridcapError: Slurm refuses it.
    """
    path = slurm_folder(store) / "job.sh"
    write_text(path, script)
    try:
        done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "--submit slurm: there is no sbatch on the PATH",
            f"run this where jobs are submitted; the script is {path}, for sbatch there",
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or "no reason given").splitlines()[0]
        raise GridcapError(
            f"{path}: {said}",
            "is Slurm running here? if it is, check --partition, --time and what else was asked of it",
        )
    return done.stdout.strip().partition(";")[0]


def follow(number: str, output: Path, store: Path, plan: Plan) -> None:
    """Wait, with a bar over the shards, until the store is complete.

    Args:
        number: of the Slurm job.
        output: the store's index file.
        store: the folder of its shards.
        plan: of the store.

    Raises:
        GridcapError: no task is left and the store is not complete, with how the tasks ended.
    """
    tasks: dict[int, _Task] = {}
    looks = 0
    all_ended = False
    there = len(plan.existing_shards(store))
    with progress_bar(total=plan.shards, initial=there, unit="shard", desc=f"job {number}", disable=None) as bar:
        while True:
            asked = _tasks(number) if looks % _ASK == 0 else None
            there = len(plan.existing_shards(store))
            bar.update(there - bar.n)
            if there == plan.shards and output.exists():
                return
            if asked is not None:
                for gone in tasks.keys() - asked.keys():
                    tasks[gone].ended = True
                tasks.update(asked)
                bar.set_postfix_str(_in_short(tasks))
                if all_ended:
                    break
                # Asked twice: a network folder may show the last files some seconds late.
                all_ended = all(task.ended for task in tasks.values())
            looks += 1
            time.sleep(_LOOK)
    ends = "; ".join(f"task {i} {task.end}" for i, task in sorted(tasks.items())) or "Slurm no longer knows its tasks"
    raise GridcapError(
        f"job {number} has ended, {plan.shards - there} of {plan.shards} shards are missing: {ends}",
        f"see the logs, {slurm_folder(store)}/{number}_*.log; the same command again makes just what is missing",
    )


@dataclass
class _Task:
    state: str
    reason: str
    exit_code: str
    ended: bool

    @property
    def end(self) -> str:
        if self.state not in _ENDED:
            return f"{self.state} when last seen"
        return f"{self.state} ({self.exit_code})" if self.state == "FAILED" else self.state


def _tasks(number: str) -> dict[int, _Task] | None:
    """The tasks that Slurm still knows of, ended ones among them for some minutes; None if it does not answer."""
    wanted = "ArrayTaskID:|,State:|,Reason:|,exit_code:|"
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", f"--Format={wanted}"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return {} if "Invalid job id" in done.stderr else None
    tasks = {}
    for line in done.stdout.splitlines():
        task, state, reason, exit_code = line.split("|")[:4]
        if task.isdigit():
            tasks[int(task)] = _Task(state, reason, exit_code, state in _ENDED)
    return tasks


def _in_short(tasks: dict[int, _Task]) -> str:
    return ", ".join(
        f"{count} {state.lower()}" + (f" ({reason})" if reason != "None" else "")
        for (state, reason), count in Counter(
            (task.state, task.reason if task.state == "PENDING" else "None") for task in tasks.values()
        ).items()
    )
