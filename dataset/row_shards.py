"""Run a row program in shards, and join the parts into what a single run would write.

    FILTER="dataset/commitpackft/filter.py --input rows.jsonl --output kept.jsonl"
    python dataset/row_shards.py run 3/16 $FILTER
    python dataset/row_shards.py missing 16 $FILTER
    python dataset/row_shards.py join 16 $FILTER

`run` gives the program --shard I/N and its part of --output (kept-shard-3-of-16.jsonl), unless that
part exists already. `missing` prints the shards that have not run, or ran with other arguments or
input files. `join` writes the output and its report from all parts and removes them. All take the
same command; slurm/rows.sh submits them as a job array.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import subprocess
from collections.abc import Sequence

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import parse_shard
from megatron_ft.files.output import STANDARD_OUTPUT, writing
from megatron_ft.files.row_shards import command_stamp, join, missing_parts, part_path, stamp_path, write_stamp
from megatron_ft.printable import printable

MAX_SHARDS = 100_000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False, reads_config=False)
    add = parser.add_argument
    add("action", choices=("run", "missing", "join"), help="see above")
    add("shards", metavar="I/N|N", help="shard I of N to run, or the number of shards")
    add("program", type=Path, help="row program with --shard and --output, such as dataset/commitpackft/filter.py")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, without --shard")
    args = parser.parse_args(argv)
    if not args.program.is_file():
        raise UserError(f"{args.program}: program not found; give a path such as dataset/commitpackft/filter.py")
    args.index, args.count = parse_shard(args.shards) if args.action == "run" else (0, count_of(args.shards))
    args.output = output_of(args.arguments)
    return args


def count_of(text: str) -> int:
    """The number of shards; UserError unless it is one."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_SHARDS:
        raise UserError(f"shards {text}: expected a number from 1 to {MAX_SHARDS}")
    return int(text)


def output_of(arguments: Sequence[str]) -> Path:
    """The value of --output among a program's arguments."""
    if any(word == "--shard" or word.startswith("--shard=") for word in arguments):
        raise UserError("--shard: is set for each shard; leave it out")
    given = [word.removeprefix("--output=") for word in arguments if word.startswith("--output=")]
    given += [after for word, after in zip(arguments, arguments[1:], strict=False) if word == "--output"]
    if len(given) != 1 or given[0] in STANDARD_OUTPUT:
        raise UserError("--output FILE: expected once among the program's arguments, and not standard output")
    return Path(given[0])


def main() -> int | None:
    args = parse_args()
    stamp = command_stamp(args.program, args.arguments, args.output)
    if args.action == "run":
        return run(args, stamp)
    missing = list(missing_parts(args.output, args.count, stamp))
    if args.action == "missing":
        for index, reason in missing:
            print(f"{index}\t{printable(reason)}")
        return None
    if missing:
        index, reason = missing[0]
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"shard {index} of {args.count} cannot be joined: {reason}{others}; run the missing shards again"
        )
    joined = join(args.output, args.count, stamp)
    print(
        printable(f"{args.count} parts -> {args.output}" if joined else f"{args.output}: exists, nothing to do"),
        file=sys.stderr,
    )
    return None


def run(args: argparse.Namespace, stamp: str) -> int:
    """Run one shard, unless its part exists; returns the program's exit status."""
    part = part_path(args.output, args.index, args.count)
    if args.index not in dict(missing_parts(args.output, args.count, stamp)):
        print(printable(f"{part}: exists, nothing to do"), file=sys.stderr)
        return 0
    with writing(part):
        stamp_path(part).unlink(missing_ok=True)  # of another command, whose part is about to be replaced
    words = [f"--output={part}" if word.startswith("--output=") else word for word in args.arguments]
    for i, word in enumerate(words):
        if word == "--output":
            words[i + 1] = str(part)
    status = subprocess.run(
        [sys.executable, str(args.program), *words, "--shard", f"{args.index}/{args.count}"]
    ).returncode
    if status == 0:
        write_stamp(part, stamp)
    return status


if __name__ == "__main__":
    run_program(main)
