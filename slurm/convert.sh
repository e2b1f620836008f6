#!/bin/bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
# Convert a run's newest checkpoint to a Hugging Face directory and verify every tensor.
#   bash slurm/convert.sh runs/first runs/first-hf [flags of convert/megatron_to_hf.py]
# The directories can also be given as the variables SAVE and OUTPUT. Needs no GPU.
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n1); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/convert.sh*}}/launch/job.sh"

if [[ ${1:--} != -* ]]; then
  SAVE=$1
  shift
fi
if [[ ${1:--} != -* ]]; then
  OUTPUT=$1
  shift
fi
[ -n "${SAVE:-}" ] || fail "the run's directory is missing: bash slurm/convert.sh runs/first runs/first-hf"
[ -d "$SAVE" ] || [ -n "${MEGATRON_FT_DATA_COMES:-}" ] || fail "SAVE=$SAVE is not a directory; expected the --save directory of a run"
OUTPUT=${OUTPUT:-$SAVE-hf}
run convert/megatron_to_hf.py --load "$SAVE" --output "$OUTPUT" "$@"
run convert/verify.py "$SAVE" "$OUTPUT" --allow-rounding # with --dtype bf16 the output is rounded on purpose
