# shellcheck shell=bash
# Sourced last by a pretrain.sh (see settings.sh): starts the processes, one for each GPU, here or on
# all nodes of a SLURM job, and decides what to do when they have ended.
#
# There is no torchrun between SLURM and Megatron, because of how a run is stopped. SLURM sends
# SIGTERM to every process of a job step: before the time limit (--signal=TERM@600), at preemption,
# scancel --signal=TERM, scontrol requeue. torchrun would take it for an order to end its workers,
# kill them after 30 seconds and report a failure. srun starts and watches one process for each GPU
# by itself, and SLURM knows their ranks.
#
# Megatron cannot wait for SIGTERM itself either: it would save, but the same signal has ended the
# process that it saves with. So everything ignores SIGTERM except a shell above each rank. The shell
# sends SIGUSR2 to the rank alone. With --exit-signal-handler, all ranks of Megatron then finish the
# iteration together, save and exit with status 0.
#
# A job requeues itself only if its processes ended with status 0, the run is not finished and its
# newest checkpoint is newer than the one it began with. A job that fails or gets nowhere stays down.
# shellcheck disable=SC2031,SC2153,SC2154  # pretrain.sh has set them

: "${NAME:?pretrain.sh sources this file: run one of the scripts next to it}"

in_slurm=
# Inside of a step, as under srun --pty bash, this is a machine like any other. But a job that was
# submitted from there inherits the step's variables; what sbatch runs has this name.
if [ -n "${SLURM_JOB_ID:-}" ] && [[ -z ${SLURM_STEP_ID:-} || ${0##*/} = slurm_script ]]; then
  in_slurm=1
  unset "${!SLURM_STEP@}"
fi

# Print the number of GPUs here.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -Evxc '(-1)?' || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}

nodes=1 replica=$((TP * PP * CP))
if [ -n "$in_slurm" ]; then
  nodes=${SLURM_NNODES:-1} tasks=${SLURM_NTASKS_PER_NODE:-} gpus=${SLURM_GPUS_ON_NODE:-}
  world=${SLURM_NTASKS:-${tasks:+$((nodes * tasks))}}
  [ -n "$world" ] || problem "SLURM gave no number of tasks: submit with --ntasks-per-node, one for each GPU"
  [ "$SCALE" = smoke ] || [ "${tasks:-$gpus}" = "${gpus:-$tasks}" ] ||
    problem "SLURM gave $gpus GPUs and $tasks tasks on each node, but a task drives one GPU: submit with --ntasks-per-node=$gpus, or --gpus-per-node=$tasks"
else
  world=${PROCESSES:-$(count_gpus)}
  if [ -z "${PROCESSES:-}" ] && ((world > ${most_processes:-world})); then world=$most_processes; fi
  if [ "$world" = 0 ]; then
    [ "$SCALE" = smoke ] || [ -n "$DRY_RUN" ] ||
      problem "there is no GPU here: sbatch this script, set PROCESSES, or use SCALE=smoke"
    world=$replica
  fi
  [ -z "${CONTAINER:-}" ] || problem "CONTAINER is for sbatch and pyxis; here use LAUNCHER, as in LAUNCHER='apptainer exec --nv $CONTAINER'"
fi
world=${world:-$replica}
if ((world % replica)); then
  problem "$world processes do not divide by TP*PP*CP = $TP*$PP*$CP = $replica: change TP, PP, CP or the number of GPUs (sbatch --nodes, --ntasks-per-node; else PROCESSES)"
elif ((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * (world / replica)))); then
  problem "GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE does not divide by MICRO_BATCH_SIZE=$MICRO_BATCH_SIZE times $((world / replica)) data-parallel ranks: change one of them"
fi
if [ ${#problems[@]} -gt 0 ]; then
  printf "$NAME: %s\n" "${problems[@]}" >&2
  exit 2
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Tensor and sequence parallelism overlap only if the GPU starts kernels in the order of their calls.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -z "${PYTHON:-}" ] && [ -z "$DRY_RUN${CONTAINER:-}${LAUNCHER:-}" ]; then
  # shellcheck source=tools/environment.sh
  PYTHON=$(source "$root/tools/environment.sh" && printf '%s' "$PYTHON") || exit 1
fi

# Every kept length is a new size of tensors: without this, torch's memory would be fragmented.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]; then
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi
# Megatron would stop without it, with Transformer Engine too: its output layer is its own.
if [ -z "$GRADIENT_FUSION" ] && [ -z "${CONTAINER:-}${LAUNCHER:-}" ]; then
  "${PYTHON:-python3}" -c 'import importlib.util as util, sys
sys.exit(util.find_spec("fused_weight_gradient_mlp_cuda") is None)' || GRADIENT_FUSION=0
fi
[ "$GRADIENT_FUSION" != 0 ] || TRAINING_ARGS+=(--no-gradient-accumulation-fusion)

# The time limit, should the signal before it be missed, say where SLURM's are not passed on.
minutes_left() {
  local end
  end=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p')
  end=$(date -d "$end" +%s 2>/dev/null) || return 0 # there is no limit
  printf '%s' $(((end - $(date +%s)) / 60))
}
if [ -n "$in_slurm" ] && [ -z "${EXIT_MINUTES:-}" ] && [ -z "$DRY_RUN" ]; then
  left=$(minutes_left)
  if [ -n "$left" ]; then EXIT_MINUTES=$((left > 5 ? left - 5 : left > 2 ? left - 1 : 1)); fi
fi
[ -z "${EXIT_MINUTES:-}" ] || SAVE_ARGS+=(--exit-duration-in-mins "$EXIT_MINUTES")

read -ra extra_args <<<"$EXTRA_ARGS"
COMMAND=(
  "${PYTHON:-python3}" -m megatron_rltd "$program"
  "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${RANDOM_LTD_ARGS[@]}" "${PARALLEL_ARGS[@]}"
  "${DATA_ARGS[@]}" "${SAVE_ARGS[@]}" "${LOGGING_ARGS[@]}" "${extra_args[@]}"
)
# What SLURM says of a process, in the words of torch.distributed. The signal is passed on when
# Megatron is ready for it (as the kernel says: it catches signal 12), and once: a second one would
# end a Python that is exiting.
# shellcheck disable=SC2016
AS_RANK='trap "" TERM INT USR2
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
case " $* " in *" --cpu "*) export CUDA_VISIBLE_DEVICES= ;; esac
"$@" &
rank=$!
pass_on() {
  local caught
  trap "" TERM
  while caught=$(sed -n "s/^SigCgt:[[:space:]]*/0x/p" "/proc/$rank/status"); do
    if ((caught >> 11 & 1)); then kill -USR2 $rank; return; fi
    sleep 0.5
  done 2>/dev/null
}
trap "pass_on &" TERM
while kill -0 $rank 2>/dev/null; do wait $rank; done  # a signal interrupts it
wait $rank'
read -ra launcher <<<"${LAUNCHER:-}"
RANK_COMMAND=("${launcher[@]}" bash -c "$AS_RANK" rank "${COMMAND[@]}")
SRUN=(srun --kill-on-bad-exit=1 --distribution=block --ntasks="$world")
if [ -n "${CONTAINER:-}" ]; then
  # Where this is run, what it reads and what it writes, under the same names.
  folders=("$PWD" "$root" "$RUN_DIR" "${DATA_CACHE:-$RUN_DIR}")
  for file in "${files[@]}"; do [ -z "$file" ] || folders+=("$(realpath -m "$(dirname "$file")")"); done
  mounts=$(printf '%s\n' "${folders[@]}" | sort -u | sed 's|.*|&:&|' | paste -sd ,)
  SRUN+=(--container-image="$CONTAINER" --container-mounts="${CONTAINER_MOUNTS:-$mounts}")
  SRUN+=(--container-workdir="$PWD")
fi

if [ -n "$DRY_RUN" ]; then
  say "$world processes on $nodes nodes; in SLURM ${SRUN[*]}${LAUNCHER:+; each $LAUNCHER}" >&2
  printf '%q ' "${COMMAND[@]}"
  echo
  exit
fi

mkdir -p "$RUN_DIR" || give_up "RUN_DIR=$RUN_DIR cannot be made: set another"
if command -v flock >/dev/null; then
  exec 9>"$RUN_DIR/lock"
  # Status 1: locked. Others: this file system knows no locks.
  status=0 && flock -n 9 || status=$?
  [ "$status" -ne 1 ] || give_up "another run writes to RUN_DIR=$RUN_DIR: wait for it or set another"
fi
exec {stdout}>&1 {stderr}>&2 # for start_again
# A log of all the times that a run is started. Signals must not end it before the processes.
exec > >(trap '' TERM INT HUP && exec tee -a "$RUN_DIR/log.txt" 9>&-) 2>&1
tee=$!
end() { # STATUS MESSAGE...
  say "${@:2}"
  exec >&- 2>&-
  wait "$tee" || true # for the log's last line
  exit "$1"
}

# Begin the script anew in this process, as it was called: what is on the disk now decides what it does.
# shellcheck disable=SC2317  # called by when_ended
start_again() {
  local environment
  mapfile -d '' environment <"/proc/$$/environ" # before any setting got its default
  exec >&"$stdout" 2>&"$stderr" {stdout}>&- {stderr}>&- 9>&-
  wait "$tee" || true
  exec env -i "${environment[@]}" "$BASH" "$0"
}

saved_iteration() {
  grep -Ex '[0-9]+' "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}
# Of Megatron's log lines; a run that is measured in LayerTokens knows only then how long it is.
# Another start may have been told another length; only where nothing was left to do is it asked.
last_iteration() { # ANY_START
  sed -n "s|^$NAME: .* start [0-9]* .*|start|p; s|.* iteration *[0-9]*/ *\([0-9]*\) .*|\1|p" \
    "$RUN_DIR/log.txt" | awk -v any="$1" '/start/ { if (!any) last = ""; next } { last = $1 } END { print last }'
}

asked_to_end=
train_on_nodes() {
  local first
  read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # As SLURM itself reaches that node: its name may mean nothing to the others.
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
  # srun does not take this over from sbatch by itself.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  trap 'asked_to_end=1' TERM # SLURM ends the whole job, and requeues it or not
  MASTER_ADDR=${MASTER_ADDR:-$first} "${SRUN[@]}" "${RANK_COMMAND[@]}" 9>&-
}

train_here() {
  local rank pid status=0 alive pids=()
  for ((rank = 0; rank < world; rank++)); do
    # In a group of its own, which a terminal's Ctrl-C does not reach and which can be killed as one.
    # It keeps the lock: if this script is killed, it trains on, and nothing may write beside it.
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=$world MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} \
      setsid "${RANK_COMMAND[@]}" </dev/null &
    pids+=($!)
  done
  # shellcheck disable=SC2317  # called by the trap
  stop() {
    if [ -z "$asked_to_end" ]; then
      say "stopping after this iteration and saving (interrupt again to kill)"
      kill -TERM "${pids[@]}" 2>/dev/null || true
    else
      kill -KILL -- "${pids[@]/#/-}" 2>/dev/null || true
    fi
    asked_to_end=1
  }
  trap stop TERM INT HUP
  while [ ${#pids[@]} -gt 0 ]; do
    sleep 1 9>&- & # a signal interrupts only what is waited for like this
    wait $! || true
    alive=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        alive+=("$pid")
      elif ! wait "$pid"; then
        status=1
      fi
    done
    pids=("${alive[@]}")
    # The others would wait for the one that failed.
    [ "$status" -eq 0 ] || kill -KILL -- "${pids[@]/#/-}" 2>/dev/null || true
  done
  return $status
}

# Run a command once, where and as the processes run. It keeps the lock until it ends.
# shellcheck disable=SC2317
once() { # COMMAND...
  local process=
  if [ -n "$in_slurm" ]; then
    # SLURM's warning before the time limit is not for it.
    "${SRUN[@]}" --nodes=1 --ntasks=1 "${launcher[@]}" bash -c 'trap "" TERM; exec "$@"' once "$@"
    return
  fi
  trap 'asked_to_end=1; kill -TERM -- "$process" "-$process" 2>/dev/null || true' TERM INT HUP
  setsid "${launcher[@]}" "$@" </dev/null &
  process=$!
  while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done
  trap 'asked_to_end=1' TERM INT HUP
  wait "$process"
}

MASTER_PORT=${MASTER_PORT:-$((16384 + (${SLURM_JOB_ID:-$$} % 1600) * 10))}
while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT
ulimit -Sn "$(ulimit -Hn)" # SLURM hands on the submitting shell's limit of open files

began=$(saved_iteration) status=0
say "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0}${in_slurm:+ of job $SLURM_JOB_ID} from iteration $began," \
  "$world processes on $nodes nodes, $RUN_DIR"
if [ -n "$in_slurm" ]; then train_on_nodes || status=$?; else train_here || status=$?; fi

reached=$(saved_iteration)
last=$(last_iteration $((reached == began)))
[ -z "$in_slurm" ] || [ -z "$asked_to_end" ] || end 143 "ended by SLURM; checkpoint of iteration $reached"
[ "$status" -eq 0 ] || [ -z "$asked_to_end" ] ||
  end 130 "stopped before it could save; the same command continues from iteration $reached"
[ "$status" -eq 0 ] ||
  end 1 "training failed (status $status), see above; not requeued. The same command continues from iteration $reached"
# Of an example of several runs, such as examples/early_bird: what comes after this one.
if declare -F when_ended >/dev/null; then when_ended; fi
[ "$reached" -lt "${last:-$((reached + 1))}" ] || end 0 "finished: iteration $reached of $last"
[ "$reached" -gt "$began" ] ||
  end 1 "nothing was trained and saved since iteration $began; not requeued, or it would never end"
stopped="stopped as requested, checkpoint of iteration $reached of ${last:-?}"
[ -n "$in_slurm" ] || end 130 "$stopped; the same command continues"
trap '' TERM # the job gets it when it is requeued
scontrol requeue "$SLURM_JOB_ID" || end 1 "$stopped; SLURM does not requeue it; the same sbatch continues"
end 0 "$stopped; requeued"
