# shellcheck shell=bash
# What all of slurm/*.sh share, sourced by them on a login node and inside the job alike. Reads slurm/cluster.env, puts the venv first on PATH,
# and defines `finetune` and `run`. On a login node a script checks itself and goes to sbatch: see launch/submit.py.
set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
trap '' USR1 USR2 # a warning that comes before the launcher listens must not kill the script; the launcher sets handlers of its own
MEGATRON_FT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export MEGATRON_FT
CLUSTER_ENV=${CLUSTER_ENV:-$MEGATRON_FT/slurm/cluster.env}
if [ ! -f "$CLUSTER_ENV" ]; then
  echo "error: $CLUSTER_ENV is not there: cp '$MEGATRON_FT/slurm/cluster.env.example' '$MEGATRON_FT/slurm/cluster.env', and fill it in" >&2
  exit 2
fi
set -a
# shellcheck source=slurm/cluster.env.example
source "$CLUSTER_ENV"
set +a
VENV=${VENV:-$MEGATRON_FT/.venv}
if [ ! -x "$VENV/bin/python" ]; then
  echo "error: VENV=$VENV of $CLUSTER_ENV holds no bin/python on $(hostname): make venv there, or correct the line" >&2
  exit 2
fi
export PATH="$VENV/bin:$PATH"
MEGATRON_FT_ARGUMENTS=$(printf '%q ' "$@")
export MEGATRON_FT_ARGUMENTS
if [ "$#" = 0 ]; then MEGATRON_FT_ARGUMENTS=""; fi

# On a login node: hand the script in, with everything checked first. submit.py itself runs the script with MEGATRON_FT_CHECK set.
# A script that sets OWN_SUBMISSION submits itself, in several jobs.
if [ -z "${SLURM_JOB_ID:-}${MEGATRON_FT_CHECK:-}${OWN_SUBMISSION:-}" ]; then
  exec python -P "$MEGATRON_FT/launch/submit.py" "$(realpath -- "$0")" "$@"
fi

# finetune FLAGS...: train, resumed from --save where it holds a checkpoint. Variables give what is usual; flags, later, win.
finetune() {
  local flags=() pair name flag
  for pair in DATA_PREFIX:--data-prefix TRAIN_SPLITS:--train-weighted-split-paths-path VALID_SPLITS:--valid-weighted-split-paths-path \
    TEST_SPLITS:--test-weighted-split-paths-path TOKENIZER_FILE:--tokenizer-file LOAD:--load SAVE:--save ENGINE:--engine; do
    name=${pair%%:*} flag=${pair#*:}
    if [ -n "${!name:-}" ]; then flags+=("$flag" "${!name}"); fi
  done
  if [ -n "${MEGATRON_FT_CHECK:-}" ]; then
    exec python -P "$MEGATRON_FT/launch/finetune.py" --check --num-processes "$MEGATRON_FT_CHECK" "${flags[@]}" "$@"
  fi
  exec python -P "$MEGATRON_FT/launch/finetune.py" "${flags[@]}" "$@"
}

# run PROGRAM ARGS...: one program of this checkout, on the job's first node.
run() {
  if [ -n "${MEGATRON_FT_CHECK:-}" ]; then return 0; fi
  python -P "$MEGATRON_FT/$1" "${@:2}"
}
