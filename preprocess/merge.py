"""Join tokenized parts, such as the shards of a job array, into one dataset.

    python preprocess/merge.py data/part-* --output-prefix data/rows

The result is byte for byte what a single run of tokenize.py writes. A part is named by its prefix
or any of its files. Parts are joined in the order given, or by number if their names differ only in
one number (a shell lists part-10 before part-2). Rejected rows (PREFIX_rejected.jsonl) are joined
too. The parts are not deleted.

PREFIX_made_from.json lets merge.py refuse parts of different tokenizers, and missing or duplicate
shards.
"""

import sys
from pathlib import Path

# The repository root instead of this directory, whose tokenize.py would shadow Python's own.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.indexed import MASK, IndexedWriter, commit, field_paths, learned_path, prefix_of
from megatron_ft.data.provenance import Provenance, join, path_of
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.printable import counted
from megatron_ft.progress import Progress


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART", help="--output-prefix of a tokenize.py run, or files of its output")
    add("--output-prefix", required=True, metavar="PREFIX", help="start of the output file names")
    args = parser.parse_args(argv)
    args.parts = [str(Path(part)) for part in args.parts]
    prefixes = [part for part in args.parts if part == prefix_of(part)]
    if len(set(prefixes)) < len(prefixes):
        raise UserError("a part is named twice; name each part once")
    args.parts = list(dict.fromkeys(map(prefix_of, args.parts)))
    if Path(args.output_prefix) in map(Path, args.parts):
        raise UserError(f"--output-prefix {args.output_prefix} is one of the parts; choose another prefix")
    return args


def main() -> None:
    args = parse_args()
    parts = in_order(args.parts)
    dtypes = field_dtypes(parts)
    made = join({part: Provenance.read(part) for part in parts})
    rejected = f"{args.output_prefix}_rejected.jsonl"
    with ExitStack() as stack:
        stack.enter_context(writing(args.output_prefix))
        fields = (*field_paths(args.output_prefix), learned_path(args.output_prefix))
        writers = [stack.enter_context(IndexedWriter(path, dtype)) for path, dtype in zip(fields, dtypes, strict=False)]
        progress = stack.enter_context(Progress("merge", len(parts), " parts"))
        for part in parts:
            for writer, path in zip(writers, (*field_paths(part), learned_path(part)), strict=False):
                writer.add_file(path)
            progress.update(1)
        num_rejected = join_rejected(parts, stack.enter_context(OutputFile(rejected)))
        if not num_rejected:
            Path(rejected).unlink(missing_ok=True)  # of an earlier run
        path_of(args.output_prefix).unlink(missing_ok=True)
        commit(writers, absent=fields[len(writers) :])
        if made:
            made.write(args.output_prefix)
    inputs, outputs = writers[:2]
    note = f"; rejected rows of {num_rejected} parts -> {rejected}" if num_rejected else ""
    print(
        f"{len(parts)} parts, {counted(inputs.num_sequences, 'row')}, {inputs.num_tokens:,} input tokens, "
        f"{outputs.num_tokens:,} output tokens -> {args.output_prefix}{note}"
    )


def in_order(parts: list[str]) -> list[str]:
    """The parts ordered by number if their names differ only in one number, else as given."""
    pieces = [re.split(r"(\d+)", part) for part in parts]  # the numbers are at odd indices
    differing = [i for i, column in enumerate(zip(*pieces, strict=False)) if len(set(column)) > 1]
    if len({len(p) for p in pieces}) > 1 or len(differing) != 1 or differing[0] % 2 == 0:
        return parts
    return sorted(parts, key=lambda part: int(re.split(r"(\d+)", part)[differing[0]]))


def field_dtypes(parts: list[str]) -> list[np.dtype]:
    """The dtypes of inputs, targets and, if the parts have them, marks of learned tokens.

    Raises UserError if a part is missing or damaged, or parts differ in the dtype of tokens or in
    having marks.
    """
    dtypes: dict[np.dtype, str] = {}
    with_marks: dict[bool, str] = {}
    for part in parts:
        documents = TokenizedDocuments(part)
        for field in (documents.inputs, documents.targets):
            dtypes[field.dtype] = field.path
        with_marks[documents.learned is not None] = part
    if len(dtypes) > 1:
        (a, first), (b, second), *_ = dtypes.items()
        raise UserError(
            f"{first}.idx holds {a} tokens but {second}.idx {b}; tokenize all parts with the same tokenizer"
        )
    if len(with_marks) > 1:
        raise UserError(
            f"{with_marks[True]} has conversations, with marks of the learned tokens, but {with_marks[False]} has other "
            "rows; merge parts of one kind, and mix the two in training, as two datasets with weights"
        )
    tokens = next(iter(dtypes))
    return [tokens, tokens, *(MASK.values() if True in with_marks else ())]


def join_rejected(parts: list[str], output: OutputFile) -> int:
    """Concatenate the rejected rows of all parts; returns the number of parts that have any."""
    files = [path for path in (Path(f"{part}_rejected.jsonl") for part in parts) if path.exists()]
    for path in files:
        with open(path, "rb") as file:
            shutil.copyfileobj(file, output, 1 << 20)
    if files:
        output.commit()
    return len(files)


if __name__ == "__main__":
    run_program(main)
