"""Tokenize JSONL rows of inputs and outputs into Megatron's .bin/.idx files, both fields in one pass.

    python preprocess/tokenize.py rows.jsonl --tokenizer-file tokenizer.json --output-prefix data/rows

writes data/rows_inputs_document.{bin,idx} and data/rows_targets_document.{bin,idx}, the outputs with an end-of-text token. What is
written does not depend on --workers; data/rows_made_from.json says from what, for merge.py and training. Inputs may be several files, .gz, .zst, directories, or - for standard input.

A job array takes one shard each; preprocess/merge.py then makes of them, byte for byte, what one run would have written:

    python preprocess/tokenize.py rows.jsonl --tokenizer-file tokenizer.json --shard $I/8 --output-prefix data/part-$I
    python preprocess/merge.py data/part-{1..8} --output-prefix data/rows
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from megatron_ft.config.flags import Help, Parser
from megatron_ft.data.indexed import IndexedWriter, commit, field_paths
from megatron_ft.data.provenance import MadeFrom, inputs_of, path_of
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import BadRow, Block, open_sources, parse_row, parse_shard, read_blocks, shard_bytes
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress
from megatron_ft.tokenizer.files import vocabulary_digest
from megatron_ft.tokenizer.tokenizer import Tokenizer, load_tokenizer

MEMORY = 512 << 20  # bytes that blocks on their way may take, as `memory_of` reckons; one block may exceed it
REMEDY = "mend the row, name other keys (--input-key, --output-key), or go on without such rows (--skip-bad-rows)"
SAMPLE_ROWS = 64  # rows of the data encoded both ways before the fast encoder is trusted with them


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "input",
        nargs="*",
        metavar="INPUT",
        help="JSONL file (.gz, .zst), directory of such files, or - for standard input",
    )
    add("--input", dest="more_input", nargs="+", default=[], metavar="INPUT", help="the same, as a flag")
    add(
        "--tokenizer-file",
        required=True,
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, or Hugging Face directory",
    )
    add(
        "--output-prefix", required=True, metavar="PREFIX", help="PREFIX_inputs_document.bin and the others are written"
    )
    add("--input-key", default="inputs", help="key of the text the model reads")
    add("--output-key", help="key of the text it learns to write; 'outputs', or else 'targets', when not given")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every output with an end-of-text token",
    )
    add(
        "--literal-special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="special tokens that the data mean as plain text, such as '<|endoftext|>' in somebody's source; others are parsed",
    )
    add("--skip-bad-rows", action="store_true", help="write bad rows to PREFIX_rejected.jsonl and go on")
    add(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="take the I-th of N parts of the input, I from 1, divided by bytes",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that encode")
    args = parser.parse_args(argv)
    args.shard = parse_shard(args.shard)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # the tokenizers library's threads
    rejected = Path(f"{args.output_prefix}_rejected.jsonl")
    sources = open_sources([*args.input, *args.more_input], [rejected])
    tokenizer = load_tokenizer(args.tokenizer_file, args.literal_special_tokens)
    keys = [[args.input_key], [args.output_key] if args.output_key else ["outputs", "targets"]]
    encoder = RowEncoder(tokenizer, keys, args.append_eod)
    totals = Totals()
    with ExitStack() as stack:
        stack.enter_context(writing(args.output_prefix))
        writers = [stack.enter_context(IndexedWriter(path, encoder.dtype)) for path in field_paths(args.output_prefix)]
        rejects = stack.enter_context(OutputFile(rejected)) if args.skip_bad_rows else None
        progress = stack.enter_context(Progress("tokenize", shard_bytes(sources, args.shard), "B"))
        blocks = read_blocks(sources, args.shard)
        for block, encoded in encode_in_order(encoder, blocks, args.workers):
            for i, reason in encoded.bad:
                if rejects is None:
                    raise block.error(i, reason, REMEDY)
                rejects.write(rejected_row(block, i, reason))
            for writer, data, sizes in zip(writers, encoded.data, encoded.sizes, strict=True):
                writer.add_many(data, sizes)
            totals.add(encoded)
            progress.update(block.consumed, f"{totals.tokens / progress.seconds:,.0f} tokens/s")
        if not writers[0].num_sequences and args.shard[1] == 1:
            bad = (
                f"all {totals.bad.total()} rows are bad, the first because: {next(iter(totals.bad))}"
                if totals.bad
                else "no row"
            )
            raise UserError(
                f"{sources[0].name}: {bad}; expected one JSON object with {keys[0][0]!r} and {' or '.join(map(repr, keys[1]))} a line"
            )
        if rejects is not None and totals.bad:
            rejects.commit()
        else:
            rejected.unlink(missing_ok=True)  # an earlier run's
        path_of(args.output_prefix).unlink(missing_ok=True)
        commit(writers)
        MadeFrom(
            tokenizer.path.name, vocabulary_digest(tokenizer.path), args.append_eod, tuple(sorted(args.literal_special_tokens)), args.shard,
            inputs_of(sources),
        ).write(args.output_prefix)  # fmt: skip
    summarise(args, tokenizer, writers, totals, rejected)


@dataclass
class Encoded:
    """What became of one block: for each field the tokens' bytes and each row's size; bad lines with their reasons; special tokens met;
    outputs that ended with an end-of-text token before one was appended."""

    data: list[bytes]
    sizes: list[np.ndarray]
    bad: list[tuple[int, str]]
    specials: np.ndarray  # int64 [special tokens], how often each was spelled out
    ended: int


@dataclass
class Totals:
    """Sums over all blocks."""

    bad: Counter = field(default_factory=Counter)
    specials: np.ndarray | int = 0
    tokens: int = 0
    ended: int = 0

    def add(self, encoded: Encoded) -> None:
        self.bad.update(reason for _, reason in encoded.bad)
        self.specials = self.specials + encoded.specials
        self.ended += encoded.ended
        self.tokens += sum(int(sizes.sum()) for sizes in encoded.sizes)


class RowEncoder:
    """Encodes blocks of lines; one object serves all threads."""

    def __init__(self, tokenizer: Tokenizer, keys: list[list[str]], append_eod: bool):
        self.tokenizer, self.keys = tokenizer, keys
        self.dtype = tokenizer.dtype
        eod = np.array([tokenizer.eod], self.dtype).tobytes() if append_eod else b""
        self.endings = [b"", eod]
        self.special_ids = np.array(list(tokenizer.special_ids.values()), np.int64)

    def trust(self, block: Block) -> None:
        """Compare the fast encoder with the reference on the first rows of the data; `tokenizer.notice` tells of a difference."""
        self.tokenizer.encode("")
        rows = []
        for _, line in islice(block.rows(), SAMPLE_ROWS):
            try:
                rows += parse_row(line, self.keys) if line is not None and len(line) < 1 << 18 else []
            except BadRow:
                pass
        self.tokenizer.check_sample(rows)

    def encode(self, block: Block) -> Encoded:
        """Tokens of every good row of a block. Rows are parsed and dropped one by one, as a row may be 64 MiB."""
        data, sizes, bad, ended = ([], []), ([], []), [], 0
        for i, line in block.rows():
            try:
                texts = parse_row(line, self.keys)
                encoded = [self.tokenizer.encode_batch([texts.pop(0)])[0] for _ in self.keys]
                if empty := [names[0] for names, ids in zip(self.keys, encoded, strict=True) if not len(ids)]:
                    raise BadRow(f"{empty[0]!r} has no tokens")
            except BadRow as reason:
                bad.append((i, str(reason)))
                continue
            for ids, ending, pieces, lengths in zip(encoded, self.endings, data, sizes, strict=True):
                pieces += [ids.data, ending]
                ended += bool(ending) and bool(ids[-1] == self.tokenizer.eod)
                lengths.append(len(ids) + len(ending) // self.dtype.itemsize)
        joined = [b"".join(pieces) for pieces in data]
        specials = sum(self._count_specials(tokens) for tokens in joined)
        specials[self.special_ids == self.tokenizer._eod] -= len(sizes[1]) if self.endings[1] else 0
        return Encoded(joined, [np.array(s, np.int32) for s in sizes], bad, specials, ended)

    def _count_specials(self, tokens: bytes) -> np.ndarray:
        """int64 [special tokens], how often each occurs."""
        counts = np.zeros(len(self.special_ids), np.int64)
        ids = np.frombuffer(tokens, self.dtype)
        for start in range(0, len(ids), 1 << 20):
            counts += np.bincount(ids[start : start + (1 << 20)], minlength=self.tokenizer.vocab_size)[self.special_ids]
        return counts


def encode_in_order(encoder: RowEncoder, blocks: Iterator[Block], workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Encode blocks by `workers` threads (the encoders run outside Python's lock) and give them in the order they came.

    No more than MEMORY, or one block, is held at a time.
    """
    pending: deque[tuple[Block, Future]] = deque()
    in_flight = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for number, block in enumerate(blocks):
            if number == 0:
                encoder.trust(block)
                if encoder.tokenizer.notice:
                    print(encoder.tokenizer.notice, file=sys.stderr)
            while pending and (in_flight + memory_of(block) > MEMORY or len(pending) > 4 * workers):
                first, future = pending.popleft()
                in_flight -= memory_of(first)
                yield first, future.result()
            pending.append((block, pool.submit(encoder.encode, block)))
            in_flight += memory_of(block)
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def memory_of(block: Block) -> int:
    """Bytes a block takes while it is encoded: its lines, their tokens, and one row parsed (text of up to 4 bytes a character, twice)."""
    return 2 * block.num_bytes + 8 * max((len(line) for line in block.lines if line), default=0)


def rejected_row(block: Block, i: int, reason: str) -> bytes:
    """The line of PREFIX_rejected.jsonl for lines[i]: where it stood, what is wrong, and the line as it was (bytes that are not UTF-8 as U+FFFD)."""
    line = block.lines[i]
    row = {
        "file": block.source.name,
        "line": block.line_number(i),
        "reason": reason,
        "row": None if line is None else line.decode("utf-8", "replace"),
    }
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"


def summarise(args, tokenizer: Tokenizer, writers: list[IndexedWriter], totals: Totals, rejected: Path) -> None:
    """Say what was written, what was left out and why, and which special tokens the data spelled out."""
    inputs, outputs = writers
    print(
        f"{inputs.num_sequences:,} rows: {inputs.num_tokens:,} input tokens, {outputs.num_tokens:,} output tokens"
        f"{' with end-of-text' if args.append_eod else ''}, {inputs.dtype} -> {args.output_prefix}_{{inputs,targets}}_document.{{bin,idx}}"
    )
    if totals.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in totals.bad.most_common())
        print(f"{totals.bad.total():,} bad rows left out -> {rejected}: {reasons}")
    met = {token: int(n) for token, n in zip(tokenizer.special_ids, np.atleast_1d(totals.specials), strict=False) if n}
    if met:
        print(
            "special tokens spelled out in the data, and parsed: "
            + ", ".join(f"{token} {n:,}" for token, n in sorted(met.items(), key=lambda item: -item[1]))
        )
    if totals.ended:
        print(
            f"{totals.ended:,} outputs ended with an end-of-text token already and have two now; take it off the rows"
            + (", or give --no-append-eod" if totals.ended == outputs.num_sequences else "")
        )


if __name__ == "__main__":
    run_program(main)
