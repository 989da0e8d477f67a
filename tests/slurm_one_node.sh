#!/usr/bin/env bash
# A real single-node Slurm with all its state in one folder, for the tests, on any machine where root may start daemons.
# No systemd, cgroups, accounting, or configuration outside the folder.
#
#   slurm_one_node.sh start FOLDER     then use it with SLURM_CONF=FOLDER/slurm.conf
#   slurm_one_node.sh stop FOLDER
#
# The partition `main` is the default. Jobs in `high` preempt jobs in `main`, which receive their warning signal, get ten
# seconds of grace, and are requeued. The node has four cores, regardless of the machine.
set -euo pipefail

folder=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

free_ports() { # print two unused ports
  python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

wait_for() { # SECONDS COMMAND...: repeat the command until it succeeds
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

node_is_idle() { [[ $(timeout 5 sinfo --noheader --format=%T 2>/dev/null) == *idle* ]]; }
queue_is_empty() { [[ -z $(timeout 5 squeue --noheader 2>/dev/null) ]]; }
has_ended() { [[ ! -d /proc/$1 || $(grep ^State: "/proc/$1/status" 2>/dev/null) == *Z* ]]; }

start() {
  local node controller daemon
  node=$(hostname -s)
  read -r controller daemon < <(free_ports)
  mkdir -p "$folder"/{controller,daemon}
  mkdir -m 700 "$folder/munge"
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmctldPort=$controller
SlurmdPort=$daemon
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/daemon
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=10
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=10
PartitionName=high Nodes=$node State=UP MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
CONF
  munged --force --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log" \
    --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" >/dev/null 2>&1
  slurmctld
  slurmd
  wait_for 60 node_is_idle || {
    tail -n 20 "$folder"/slurm*.log >&2
    stop
    return 1
  }
}

stop() {
  local name process
  scancel --user="$(id -un)" >/dev/null 2>&1 || true
  wait_for 20 queue_is_empty || scancel --user="$(id -un)" --signal=KILL --full >/dev/null 2>&1 || true
  for name in slurmd slurmctld munged; do
    [[ -s $folder/$name.pid ]] || continue
    process=$(<"$folder/$name.pid")
    kill "$process" 2>/dev/null || true
    wait_for 10 has_ended "$process" || kill -KILL "$process" 2>/dev/null || true
  done
}

case $1 in
  start | stop) "$1" ;;
  *) echo "usage: slurm_one_node.sh start|stop FOLDER" >&2 && exit 2 ;;
esac
