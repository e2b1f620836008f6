"""Join tokenized parts, such as the shards of a job array, into one data set: byte for byte what a single run would have written.

    python preprocess/merge.py data/part-* --output-prefix data/rows

A part is named by its prefix, or by any of its files. Parts are joined in the order given; where their names differ in one number only, in
the order of that number. Parts of another tokenizer, and shards that are missing or named twice, are refused, as far as PREFIX_made_from.json
tells. Rejected rows (PREFIX_rejected.jsonl) are joined too. Nothing is removed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_ft.config.flags import Help, Parser
from megatron_ft.data.indexed import IndexedReader, IndexedWriter, commit, field_paths, prefix_of
from megatron_ft.data.provenance import Provenance, join, path_of
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "parts",
        nargs="+",
        metavar="PREFIX",
        help="parts: what tokenize.py was given by --output-prefix, or their files",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="prefix of the whole")
    args = parser.parse_args(argv)
    args.parts = [str(Path(part)) for part in args.parts]
    prefixes = [part for part in args.parts if part == prefix_of(part)]
    if len(set(prefixes)) < len(prefixes):
        raise UserError("a part is named twice; name each once")
    args.parts = list(dict.fromkeys(map(prefix_of, args.parts)))
    if Path(args.output_prefix) in map(Path, args.parts):
        raise UserError(f"--output-prefix {args.output_prefix} is one of the parts; choose another name")
    return args


def main() -> None:
    args = parse_args()
    parts = in_order(args.parts)
    dtype = check(parts)
    made = join({part: Provenance.read(part) for part in parts})
    rejected = f"{args.output_prefix}_rejected.jsonl"
    with ExitStack() as stack:
        stack.enter_context(writing(args.output_prefix))
        writers = [stack.enter_context(IndexedWriter(path, dtype)) for path in field_paths(args.output_prefix)]
        progress = stack.enter_context(Progress("merge", len(parts), " parts"))
        for part in parts:
            for writer, path in zip(writers, field_paths(part), strict=True):
                writer.add_file(path)
            progress.update(1)
        num_rejected = join_rejected(parts, stack.enter_context(OutputFile(rejected)))
        if not num_rejected:
            Path(rejected).unlink(missing_ok=True)  # an earlier run's
        path_of(args.output_prefix).unlink(missing_ok=True)
        commit(writers)
        if made:
            made.write(args.output_prefix)
    inputs, outputs = writers
    print(
        f"{len(parts)} parts, {inputs.num_sequences:,} rows, {inputs.num_tokens:,} input tokens, {outputs.num_tokens:,} output tokens "
        f"-> {args.output_prefix}" + (f"; rejected rows of {num_rejected} parts -> {rejected}" if num_rejected else "")
    )


def in_order(parts: list[str]) -> list[str]:
    """The parts as given, or by number where one number is all their names differ in."""
    pieces = [re.split(r"(\d+)", part) for part in parts]
    differing = [i for i, column in enumerate(zip(*pieces, strict=False)) if len(set(column)) > 1]
    if len({len(p) for p in pieces}) > 1 or len(differing) != 1 or differing[0] % 2 == 0:
        return parts
    return sorted(parts, key=lambda part: int(re.split(r"(\d+)", part)[differing[0]]))


def check(parts: list[str]):
    """The dtype that all parts share; UserError where one is missing, damaged, of another dtype, or its fields are not of one length."""
    dtypes = {}
    for part in parts:
        inputs, outputs = (IndexedReader(path) for path in field_paths(part))
        if len(inputs) != len(outputs):
            raise UserError(f"{part}: {len(inputs)} inputs but {len(outputs)} outputs; tokenize this part again")
        for field in (inputs, outputs):
            dtypes[field.dtype] = field.path
    if len(dtypes) > 1:
        (a, first), (b, second), *_ = dtypes.items()
        raise UserError(f"{first}.idx holds {a} tokens, {second}.idx {b}; tokenize all parts with the same tokenizer")
    return next(iter(dtypes))


def join_rejected(parts: list[str], output: OutputFile) -> int:
    """Write the rejected rows of all parts one after another; returns how many parts had any."""
    files = [path for path in (Path(f"{part}_rejected.jsonl") for part in parts) if path.exists()]
    for path in files:
        with open(path, "rb") as file:
            shutil.copyfileobj(file, output, 1 << 20)
    if files:
        output.commit()
    return len(files)


if __name__ == "__main__":
    run_program(main)
