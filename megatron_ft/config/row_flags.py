"""The flags that programs from rows to rows have in common; slurm/rows.sh gives each task of a job
array --shard and --output."""

import argparse

from megatron_ft.config.parser import Parser
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import parse_shard


def add_row_flags(parser: Parser, input_help: str) -> None:
    """Add --input FILE..., --output FILE, --shard and --skip-bad-rows."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help=input_help)
    add(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write: JSONL, .gz and .zst compressed, or .parquet; - for stdout",
    )
    add_shard_flag(parser, "only the I-th of N parts of the input")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")


def add_shard_flag(parser: Parser, help: str) -> None:
    """Add --shard I/N, whose value is the pair (I, N)."""
    parser.add_argument("--shard", type=_shard, default="1/1", metavar="I/N", help=help)


def _shard(text: str) -> tuple[int, int]:
    try:
        return parse_shard(text)
    except UserError as error:  # a ValueError, of which argparse would not show the message
        raise argparse.ArgumentTypeError(str(error).removeprefix("--shard ")) from None
