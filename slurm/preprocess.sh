#!/bin/bash
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.log
# Tokenize JSONL in shards, one array task per shard, and merge them into the same bytes that a
# single run would write.
#   SHARDS=16 TOKENIZER_FILE=tokenizer.json OUTPUT_PREFIX=data/rows \
#     bash slurm/preprocess.sh rows.jsonl [more.jsonl ...] [flags of preprocess/tokenize.py]
# It submits the missing shards and a merge that waits for them; after a failed task, the same
# command submits only what is missing. A shard that was made by another command (other rows, another
# tokenizer or other flags) is missing, too. AFTER=JOBID waits for a job that writes the rows, and then
# tokenizes all shards. SBATCH_OPTIONS="--cpus-per-task=32" sets options of both jobs. The last line
# printed is the job id of the merge.
OWN_SUBMISSION=1
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n1); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/preprocess.sh*}}/launch/job.sh"

# In the jobs the three settings are the first arguments, so that --export=NONE keeps them.
if [ "${1:-}" = shard ] || [ "${1:-}" = merge ]; then
  task=$1 SHARDS=$2 TOKENIZER_FILE=$3 OUTPUT_PREFIX=$4
  shift 4
fi
SHARDS=${SHARDS:-16}
part() { echo "$OUTPUT_PREFIX-shard-$1-of-$SHARDS"; } # as shard_prefix in megatron_ft/data/shards.py
# One line per shard that this command has to make: its number, a tab and the reason.
missing_shards() {
  run preprocess/tokenize.py "$@" --tokenizer-file "$TOKENIZER_FILE" --output-prefix "$OUTPUT_PREFIX" --missing-shards "$SHARDS"
}
case ${task:-submit} in
shard)
  run preprocess/tokenize.py "$@" --tokenizer-file "$TOKENIZER_FILE" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" \
    --output-prefix "$(part "$SLURM_ARRAY_TASK_ID")" --workers "${SLURM_CPUS_PER_TASK:-1}"
  ;;
merge)
  missing=$(missing_shards "$@")
  if [ -n "$missing" ]; then
    first=${missing%%$'\n'*}
    fail "shard ${first%%$'\t'*} of $SHARDS cannot be merged: ${first#*$'\t'}; run the command that submitted this merge again"
  fi
  parts=()
  for ((shard = 1; shard <= SHARDS; shard++)); do parts+=("$(part "$shard")"); done
  run preprocess/merge.py "${parts[@]}" --output-prefix "$OUTPUT_PREFIX"
  ;;
submit)
  [ -n "${TOKENIZER_FILE:-}" ] || fail "TOKENIZER_FILE is missing: TOKENIZER_FILE=tokenizer.json bash slurm/preprocess.sh ..."
  [ -e "$TOKENIZER_FILE" ] || fail "TOKENIZER_FILE=$TOKENIZER_FILE does not exist"
  [ -n "${OUTPUT_PREFIX:-}" ] || fail "OUTPUT_PREFIX is missing: OUTPUT_PREFIX=data/rows bash slurm/preprocess.sh ..."
  [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || fail "SHARDS=$SHARDS: expected a positive integer, like 16"
  [ "$#" != 0 ] || fail "no input file: bash slurm/preprocess.sh rows.jsonl"
  mkdir -p "$(dirname -- "$OUTPUT_PREFIX")"
  after=()
  if [ -n "${AFTER:-}" ]; then
    shards=1-$SHARDS
    after=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes)
  else
    for word in "$@"; do
      [[ $word == -* ]] && break
      [ -e "$word" ] || fail "$word does not exist"
    done
    found=$(missing_shards "$@")
    missing=()
    while IFS=$'\t' read -r shard reason; do
      [ -n "$shard" ] || continue
      missing+=("$shard")
      [ ! -e "$(part "$shard")_inputs_document.idx" ] || echo "shard $shard is tokenized again: $reason" >&2
    done <<<"$found"
    shards=$(IFS=, && echo "${missing[*]}")
  fi
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  settings=("$SHARDS" "$TOKENIZER_FILE" "$OUTPUT_PREFIX")
  if [ -n "$shards" ]; then
    array=$(sbatch --parsable "${options[@]}" "${after[@]}" --array="$shards" "$script" shard "${settings[@]}" "$@")
    echo "tokenize: job ${array%%;*}, shards $shards of $SHARDS"
    after=(--dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes)
  fi
  merge=$(sbatch --parsable "${options[@]}" "${after[@]}" --output=%x-merge-%j.log "$script" merge "${settings[@]}" "$@")
  echo "merge: job"
  echo "${merge%%;*}"
  ;;
esac
