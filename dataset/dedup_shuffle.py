"""Take exact duplicates out of JSONL rows and shuffle the rest, in memory that does not grow with the data: `sort -u | shuf`, seeded.

    python dataset/dedup_shuffle.py rows.jsonl more.jsonl.gz --output shuffled.jsonl --seed 7

Rows are duplicates when both their inputs and their outputs are the same, whatever other keys say; the first one is kept, its line
unchanged. The order is that of a hash of seed and both texts: random, and the same however the input was ordered or divided into files.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b

from megatron_ft.config.flags import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import BadRow, open_sources, parse_row, read_blocks, shard_bytes
from megatron_ft.files.output import STANDARD_OUTPUT, OutputFile, scratch_directory, writing
from megatron_ft.progress import Progress

RECORD = struct.Struct("<16sI")  # of a spilled row: its key, the length of the line after it
REMEDY = "mend the row, name other keys (--input-key, --output-key), or leave such rows out (--skip-bad-rows)"
ROW_OVERHEAD = 200  # bytes a row in memory takes besides its line: key, object headers, its place in the table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "input",
        nargs="+",
        metavar="INPUT",
        help="JSONL file (.gz, .zst), directory of such files, or - for standard input",
    )
    add("--output", required=True, metavar="FILE", help="JSONL file to write; - for standard output")
    add("--seed", type=int, default=1234, help="seed of the order")
    add("--input-key", default="inputs", help="key of the text the model reads")
    add("--output-key", help="key of the text it learns to write; 'outputs', or else 'targets', when not given")
    add("--skip-bad-rows", action="store_true", help="leave bad rows out, and count them")
    add("--memory", type=int, default=512, metavar="MIB", help="rows held in memory at a time")
    add(
        "--temporary-directory",
        type=Path,
        metavar="DIR",
        help="where rows are spilled, as large as the data; beside the output when not given",
    )
    args = parser.parse_args(argv)
    if args.memory < 1:
        raise UserError(f"--memory {args.memory}: must be at least 1 MiB")
    return args


def main() -> None:
    args = parse_args()
    sources = open_sources(args.input, [args.output])
    keys = [[args.input_key], [args.output_key] if args.output_key else ["outputs", "targets"]]
    place = args.temporary_directory or (
        Path(tempfile.gettempdir()) if args.output in STANDARD_OUTPUT else Path(args.output).parent
    )
    with ExitStack() as stack:
        output = stack.enter_context(OutputFile(args.output))
        stack.enter_context(writing(args.temporary_directory or args.output))
        spill = stack.enter_context(scratch_directory(place, ".dedup"))
        buckets = Buckets(spill, depth=0)
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
                    buckets.add(key_of(texts, args.seed), line)
                    rows += 1
                progress.update(block.consumed)
        if not rows:
            raise UserError(f"{sources[0].name}: no good row; expected one JSON object a line")
        kept = 0
        with Progress("write", rows, " rows") as progress:
            for line in buckets.in_order(args.memory << 20, progress):
                output.write(line + b"\n")
                kept += 1
        output.commit()
    print(
        f"{rows:,} rows, {rows - kept:,} of them duplicates, {kept:,} -> {args.output}"
        + (f"; {bad:,} bad rows left out" if bad else ""),
        file=sys.stderr,
    )


def key_of(texts: list[str], seed: int) -> bytes:
    """16 bytes that are the same for the same texts under one seed, and in no order otherwise."""
    digest = blake2b(f"{seed} {len(texts[0])} ".encode(), digest_size=RECORD.size - 4)
    for text in texts:
        digest.update(text.encode())
    return digest.digest()


class Buckets:
    """Rows on disk, in 256 files by one byte of their keys: the first at depth 0, the next one deeper, ..."""

    def __init__(self, directory: Path, depth: int):
        self.directory, self.depth = directory, depth
        directory.mkdir(exist_ok=True)
        self._files = [open(directory / f"{byte:02x}", "w+b", buffering=1 << 15) for byte in range(256)]

    def add(self, key: bytes, line: bytes) -> None:
        """Append a row to its file."""
        file = self._files[key[self.depth]]
        file.write(RECORD.pack(key, len(line)))
        file.write(line)

    def in_order(self, memory: int, progress: Progress) -> Iterator[bytes]:
        """The first line of each key, by key; a file whose rows take more than `memory` bytes is divided again. Files are removed as read."""
        for byte, file in enumerate(self._files):
            path = self.directory / f"{byte:02x}"
            first: dict[bytes, bytes] = {}
            size = count = 0
            deeper = None
            for key, line in records(file):
                count += 1
                if deeper is not None:
                    deeper.add(key, line)
                elif key not in first:
                    first[key] = line
                    size += len(line) + ROW_OVERHEAD
                    if size > memory and len(first) > 1:
                        deeper = Buckets(path.with_suffix(".divided"), self.depth + 1)
                        for item in first.items():
                            deeper.add(*item)
                        first.clear()
            file.close()
            path.unlink()
            if deeper is not None:
                yield from deeper.in_order(memory, progress)
            for key in sorted(first):
                yield first[key]
            progress.update(count if deeper is None else 0)


def records(file) -> Iterator[tuple[bytes, bytes]]:
    """Keys and lines of a spilled file, in the order they were written."""
    file.seek(0)
    while head := file.read(RECORD.size):
        key, length = RECORD.unpack(head)
        yield key, file.read(length)


if __name__ == "__main__":
    run_program(main)
