#!/bin/bash
#SBATCH --job-name=rows
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.log
# Run a row program of dataset/ as a job array over shards of its input, and join the parts into the
# file that a single run would write, with one report.
#   SHARDS=64 bash slurm/rows.sh dataset/commitpackft/filter.py --input rows.jsonl --output kept.jsonl [flags]
# It submits the missing shards and a job that joins them; after a failed task, the same command
# submits only what is missing. A part that another command made, or from other input, is missing,
# too. AFTER=JOBID waits for a job that writes the input: then all shards are submitted, and each
# looks for its part when it starts. SBATCH_OPTIONS="--time=08:00:00" sets options of both jobs. The
# last line printed is the id of the job that joins.
OWN_SUBMISSION=1
script=$(realpath -- "$0")
if [ -n "${SLURM_JOB_ID:-}" ]; then script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n1); fi # SLURM runs a copy
# shellcheck source=launch/job.sh
source "${MEGATRON_FT:-${script%%/slurm/rows.sh*}}/launch/job.sh"

# In the jobs the setting is among the first arguments, so that --export=NONE keeps it.
if [ "${1:-}" = shard ] || [ "${1:-}" = join ]; then
  task=$1 SHARDS=$2
  shift 2
fi
SHARDS=${SHARDS:-16}
program=${1:-}
case ${task:-submit} in
shard)
  run dataset/row_shards.py run "$SLURM_ARRAY_TASK_ID/$SHARDS" "$PROGRAMS/$program" "${@:2}"
  ;;
join)
  run dataset/row_shards.py join "$SHARDS" "$PROGRAMS/$program" "${@:2}"
  ;;
submit)
  [ -n "$program" ] || fail "program is missing: bash slurm/rows.sh dataset/commitpackft/filter.py --input rows.jsonl --output kept.jsonl"
  [ -f "$PROGRAMS/$program" ] || fail "$program: not found in $PROGRAMS; expected a path like dataset/commitpackft/filter.py"
  [[ $SHARDS =~ ^[1-9][0-9]*$ ]] || fail "SHARDS=$SHARDS: expected a positive integer, like 16"
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  found=$(run dataset/row_shards.py missing "$SHARDS" "$PROGRAMS/$program" "${@:2}")
  missing=()
  while IFS=$'\t' read -r shard _; do
    if [ -n "$shard" ]; then missing+=("$shard"); fi
  done <<<"$found"
  shards=$(IFS=, && echo "${missing[*]}")
  after=()
  if [ -n "${AFTER:-}" ]; then
    shards=1-$SHARDS
    after=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes)
  fi
  name=$(basename -- "$program" .py)
  if [ -n "$shards" ]; then
    array=$(sbatch --parsable --job-name="$name" "${options[@]}" "${after[@]}" --array="$shards" "$script" shard "$SHARDS" "$@")
    echo "$name: job ${array%%;*}, shards $shards of $SHARDS"
    after=(--dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes)
  fi
  join=$(sbatch --parsable --job-name="$name-join" "${options[@]}" "${after[@]}" --output=%x-%j.log "$script" join "$SHARDS" "$@")
  echo "join: job"
  echo "${join%%;*}"
  ;;
esac
