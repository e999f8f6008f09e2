# shellcheck shell=bash
# An Early-Bird ticket of GPT-3 1.3B (docs/early_bird.md), from the first iteration to the last: the
# dense model trains and is searched, the ticket is drawn, and the ticket trains until the end.
# Sourced by the scripts beside it, which differ in a few of the settings below. Any of them runs
#
#   sbatch SCRIPT                  on a cluster; it resumes, and requeues itself, until it is finished
#   bash SCRIPT                    on this machine and all its GPUs; Ctrl-C saves, a restart continues
#   SCALE=smoke bash SCRIPT        the same in small, with made-up data: a minute, no GPU needed
#   DRY_RUN=1 bash SCRIPT          prints the command that comes next; needs no data
#
# However it was stopped, the same command goes on. What is there decides what comes next: with
# RUN_DIR/ticket/checkpoints the ticket trains, and otherwise the search, which ends at once if its
# checkpoint says that the ticket has emerged. draw_ticket.py makes the folder of a ticket whole or
# not at all.
#
# Everything else is examples/gpt3_1.3b: data, model, recipe and settings (the top of its pretrain.sh,
# and of examples/lib/settings.sh). If EXTRA_ARGS has another --hidden-size, add --kv-channels, which a
# ticket keeps. Different or new are
#
#   RUN_DIR            dense/, ticket/ and the controls' folders (runs/early_bird/300b; with LTD=1
#                      300b_ltd). The ticket and its random controls share dense/: start one, and the
#                      others when its search has ended
#   TOKENS             300000000000; with SCALE=smoke 1000000000000, of which it makes 47 iterations
#   LTD                1: random-LTD, as in examples/gpt3_1.3b/ltd_300b.sh
#   TICKET_HEADS       heads that the ticket keeps (12 of 16; SCALE=smoke: 3 of 4)
#   TICKET_FFN         FFN neurons that it keeps (4864 of 8192; SCALE=smoke: 464 of 768)
#   SIGNAL             norm, or random: the control of the choice
#   TICKET_SEED        of SIGNAL=random (1)
#   INTERVAL           iterations between checks (1% of those that TOKENS are without dropping;
#                      SCALE=smoke: 5%)
#   UNTIL              the first check from this iteration on ends the search in any case (20% of them)
#   SEARCH_ARGS        more flags of the search: SEARCH_ARGS="--early-bird-preset early-transformers"
#   DRAW_MINUTES       in SLURM: with less time left, the ticket is drawn after a requeue (30)
#   ARM                ticket, or scratch: the control of the search, a model of the ticket's size
#                      without one. Its TOKENS are as many as make it compute what search and ticket
#                      do if the ticket is drawn at UNTIL

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ARM=${ARM:-ticket} SIGNAL=${SIGNAL:-norm} LTD=${LTD:-0} TICKET_SEED=${TICKET_SEED:-1}
DRAW_MINUTES=${DRAW_MINUTES:-30} SEARCH_ARGS=${SEARCH_ARGS:-}
LR=${LR:-2e-4}
METHOD=dense run=300b
[ "$LTD" = 0 ] || METHOD=ltd run=300b_ltd
case ${SCALE:-full}-$METHOD in # TOKENS of the ticket's run, and of ARM=scratch
  smoke-dense) tokens=1000000000000 enough=1027604480000 ;;
  smoke-*) tokens=1000000000000 enough=1034158080000 ;;
  *-dense) tokens=300000000000 enough=328350040064 ;;
  *) tokens=300000000000 enough=307155244373 ;;
esac
[ "$ARM" = ticket ] || tokens=$enough
TOKENS=${TOKENS:-$tokens}
if [ "${SCALE:-full}" = smoke ]; then
  TICKET_HEADS=${TICKET_HEADS:-3} TICKET_FFN=${TICKET_FFN:-464} run=$run-smoke
else
  TICKET_HEADS=${TICKET_HEADS:-12} TICKET_FFN=${TICKET_FFN:-4864}
fi
folder=$(realpath -m "${RUN_DIR:-$here/../../runs/early_bird/$run}")
dense=$folder/dense ticket=$folder/ticket
[ "$SIGNAL" = norm ] || ticket=$folder/ticket-$SIGNAL-seed$TICKET_SEED
DATA_CACHE=${DATA_CACHE:-$folder/cache}

if [ "$ARM" = scratch ]; then
  phase=scratch RUN_DIR=$folder/scratch
elif [ -s "$ticket/checkpoints/latest_checkpointed_iteration.txt" ]; then
  phase=ticket RUN_DIR=$ticket
else
  phase=search RUN_DIR=$dense
fi

# pretrain.sh calls this when it knows the model.
# shellcheck disable=SC2034,SC2154
more_flags() {
  local iterations more checks=100
  switches LTD
  whole_numbers TICKET_HEADS TICKET_FFN TICKET_SEED INTERVAL UNTIL DRAW_MINUTES
  [[ $ARM =~ ^(ticket|scratch)$ ]] || give_up "ARM=$ARM is not ticket or scratch"
  [[ $SIGNAL =~ ^(norm|random)$ ]] || give_up "SIGNAL=$SIGNAL is not norm or random"
  files+=("$dense") # so that containers see the folder of all phases
  if [ "$phase" = search ]; then
    iterations=$(($(samples_of "$TOKENS") / GLOBAL_BATCH_SIZE))
    [ "$SCALE" = full ] || checks=20
    INTERVAL=${INTERVAL:-$((iterations > checks ? iterations / checks : 1))}
    UNTIL=${UNTIL:-$((iterations > 5 ? iterations / 5 : 1))}
    read -ra more <<<"$SEARCH_ARGS"
    TRAINING_ARGS+=(
      --early-bird --early-bird-num-attention-heads "$TICKET_HEADS"
      --early-bird-ffn-hidden-size "$TICKET_FFN" --early-bird-interval "$INTERVAL"
      --early-bird-until "$UNTIL" "${more[@]}"
    )
  else
    MODEL_ARGS+=(--kv-channels $((hidden / heads)) --ffn-hidden-size "$TICKET_FFN")
    heads=$TICKET_HEADS
  fi
}

# launch.sh calls this when the processes have ended well.
# shellcheck disable=SC2154
when_ended() {
  local python=("${PYTHON:-python3}") status=0 left=
  case $phase in
    search)
      [ -z "$asked_to_end" ] || return 0
      once "${python[@]}" "$here/report.py" emerged "$dense/checkpoints" \
        --heads "$TICKET_HEADS" --ffn "$TICKET_FFN" || status=$?
      case $status in
        0) ;;
        3) # not yet
          [ "$reached" -lt "${last:-$((reached + 1))}" ] ||
            end 1 "the run has ended, but no ticket has emerged: the last check was before UNTIL=$UNTIL"
          return 0
          ;;
        *) end 1 "cannot say whether the ticket has emerged, see above; not requeued" ;;
      esac
      if [ -n "$in_slurm" ] && [ "$reached" -gt "$began" ]; then
        left=$(minutes_left)
        if [ -n "$left" ] && [ "$left" -lt "$DRAW_MINUTES" ]; then
          say "$left minutes are left: the ticket is drawn in the next start"
          return 0
        fi
      fi
      mkdir -p "$ticket"
      rm -rf "$ticket"/.checkpoints-* # of a draw that was killed
      local flags=(--load "$dense/checkpoints" --save "$ticket/checkpoints" --signal "$SIGNAL")
      [ "$SIGNAL" = norm ] || flags+=(--seed "$TICKET_SEED")
      once "${python[@]}" "$root/tools/checkpoint/draw_ticket.py" "${flags[@]}" || status=$?
      [ "$status" -eq 0 ] || [ -z "$asked_to_end" ] ||
        end 130 "stopped while the ticket was drawn; the same command draws it"
      [ "$status" -eq 0 ] || end 1 "the ticket was not drawn, see above; the same command tries again"
      [ -z "$asked_to_end" ] || end 130 "the ticket is drawn; the same command continues with it"
      say "the ticket is drawn; now it trains"
      start_again
      ;;
    ticket | scratch)
      [ "$reached" -ge "${last:-$((reached + 1))}" ] || return 0
      once "${python[@]}" "$here/report.py" table "$folder" || true
      ;;
  esac
}

# shellcheck source=examples/gpt3_1.3b/pretrain.sh
source "$here/../gpt3_1.3b/pretrain.sh"
