#!/usr/bin/env bash
# A SLURM of two nodes on this machine, with daemons, key, ports and state of its own.
#
#   tests/scripts/slurm/cluster.sh run COMMAND...   start it, run the command on it, take it down
#   tests/scripts/slurm/cluster.sh up [PID]         start it; it is taken down when process PID ends
#   tests/scripts/slurm/cluster.sh down             cancel all jobs, stop it, leave no process
#   source <(tests/scripts/slurm/cluster.sh env)    let sbatch, srun, squeue of this shell talk to it
#
# The nodes are named node1 and node2, which resolve to nothing, and have 8 GPUs each that are none.
# Jobs of partition urgent preempt those of debug, the default, which get a minute to end.
# Any user may do this; all it needs is installed by `apt-get install slurm-wlm munge`.
#   SLURM_LOCAL_DIR  where it lives (default: a folder of the user's in /tmp)
#   SLURM_LOCAL_PORT the first of four ports that it listens on (16817)
set -euo pipefail
exec 3<&0 </dev/null # a slurmd that is started without any standard input can start no job

B=${SLURM_LOCAL_DIR:-/tmp/megatron_rltd-slurm-$(id -u)}
port=${SLURM_LOCAL_PORT:-16817}
export SLURM_CONF=$B/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
give_up() { printf 'cluster.sh: %s\n' "$*" >&2; exit 1; }

# Its processes, told from those of another SLURM by the configuration that they were started with.
# Zombies are left out: there may be nobody to reap them.
daemons() {
  local pid state name
  ps -eo pid=,stat=,comm= | while read -r pid state name; do
    case $state:$name in
      Z*) ;;
      *:munged | *:slurmctld | *:slurmd | *:slurmstepd | *:*slurmscriptd)
        if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then
          echo "$pid"
        fi
        ;;
    esac
  done
}

wait_for() { # SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  until "${@:2}"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.1
  done
}

configure() {
  local host memory i
  host=$(hostname -s)
  memory=$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
  mkdir -p "$B"/{munge,state,log,spool-node1,spool-node2}
  chmod 700 "$B" "$B/munge"
  for i in 0 1 2 3 4 5 6 7; do ln -sfn /dev/null "$B/gpu$i"; done
  (umask 077 && head -c 128 /dev/urandom >"$B/munge/key")
  # A requeued job may not start before its credentials have expired, which takes 120 s by default.
  cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$B/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$B/slurmctld.pid
SlurmdPidFile=$B/slurmd-%n.pid
StateSaveLocation=$B/state
SlurmdSpoolDir=$B/spool-%n
SlurmctldLogFile=$B/log/slurmctld.log
SlurmdLogFile=$B/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MpiDefault=none
SwitchType=switch/none
KillWait=15
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=64 Gres=gpu:8 RealMemory=$memory
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 3)) CPUs=64 Gres=gpu:8 RealMemory=$memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=2
END
  cat >"$B/gres.conf" <<END
AutoDetect=off
NodeName=node[1-2] Name=gpu File=$B/gpu[0-7]
END
}

is_idle() { [ "$(sinfo -h -o '%t %D' 2>/dev/null)" = "idle 2" ]; }
has_no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }
is_gone() { [ -z "$(daemons)" ]; }

up() {
  local program
  for program in munged slurmctld slurmd srun; do
    command -v "$program" >/dev/null || give_up "$program is not installed: apt-get install slurm-wlm munge"
  done
  is_gone || give_up "there is one already; take it down first: $0 down"
  rm -rf "$B"
  configure
  munged --key-file="$B/munge/key" --socket="$B/munge/socket" --pid-file="$B/munge/pid" \
    --log-file="$B/munge/log" --seed-file="$B/munge/seed" --num-threads=2 --force 2>"$B/log/munged.log"
  slurmctld -c -f "$SLURM_CONF"
  slurmd -N node1 -f "$SLURM_CONF"
  slurmd -N node2 -f "$SLURM_CONF"
  if ! wait_for 100 is_idle; then
    tail -n 5 "$B"/log/*.log >&2
    down
    give_up "the nodes did not come up"
  fi
  if [ -n "${1:-}" ]; then
    # Whoever started it may be killed without a chance to take it down.
    (
      exec >/dev/null 2>&1 3<&-
      while kill -0 "$1" && [ -e "$SLURM_CONF" ]; do sleep 2; done
      [ ! -e "$SLURM_CONF" ] || down
    ) &
  fi
}

down() {
  local pid
  if [ -e "$SLURM_CONF" ]; then
    scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    scancel --user="$(id -un)" 2>/dev/null || true
    wait_for 60 has_no_jobs || true
    scontrol shutdown >/dev/null 2>&1 || true
    if [ -e "$B/munge/pid" ]; then kill "$(cat "$B/munge/pid")" 2>/dev/null || true; fi
  fi
  if ! wait_for 60 is_gone; then
    for pid in $(daemons); do kill -KILL "$pid" 2>/dev/null || true; done
    wait_for 60 is_gone || give_up "these processes do not end: $(daemons | xargs)"
  fi
  rm -rf "$B"
}

case ${1:-} in
  up) up "${2:-}" ;;
  down) down ;;
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
  run)
    trap down EXIT
    up $$
    "${@:2}" <&3
    ;;
  *) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0" >&2; exit 2 ;;
esac
