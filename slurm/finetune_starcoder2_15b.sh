#!/bin/bash
#SBATCH --job-name=finetune_starcoder2_15b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# StarCoder2-15B: four nodes of 8 GPUs, TP4 x data parallel 8.
#   DATA_PREFIX=data/commits TOKENIZER_FILE=tokenizer.json LOAD=checkpoints/base \
#     bash slurm/finetune_starcoder2_15b.sh [flags]
# or sbatch [options] slurm/finetune_starcoder2_15b.sh [flags]. Options of sbatch and flags of the
# training program override the ones below, and so do other flags for the same setting:
# --train-iters overrides --train-epochs, --lr-warmup-iters overrides --lr-warmup-fraction, and
# --fp16 overrides --bf16.
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p'); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/finetune_starcoder2_15b.sh*}}/launch/job.sh"

SAVE=${SAVE:-$SCRATCH/runs/starcoder2_15b}
finetune --preset starcoder2-15b --bf16 --tensor-model-parallel-size 4 --sequence-parallel \
  --micro-batch-size 1 --global-batch-size 128 --train-epochs 2 --lr 5e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-fraction 0.03 \
  --save-interval 250 --eval-interval 100 --log-interval 10 "$@"
