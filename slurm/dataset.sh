#!/bin/bash
#SBATCH --job-name=dataset
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=4G
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
# From local mirrors of repositories, or from commit rows, to tokens: a chain of jobs, each of which
# starts when the one before has succeeded. Run it on a login node; it prints the job ids.
#   REPOS=mirrors OUTPUT=data TOKENIZER_FILE=starcoder SHARDS=16 bash slurm/dataset.sh [flags of filter.py]
# REPOS has mirrors as OWNER/NAME.git. COMMITS="rows.jsonl ..." instead starts at rows of CommitPack's
# schema, such as those that scrape_github.py wrote on a login node. FORMAT is one of
# commits_to_jsonl.py. MIX=mix.yaml mixes the rows, its source `commits`, with other data by
# dataset/other/mix.py; without it they are shuffled. HUMANEVALPACK=DIR drops rows with its problems.
# SBATCH_OPTIONS="--partition=cpu" sets options of all jobs. In OUTPUT, each step has its own file; the
# last ones are rows_{inputs,targets}_document.{bin,idx}. Every step has a report in JSON.
OWN_SUBMISSION=1
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n1); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/dataset.sh*}}/launch/job.sh"

task=submit
case ${1:-} in
tables | select | scrape | signatures | gone | mix)
  # In the jobs the settings are the first arguments, so that --export=NONE keeps them.
  task=$1 OUTPUT=$2 SHARDS=$3
  shift 3
  ;;
esac
SHARDS=${SHARDS:-16}
# of_shards BEFORE AFTER: sets `files` to what all shards wrote, in order: BEFORE, I, AFTER.
of_shards() {
  local i
  files=()
  for ((i = 1; i <= SHARDS; i++)); do files+=("$OUTPUT/$1$i$2"); done
}
case $task in
tables)
  run dataset/commitpack/commits_table.py --repos "$1"/*/*.git --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" --output "$OUTPUT/tables"
  ;;
select)
  words=()
  for table in commits licenses languages; do
    of_shards "tables/$table-" "-of-$SHARDS.parquet"
    [ "$SHARDS" != 1 ] || files=("$OUTPUT/tables/$table.parquet")
    words+=("--$table" "${files[@]}")
  done
  run dataset/commitpack/select_commits.py --output "$OUTPUT/selected" "${words[@]}"
  ;;
scrape)
  run dataset/commitpack/scrape_github.py --input "$OUTPUT/selected/commits_table_final.parquet" --output "$OUTPUT/commits" \
    --base-url "file://$1/{repo}.git" --rate 1000
  ;;
signatures)
  run dataset/commitpackft/near_dedup.py --step signatures --input "$OUTPUT/filtered.jsonl" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" \
    --output "$OUTPUT/signatures/$SLURM_ARRAY_TASK_ID.parquet"
  ;;
gone)
  of_shards signatures/ .parquet
  run dataset/commitpackft/near_dedup.py --step join --input "$OUTPUT/filtered.jsonl" --signatures "${files[@]}" \
    --output "$OUTPUT/near_duplicates.jsonl"
  ;;
mix)
  if [ -n "${1:-}" ]; then
    run dataset/other/mix.py "$1" --source "commits=$OUTPUT/commit_rows.jsonl" --output "$OUTPUT/rows.jsonl"
  else
    run dataset/dedup_shuffle.py "$OUTPUT/commit_rows.jsonl" --output "$OUTPUT/rows.jsonl"
  fi
  ;;
submit)
  for name in OUTPUT TOKENIZER_FILE; do
    [ -n "${!name:-}" ] || fail "$name is missing: REPOS=mirrors OUTPUT=data TOKENIZER_FILE=starcoder bash slurm/dataset.sh"
  done
  [ -e "$TOKENIZER_FILE" ] || fail "TOKENIZER_FILE=$TOKENIZER_FILE does not exist"
  [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || fail "SHARDS=$SHARDS: expected a positive integer, like 16"
  [ -z "${MIX:-}" ] || [ -f "$MIX" ] || fail "MIX=$MIX does not exist; expected the specification of dataset/other/mix.py"
  mkdir -p "$OUTPUT"
  OUTPUT=$(realpath -- "$OUTPUT")
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  after=()
  # job NAME ARGUMENTS...: submit a step that waits for the one before; ARRAY=1-N for an array.
  job() {
    local array=()
    if [ -n "${ARRAY:-}" ]; then array=(--array="$ARRAY" --output=%x-%A_%a.log); fi
    AFTER=$(sbatch --parsable --job-name="$1" "${options[@]}" "${array[@]}" "${after[@]}" "$script" "$1" "$OUTPUT" "$SHARDS" "${@:2}")
    AFTER=${AFTER%%;*}
    echo "$1: job $AFTER"
    after=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes)
  }
  # shards SCRIPT ARGUMENTS...: submit rows.sh or preprocess.sh, whose last line is a job to wait for.
  shards() {
    local printed
    printed=$(AFTER=$AFTER SHARDS=$SHARDS bash "$MEGATRON_FT/slurm/$1" "${@:2}")
    AFTER=${printed##*$'\n'}
    echo "${printed%$'\n'*} $AFTER"
    after=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes)
  }
  AFTER=
  if [ -n "${COMMITS:-}" ]; then
    read -ra commits <<<"$COMMITS"
    for file in "${commits[@]}"; do [ -e "$file" ] || fail "COMMITS: $file does not exist"; done
  else
    compgen -G "${REPOS:-}/*/*.git" >/dev/null || fail "REPOS=${REPOS:-}: no OWNER/NAME.git found; expected a directory of mirrors, or COMMITS=rows.jsonl"
    REPOS=$(realpath -- "$REPOS")
    ARRAY=1-$SHARDS job tables "$REPOS"
    job select
    job scrape "$REPOS"
    commits=("$OUTPUT/commits")
  fi
  filter=(--licenses permissive)
  if [ -n "${HUMANEVALPACK:-}" ]; then filter+=(--decontaminate "$(realpath -- "$HUMANEVALPACK")"); fi
  shards rows.sh dataset/commitpackft/filter.py --input "${commits[@]}" --output "$OUTPUT/filtered.jsonl" --tokenizer-file "$TOKENIZER_FILE" "${filter[@]}" "$@"
  ARRAY=1-$SHARDS job signatures
  job gone
  shards rows.sh dataset/commitpackft/near_dedup.py --step apply --input "$OUTPUT/filtered.jsonl" --removed "$OUTPUT/near_duplicates.jsonl" --output "$OUTPUT/distinct.jsonl"
  shards rows.sh dataset/commits_to_jsonl.py --input "$OUTPUT/distinct.jsonl" --output "$OUTPUT/commit_rows.jsonl" --format "${FORMAT:-starcoder}"
  job mix "${MIX:-}"
  export TOKENIZER_FILE OUTPUT_PREFIX=$OUTPUT/rows
  shards preprocess.sh "$OUTPUT/rows.jsonl"
  ;;
esac
