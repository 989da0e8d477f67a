"""The job script of a Slurm job array.

submitit is not used: it pickles a Python function and handles signals itself, requeueing a fixed number of times
regardless of progress. Our command can simply be rerun, and a self-contained script can be read, kept, and edited.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gridcap.common.errors import EXIT_FAILURE

GRACE = 60
"""Seconds between the warning signal and the time limit. A worker stops within ten seconds; Slurm's timer is coarse."""


@dataclass(frozen=True)
class SlurmRequest:
    """Resources to request from Slurm; None keeps the cluster's default.

    Attributes:
        num_jobs: number of tasks in the array.
        partition, time, mem: in sbatch's syntax.
        gpus_per_task, cpus_per_task: per task of the array.
    """

    num_jobs: int
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
        "array": f"0-{request.num_jobs - 1}",
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
unset SLURM_STEP_ID RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of the submitting shell, which would set a wrong rank
{threads}
existing_shards() {{ # of this task
  find "$store" -name '[0-9]*.h5' | awk -F/ -v n={request.num_jobs} -v i="$SLURM_ARRAY_TASK_ID" \\
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
