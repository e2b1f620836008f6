#!/bin/bash
#SBATCH --job-name=finetune_octocoder
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# OctoCoder: LoRA on StarCoder by transformers and PEFT, one node, sharded across 8 GPUs.
#   DATA_PREFIX=data/oasst-commits TOKENIZER_FILE=starcoder LOAD=starcoder \
#     bash slurm/finetune_octocoder.sh [flags]
# or sbatch [options] slurm/finetune_octocoder.sh [flags]. LOAD is a Hugging Face directory. Options of
# sbatch and flags of the training program override the ones below: --train-epochs 1 overrides
# --train-iters. The numbers are the published run's: 35 steps of 32 packed sequences of 2048 tokens,
# 2.2 million tokens, loss on all of them.
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p'); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/finetune_octocoder.sh*}}/launch/job.sh"

SAVE=${SAVE:-$SCRATCH/runs/octocoder}
finetune --engine transformers --bf16 --recompute-granularity full \
  --lora-rank 16 --lora-alpha 32 --lora-dropout 0.05 --lora-targets c_proj,c_attn,c_fc \
  --seq-length 2048 --micro-batch-size 1 --global-batch-size 32 --train-iters 35 --no-loss-on-targets-only \
  --lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0.05 --adam-beta2 0.999 \
  --save-interval 5 --eval-interval 5 --log-interval 1 "$@"
