"""List the problems of HumanEvalPack that training rows hold.

    python evaluation/run/contamination.py commits.jsonl chats.jsonl --data humanevalpack
    python evaluation/run/contamination.py commits.jsonl --data humanevalpack --json hits.json

A score on problems that a model was trained on measures nothing. All texts of a row are searched,
be it a commit or inputs and outputs, also in parquet; megatron_ft/commits/contamination.py has the
rules. The table has a line per task: how many rows hold it, and the file and line of the first one.
Standard output gets the table, --json a file with all of it.

The exit status is 1 if a row holds a problem, so that a script can stop there.
dataset/commitpackft/filter.py --decontaminate drops such rows.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ft.commits.contamination import ProblemIndex, in_order
from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_shard_flag
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.contaminated import score_table, scores_without
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.scores import load_evaluation
from megatron_ft.files.jsonl import Block, Source, shard_bytes
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.files.tables import Row, open_tables, read_table
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress

PROBLEMS_VARIABLE = "HUMANEVALPACK"
EXIT_FOUND = 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROWS", help="JSONL (also .gz, .zst) or parquet files, directories, - for stdin")
    add(
        "--data",
        default=os.environ.get(PROBLEMS_VARIABLE),
        metavar="DIR",
        help=f"directory with HumanEvalPack's LANG.jsonl (default: ${PROBLEMS_VARIABLE})",
    )
    add("--fields", nargs="+", metavar="KEY", help="keys of the texts to search (default: every text of a row)")
    add("--json", metavar="FILE", help="also write the result as JSON")
    add("--results", type=Path, metavar="DIR", help="scored evaluation: its scores with and without the problems held")
    add("--mode", choices=MODES, default="faithful", help="mode of score.py, with --results")
    add_shard_flag(parser, "search only the I-th of N parts of the rows")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    args = parser.parse_args(argv)
    if args.data is None:
        raise UserError(
            f"no problems: give --data DIR, or set {PROBLEMS_VARIABLE}, to the directory of HumanEvalPack's python.jsonl"
        )
    if args.results and args.shard != (1, 1):
        raise UserError("--results needs all rows: not with --shard")
    return args


def main() -> int:
    args = parse_args()
    sources = open_tables(args.rows, [args.json] if args.json else [])
    evaluation = load_evaluation(args.results, Path(args.data), args.mode) if args.results else None
    if evaluation:
        scores_without(evaluation, set())  # fails now, not after hours of searching, if there is no score
    index = ProblemIndex.load(args.data)
    bad: Counter[str] = Counter()
    rows = hit = 0
    tasks: dict[str, dict[str, Any]] = {}
    for row in read_rows(args, sources, bad):
        rows += 1
        found = index.task_ids(texts_of(row, args.fields))
        hit += bool(found)
        for task in found:
            tasks.setdefault(task, {"rows": 0, "first": where(row)})["rows"] += 1
    tasks = {task: tasks[task] for task in in_order(tasks)}
    for line in table(tasks):
        print(line)
    scores = scores_without(evaluation, set(tasks)) if evaluation else []
    if scores:
        print("\n" + score_table(scores))
    skipped = f"; {counted(bad.total(), 'bad row')} skipped" if bad else ""
    print(
        f"{counted(rows, 'row')}, {hit:,} of them hold {len(tasks):,} of {counted(index.problems, 'problem')}{skipped}",
        file=sys.stderr,
    )
    if args.json:
        result: dict[str, Any] = {"rows": rows, "rows_with_problems": hit, "problems": index.problems, "tasks": tasks}
        if evaluation:
            result["scores"] = scores
        with OutputFile(args.json) as output, writing(args.json):
            output.write(json.dumps({**result, "bad_rows": dict(bad)}, ensure_ascii=False, indent=2).encode() + b"\n")
            output.commit()
    return EXIT_FOUND if hit else 0


def read_rows(args: argparse.Namespace, sources: list[Source], bad: Counter[str]) -> Iterator[Row]:
    with Progress("contamination", shard_bytes(sources, args.shard), "B") as progress:
        for chunk in read_table(sources, args.shard, bad if args.skip_bad_rows else None):
            yield from chunk.rows
            progress.update(chunk.consumed)


def texts_of(row: Row, fields: Sequence[str] | None) -> list[str]:
    """The texts of a row, also those in lists and objects, such as the messages of a chat.

    Raises UserError if it has none: its problems would be overlooked.
    """
    if fields is not None and (missing := [name for name in fields if name not in row.fields]):
        raise row.error(f"no key {missing[0]!r} to search")
    pending: list[Any] = list(row.fields.values()) if fields is None else [row.fields[name] for name in fields]
    texts = []
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    if not texts:
        raise row.error("no text to search; expected a commit, or inputs and outputs")
    return texts


def where(row: Row) -> str:
    """The file and line, or row, of a row."""
    origin, index = row.where
    if isinstance(origin, Block):
        return f"{origin.source.name}, line {origin.line_number(index)}"
    return f"{origin.name}, row {index}"


def table(tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of a table, aligned; none without tasks."""
    if tasks:
        width = max(len("task"), *map(len, tasks))
        yield f"{'task':{width}} {'rows':>8}  first"
    for task, found in tasks.items():
        yield printable(f"{task:{width}} {found['rows']:>8,}  {found['first']}")


if __name__ == "__main__":
    run_program(main)
