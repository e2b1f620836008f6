# shellcheck shell=bash
# Sourced by all of slurm/*.sh, on a login node and inside the job. Reads slurm/cluster.env, puts the
# venv first on PATH, and defines `finetune` and `run`. On a login node, a script checks itself and
# is submitted: see launch/submit.py.
set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
# A warning that arrives before the launcher has installed its handlers must not kill the script.
trap '' USR1 USR2
MEGATRON_FT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export MEGATRON_FT
CLUSTER_ENV=${CLUSTER_ENV:-$MEGATRON_FT/slurm/cluster.env}
if [ ! -f "$CLUSTER_ENV" ]; then
  echo "error: $CLUSTER_ENV not found: cp '$MEGATRON_FT/slurm/cluster.env.example' '$MEGATRON_FT/slurm/cluster.env', and fill it in" >&2
  exit 2
fi
set -a
# shellcheck source=slurm/cluster.env.example
source "$CLUSTER_ENV"
set +a
VENV=${VENV:-$MEGATRON_FT/.venv}
if [ ! -x "$VENV/bin/python" ]; then
  echo "error: VENV=$VENV in $CLUSTER_ENV contains no bin/python on $(hostname): run make venv, or correct the line" >&2
  exit 2
fi
export PATH="$VENV/bin:$PATH"
MEGATRON_FT_ARGUMENTS=$(printf '%q ' "$@")
export MEGATRON_FT_ARGUMENTS
if [ "$#" = 0 ]; then MEGATRON_FT_ARGUMENTS=""; fi

# The programs: of this checkout, or of the package in VENV, with which `megatron-ft slurm init` wrote this file.
PROGRAMS=$MEGATRON_FT
if [ ! -f "$PROGRAMS/launch/finetune.py" ]; then
  PROGRAMS=$(python -P -c 'from megatron_ft.launcher.command import PROGRAMS; print(PROGRAMS)')
fi

# On a login node: check everything, then submit the script. To check, submit.py runs the script with
# MEGATRON_FT_CHECK set. A script that sets OWN_SUBMISSION submits several jobs by itself.
if [ -z "${SLURM_JOB_ID:-}${MEGATRON_FT_CHECK:-}${OWN_SUBMISSION:-}" ]; then
  exec python -P "$PROGRAMS/launch/submit.py" "$(realpath -- "$0")" "$@"
fi

# finetune FLAGS...: train, or resume from --save if it contains a checkpoint. Flags override the
# variables below.
finetune() {
  local flags=() pair name flag
  for pair in DATA_PREFIX:--data-prefix TRAIN_SPLITS:--train-weighted-split-paths-path VALID_SPLITS:--valid-weighted-split-paths-path \
    TEST_SPLITS:--test-weighted-split-paths-path TOKENIZER_FILE:--tokenizer-file LOAD:--load SAVE:--save ENGINE:--engine; do
    name=${pair%%:*} flag=${pair#*:}
    if [ -n "${!name:-}" ]; then flags+=("$flag" "${!name}"); fi
  done
  if [ -n "${MEGATRON_FT_CHECK:-}" ]; then
    exec python -P "$PROGRAMS/launch/finetune.py" --check ${MEGATRON_FT_DRY_RUN:+--dry-run} \
      --num-processes "$MEGATRON_FT_CHECK" "${flags[@]}" "$@"
  fi
  exec python -P "$PROGRAMS/launch/finetune.py" "${flags[@]}" "$@"
}

# run PROGRAM ARGS...: run a program on the job's first node.
run() {
  if [ -n "${MEGATRON_FT_CHECK:-}" ]; then return 0; fi
  python -P "$PROGRAMS/$1" "${@:2}"
}
