#!/bin/bash
# Tokenize, train and convert as a chain of jobs, each of which starts when the previous one
# succeeded. Run it on a login node; it prints the job ids.
#   SHARDS=16 TOKENIZER_FILE=tokenizer.json OUTPUT_PREFIX=data/rows LOAD=checkpoints/base \
#     SAVE=runs/first OUTPUT=runs/first-hf \
#     bash slurm/pipeline.sh slurm/finetune_starcoderbase_1b.sh rows.jsonl -- [training flags]
# TRAIN_OPTIONS="--nodes=2" are options of sbatch for the training job, SBATCH_OPTIONS for the
# others.
OWN_SUBMISSION=1
script=$(realpath -- "$0")
# shellcheck source=launch/job.sh
source "${script%/slurm/*}/launch/job.sh"

training=${1:-}
[ -f "$training" ] || fail "training script not found: ${training:-(first argument)}: bash slurm/pipeline.sh slurm/finetune_starcoderbase_1b.sh rows.jsonl -- [flags]"
for name in TOKENIZER_FILE OUTPUT_PREFIX SAVE; do
  [ -n "${!name:-}" ] || fail "$name is missing: TOKENIZER_FILE=... OUTPUT_PREFIX=... SAVE=... bash slurm/pipeline.sh ..."
done
shift
rows=()
while [ "$#" != 0 ] && [ "$1" != -- ]; do
  rows+=("$1")
  shift
done
[ "$#" = 0 ] || shift # the --
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
read -ra options <<<"${SBATCH_OPTIONS:-}"
submit() { MEGATRON_FT_DATA_COMES=1 python -P "$PROGRAMS/launch/submit.py" --parsable --kill-on-invalid-dep=yes "$@"; }

# Check training before submitting anything, so that a wrong flag fails now, not after hours of
# tokenizing.
MEGATRON_FT_DRY_RUN=1 submit "${train_options[@]}" "$training" --data-prefix "$OUTPUT_PREFIX" --tokenizer-file "$TOKENIZER_FILE" --save "$SAVE" "$@" >/dev/null
printed=$(bash "$MEGATRON_FT/slurm/preprocess.sh" "${rows[@]}")
merge=${printed##*$'\n'}
echo "${printed%$'\n'*} $merge"
train=$(submit --dependency="afterok:$merge" "${train_options[@]}" "$training" --data-prefix "$OUTPUT_PREFIX" --tokenizer-file "$TOKENIZER_FILE" --save "$SAVE" "$@")
echo "train: job $train"
convert=$(submit --dependency="afterok:$train" "${options[@]}" "$MEGATRON_FT/slurm/convert.sh" "$SAVE" "${OUTPUT:-$SAVE-hf}")
echo "convert: job $convert"
