#!/bin/bash
#SBATCH --job-name=validate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Loss of a checkpoint on the complete validation groups; trains nothing and saves no checkpoint.
#   LOAD=runs/first SAVE=runs/first-validation PRESET=starcoderbase-1b DATA_PREFIX=data/rows \
#     TOKENIZER_FILE=tokenizer.json bash slurm/validate.sh [flags]
# For a larger model add --tensor-model-parallel-size 4 --sequence-parallel. The results are in the
# log and in SAVE/validation.jsonl.
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n1); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/validate.sh*}}/launch/job.sh"

SAVE=${SAVE:-$SCRATCH/runs/validation}
finetune --preset "${PRESET:-starcoderbase-1b}" --bf16 --micro-batch-size 1 --skip-train --eval-iters full "$@"
