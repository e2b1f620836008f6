"""Remove exact duplicates from JSONL rows and shuffle the rest: a seeded `sort -u | shuf`.

    python dataset/dedup_shuffle.py rows.jsonl more.jsonl.gz --output shuffled.jsonl --seed 7

Two rows are duplicates if both their inputs and their outputs are equal, whatever their other keys;
the first one is kept and its line is not changed. The order is that of a hash of the seed and both
texts: random, but independent of the order of the input and of how it is split into files. Memory
is bounded by --memory, whatever the size of the data; rows are spilled to disk.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.hash_order import Buckets, key_of
from megatron_ft.files.jsonl import Source, open_sources, read_blocks, shard_bytes
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.files.output import STANDARD_OUTPUT, OutputFile, scratch_directory, writing
from megatron_ft.printable import counted
from megatron_ft.progress import Progress

REMEDY = "fix the row, name other keys (--input-key, --output-key), or skip such rows (--skip-bad-rows)"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("input", nargs="+", metavar="INPUT", help="JSONL file (also .gz, .zst), directory of them, or - for stdin")
    add("--output", required=True, metavar="FILE", help="JSONL file to write, .gz and .zst compressed; - for stdout")
    add("--seed", type=int, default=1234, help="seed of the order")
    add("--input-key", default="inputs", metavar="KEY", help="key of the text the model reads")
    add("--output-key", metavar="KEY", help="key of the text it learns to write (default: outputs, else targets)")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    add("--memory", type=int, default=512, metavar="MIB", help="memory for rows, in MiB")
    add(
        "--temporary-directory",
        type=Path,
        metavar="DIR",
        help="where rows are spilled, as many bytes as the uncompressed data (default: directory of the output)",
    )
    args = parser.parse_args(argv)
    if args.memory < 1:
        raise UserError(f"--memory {args.memory}: must be at least 1 MiB")
    return args


def main() -> None:
    args = parse_args()
    sources = open_sources(args.input, [args.output])
    spill_parent = args.temporary_directory or (
        Path(tempfile.gettempdir()) if args.output in STANDARD_OUTPUT else Path(args.output).parent
    )
    with ExitStack() as stack:
        output = stack.enter_context(OutputFile(args.output))
        stack.enter_context(writing(args.temporary_directory or args.output))
        buckets = Buckets(stack.enter_context(scratch_directory(spill_parent, ".dedup")), depth=0)
        rows, bad = spill(sources, args, buckets)
        if not rows:
            raise UserError(f"{sources[0].name}: no usable row; expected one JSON object per line")
        kept = 0
        with Progress("write", rows, " rows") as progress:
            for line in buckets.in_order(args.memory << 20, progress):
                output.write(line)
                kept += 1
        output.commit()
    note = f"; {counted(bad, 'bad row')} skipped" if bad else ""
    print(
        f"{counted(rows, 'row')}, {rows - kept:,} of them duplicates, {kept:,} -> {args.output}{note}", file=sys.stderr
    )


def spill(sources: list[Source], args: argparse.Namespace, buckets: Buckets) -> tuple[int, int]:
    """Add all rows to `buckets`; returns their number and the number of bad rows skipped."""
    keys = [[args.input_key], [args.output_key] if args.output_key else ["outputs", "targets"]]
    rows = bad = 0
    with Progress("read", shard_bytes(sources), "B") as progress:
        for block in read_blocks(sources):
            for i, line in block.rows():
                try:
                    texts = parse_row(line, keys)
                except BadRow as reason:
                    if not args.skip_bad_rows:
                        raise block.error(i, reason, REMEDY) from reason
                    bad += 1
                    continue
                assert line is not None  # parse_row rejects it
                buckets.add(key_of(texts, args.seed), line)
                rows += 1
            progress.update(block.consumed)
    return rows, bad


if __name__ == "__main__":
    run_program(main)
