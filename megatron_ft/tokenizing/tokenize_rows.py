"""Tokenize JSONL rows into Megatron's .bin/.idx files: the work of preprocess/tokenize.py."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ft.conversations.chat_template import ChatTemplate
from megatron_ft.data.indexed import IndexedWriter, commit, field_paths, learned_path
from megatron_ft.data.provenance import TRAIN_ON_FLAG, Provenance, inputs_of, path_of
from megatron_ft.data.shards import missing_shards
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import Block, Source, open_sources, read_blocks, shard_bytes
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress
from megatron_ft.tokenizer.consumer import difference_to_transformers
from megatron_ft.tokenizer.files import vocabulary_digest
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.tokenizing.conversation_encoder import ConversationEncoder
from megatron_ft.tokenizing.flags import keys_of
from megatron_ft.tokenizing.in_order import BlockEncoder, encode_in_order
from megatron_ft.tokenizing.row_encoder import Encoded, RowEncoder
from megatron_ft.tokenizing.text_encoder import FillInTheMiddle, TextEncoder

REMEDY = (
    "fix the row, name other keys (--input-key, --output-key; --messages-key or --text-key for rows of one key), "
    "or skip such rows (--skip-bad-rows)"
)
REMEDY_OF_DIFFERENCE = (
    "the token files have the ids of its tokenizer.json, which models are pretrained with, "
    "and convert/megatron_to_hf.py writes a tokenizer that transformers loads as it is"
)


@dataclass(frozen=True)
class Tokenized:
    """What was written: `rows` rows under the prefix, of `input_tokens` and `output_tokens` tokens.

    `learned_tokens`: those of conversations that are learned, None for other rows. `bad_rows`: how
    many rows were skipped, by reason; they are in `rejected`, None where there is none.
    """

    prefix: str
    rows: int
    input_tokens: int
    output_tokens: int
    learned_tokens: int | None
    bad_rows: dict[str, int]
    rejected: Path | None


def tokenize_rows(args: argparse.Namespace) -> Tokenized:
    """Write the tokens of all rows of the shard; `args` are those of `parse_tokenize`.

    Raises UserError.
    """
    rejected = Path(f"{args.output_prefix}_rejected.jsonl")
    sources = open_sources(args.input, [rejected])
    template = template_of(args)
    tokenizer = load_tokenizer(args.tokenizer_file, args.literal_special_tokens)
    print_notices(args, tokenizer, template)
    encoder = encoder_of(args, tokenizer, template)
    totals = Totals(special_counts=np.zeros_like(encoder.special_ids))
    with ExitStack() as stack:
        stack.enter_context(writing(args.output_prefix))
        fields = (*field_paths(args.output_prefix), learned_path(args.output_prefix))
        writers = [
            stack.enter_context(IndexedWriter(path, dtype)) for path, dtype in zip(fields, encoder.dtypes, strict=False)
        ]
        rejects = stack.enter_context(OutputFile(rejected)) if args.skip_bad_rows else None
        write_tokens(args, sources, encoder, writers, rejects, totals)
        if not writers[0].num_sequences and args.shard[1] == 1:
            raise UserError(nothing_written(sources, keys_of(args), totals))
        if rejects is not None and totals.bad:
            rejects.commit()
        else:
            rejected.unlink(missing_ok=True)  # of an earlier run
        path_of(args.output_prefix).unlink(missing_ok=True)
        commit(writers, absent=fields[len(writers) :])
        provenance(args, tokenizer.path, sources, template).write(args.output_prefix)
    print_summary(args, tokenizer, writers, totals, rejected)
    return Tokenized(
        prefix=args.output_prefix,
        rows=writers[0].num_sequences,
        input_tokens=writers[0].num_tokens,
        output_tokens=writers[1].num_tokens,
        learned_tokens=totals.learned if len(writers) > 2 else None,
        bad_rows=dict(totals.bad),
        rejected=rejected if totals.bad else None,
    )


def list_missing_shards(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Number and reason of each of --missing-shards that does not exist or is another command's."""
    sources = open_sources(args.input, [Path(f"{args.output_prefix}_rejected.jsonl")])
    expected = provenance(args, Path(args.tokenizer_file), sources, template_of(args))
    return list(missing_shards(args.output_prefix, args.missing_shards, expected))


def template_of(args: argparse.Namespace) -> ChatTemplate | None:
    """The chat template of conversations, None for other rows."""
    return ChatTemplate(Path(args.tokenizer_file), args.chat_template) if args.messages_key else None


def encoder_of(args: argparse.Namespace, tokenizer: Tokenizer, template: ChatTemplate | None) -> BlockEncoder:
    """The encoder of this kind of rows."""
    if template:
        return ConversationEncoder(tokenizer, template, args.messages_key, args.train_on)
    if args.text_key:
        rates = (args.fim_rate, args.fim_spm_rate)
        fim = FillInTheMiddle.of(tokenizer, *rates, args.seed) if args.fim_rate else None
        return TextEncoder(tokenizer, args.text_key, args.append_eod, fim)
    return RowEncoder(tokenizer, keys_of(args), args.append_eod)


def provenance(
    args: argparse.Namespace, tokenizer: Path, sources: Sequence[Source], template: ChatTemplate | None
) -> Provenance:
    """What this command makes its output from."""
    flags = {}
    if template:
        flags = {TRAIN_ON_FLAG: args.train_on, "--chat-template": template.digest}
    elif args.fim_rate:
        flags = {f"--{flag}": str(vars(args)[flag.replace("-", "_")]) for flag in ("fim-rate", "fim-spm-rate", "seed")}
    return Provenance(
        tokenizer=tokenizer.name,
        sha256=vocabulary_digest(Path(args.tokenizer_file)),
        append_eod=args.append_eod,
        literal_special_tokens=tuple(sorted(args.literal_special_tokens)),
        shard=args.shard,
        inputs=inputs_of(sources),
        keys=tuple(map(tuple, keys_of(args))),
        flags=flags,
    )


def print_notices(args: argparse.Namespace, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """Print what users of the model should know about its tokenizer: its two ends, if it has two,
    and whether transformers encodes in another way. Raises UserError if their sizes differ, or a
    literal token is one of the chat template."""
    if template and (written := [token for token in args.literal_special_tokens if template.writes(token)]):
        raise UserError(f"--literal-special-tokens {written[0]}: the chat template writes this token; leave it out")
    if template and template.dated:
        print("warning: the chat template writes the current date; shards of different days differ", file=sys.stderr)
    if args.append_eod and tokenizer.end_notice:
        print(printable(tokenizer.end_notice), file=sys.stderr)
    if Path(args.tokenizer_file).is_dir():
        complete = load_tokenizer(args.tokenizer_file) if args.literal_special_tokens else tokenizer
        if difference := difference_to_transformers(args.tokenizer_file, complete):
            print(printable(f"warning: {difference}; {REMEDY_OF_DIFFERENCE}"), file=sys.stderr)


@dataclass
class Totals:
    """Sums over all blocks."""

    special_counts: np.ndarray  # int64 [special tokens]
    bad: Counter[str] = field(default_factory=Counter)  # rows by reason
    tokens: int = 0
    learned: int = 0  # marked tokens of conversations
    ended: int = 0
    stops: int = 0

    def add(self, encoded: Encoded) -> None:
        self.bad.update(reason for _, reason in encoded.bad)
        self.special_counts = self.special_counts + encoded.special_counts
        self.ended += encoded.ended
        self.stops += encoded.stops
        self.tokens += sum(int(sizes.sum()) for sizes in encoded.sizes[:2])
        self.learned += sum(marks.count(b"\x01") for marks in encoded.data[2:])


def write_tokens(
    args: argparse.Namespace,
    sources: Sequence[Source],
    encoder: BlockEncoder,
    writers: Sequence[IndexedWriter],
    rejects: OutputFile | None,
    totals: Totals,
) -> None:
    """Encode all rows of the shard into `writers`, one per field.

    Bad rows go to `rejects`; without it the first one is a UserError.
    """
    with Progress("tokenize", shard_bytes(sources, args.shard), "B") as progress:
        for block, encoded in encode_in_order(encoder, read_blocks(sources, args.shard), args.workers):
            for i, reason in encoded.bad:
                if rejects is None:
                    raise block.error(i, BadRow(reason), REMEDY)
                rejects.write(rejected_row(block, i, reason))
            for writer, data, sizes in zip(writers, encoded.data, encoded.sizes, strict=True):
                writer.add_many(data, sizes)
            totals.add(encoded)
            progress.update(block.consumed, f"{totals.tokens / progress.seconds:,.0f} tokens/s")


def rejected_row(block: Block, i: int, reason: str) -> bytes:
    """The line of PREFIX_rejected.jsonl for lines[i] of a block: its origin, the reason, its text.

    Bytes that are not UTF-8 become U+FFFD; a line over the length limit becomes null.
    """
    line = block.lines[i]
    row = {
        "file": block.source.name,
        "line": block.line_number(i),
        "reason": reason,
        "row": None if line is None else line.removesuffix(b"\n").decode("utf-8", "replace"),
    }
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"


def nothing_written(sources: Sequence[Source], keys: Sequence[Sequence[str]], totals: Totals) -> str:
    """The error message where no row could be tokenized."""
    found = "no rows"
    if totals.bad:
        found = f"all {totals.bad.total():,} rows are bad, the first because: {next(iter(totals.bad))}"
    names = " and ".join(" or ".join(map(repr, names)) for names in keys)
    expected = f"the key {names}" if len(keys) == 1 else f"the keys {names}"
    return f"{sources[0].name}: {found}; expected one JSON object per line, with {expected}"


def print_summary(
    args: argparse.Namespace, tokenizer: Tokenizer, writers: Sequence[IndexedWriter], totals: Totals, rejected: Path
) -> None:
    """Print what was written, which rows were skipped and why, and special tokens in the data."""
    inputs, outputs, *marks = writers
    of_these = f", {totals.learned:,} of these learned" if marks else ""
    print(
        f"{counted(inputs.num_sequences, 'row')}: {inputs.num_tokens:,} input tokens, {outputs.num_tokens:,} output tokens"
        f"{' including end-of-text' if args.append_eod else ''}{of_these}, {inputs.dtype} -> "
        f"{args.output_prefix}_{{inputs,targets{',learned' if marks else ''}}}_document.{{bin,idx}}"
    )
    if marks and inputs.num_sequences and not totals.stops:
        ends = " or ".join(map(tokenizer.token_of, tokenizer.stop_ids)) or "an end-of-text token"
        print(
            printable(f"warning: no learned token is {ends}, so models would not learn to stop; end answers with it"),
            file=sys.stderr,
        )
    if totals.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in totals.bad.most_common())
        print(f"{counted(totals.bad.total(), 'bad row')} skipped -> {rejected}: {reasons}")
    counts = {token: int(n) for token, n in zip(tokenizer.special_ids, totals.special_counts, strict=True) if n}
    if counts:
        print(
            "special tokens spelled out in the data and parsed: "
            + ", ".join(f"{token} {n:,}" for token, n in sorted(counts.items(), key=lambda item: -item[1]))
        )
    if totals.ended:
        print(
            f"{totals.ended:,} outputs already ended with an end-of-text token and now have two; remove it from the rows"
            + (" or give --no-append-eod" if totals.ended == outputs.num_sequences else "")
        )
