"""The flags of preprocess/tokenize.py, their checks, and the keys of a row that they name."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config.parser import Help, Parser
from megatron_ft.conversations.learned_spans import ANSWERS, TRAIN_ON
from megatron_ft.data.provenance import MAX_SHARDS
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import parse_shard

INPUT_KEY = "inputs"
FIM_SPM_RATE = 0.5


def tokenize_parser(description: str | None = None) -> Parser:
    """The parser of the program that `description` describes."""
    parser = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("input", nargs="*", metavar="INPUT", help="JSONL file (also .gz, .zst), directory of them, or - for stdin")
    add("--input", dest="more_input", nargs="+", metavar="INPUT", help="INPUT as a flag")
    add(
        "--tokenizer-file",
        required=True,
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, or Hugging Face directory",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="start of the output file names: PREFIX_inputs_document.bin, ...",
    )
    add("--input-key", default=INPUT_KEY, metavar="KEY", help="key of the text the model reads")
    add("--output-key", metavar="KEY", help="key of the text it learns to write (default: outputs, else targets)")
    add("--messages-key", metavar="KEY", help="rows are conversations: a list of {role, content} under KEY")
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template of the conversations (default: that of --tokenizer-file, a directory)",
    )
    add(
        "--train-on",
        choices=TRAIN_ON,
        default=ANSWERS,
        help="what is learned of a conversation: " + ", ".join(f"{name}: {what}" for name, what in TRAIN_ON.items()),
    )
    add("--text-key", metavar="KEY", help="rows are plain texts, all of which is learned: a string under KEY")
    add(
        "--fim-rate",
        type=float,
        default=0.0,
        metavar="RATE",
        help="fraction of plain texts that are rearranged for fill-in-the-middle",
    )
    add(
        "--fim-spm-rate",
        type=float,
        default=FIM_SPM_RATE,
        metavar="RATE",
        help="fraction of these in the order suffix, prefix, middle; the others are prefix, suffix, middle",
    )
    add("--seed", type=int, default=1234, help="seed of --fim-rate: with the text, it determines the cuts")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        help="append an end-of-text token to every output (default: yes, except to conversations, which the "
        "template ends)",
    )
    add(
        "--literal-special-tokens",
        nargs="+",
        metavar="TOKEN",
        help="special tokens to encode as plain text where the data spell them out, such as '<|endoftext|>' in "
        "source code about tokenizers (default: none, all become special tokens)",
    )
    add("--skip-bad-rows", action="store_true", help="write bad rows to PREFIX_rejected.jsonl instead of stopping")
    add(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="tokenize only the I-th of N parts of the input, split by bytes; I starts at 1",
    )
    add(
        "--missing-shards",
        type=int,
        metavar="N",
        help="tokenize nothing; of the shards PREFIX-shard-I-of-N list those that do not exist or were made by another "
        "command, each with the reason",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="encoder threads")
    return parser


def parse_tokenize(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse and check a command line, sys.argv's by default. Raises UserError."""
    args = tokenize_parser(description).parse_args(argv)
    args.input += args.more_input or []
    args.literal_special_tokens = args.literal_special_tokens or []
    args.shard = parse_shard(args.shard)
    check_kind_of_rows(args)
    if args.append_eod is None:
        args.append_eod = args.messages_key is None
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if args.missing_shards is not None and not 1 <= args.missing_shards <= MAX_SHARDS:
        raise UserError(f"--missing-shards {args.missing_shards}: expected 1 to {MAX_SHARDS}")
    return args


def check_kind_of_rows(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are for another kind of rows."""
    if args.messages_key and args.text_key:
        raise UserError("--messages-key and --text-key: rows are either conversations or plain texts; give one of them")
    if (args.chat_template or args.train_on != ANSWERS) and not args.messages_key:
        flag = "--chat-template" if args.chat_template else "--train-on"
        raise UserError(f"{flag} is for conversations; add --messages-key messages, or leave it out")
    if args.append_eod and args.messages_key:
        raise UserError("--append-eod: the chat template ends a conversation; give another --chat-template FILE")
    for flag, rate in (("--fim-rate", args.fim_rate), ("--fim-spm-rate", args.fim_spm_rate)):
        if not 0 <= rate <= 1:
            raise UserError(f"{flag} {rate:g}: expected a fraction from 0 to 1")
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed {args.seed}: expected 0 to {(1 << 63) - 1}")
    if args.fim_rate and not args.text_key:
        raise UserError("--fim-rate is for plain texts; add --text-key text, or leave it out")
    if args.fim_spm_rate != FIM_SPM_RATE and not args.fim_rate:
        raise UserError("--fim-spm-rate has no effect without --fim-rate; add --fim-rate 0.5, or leave it out")
    if (args.messages_key or args.text_key) and (args.output_key or args.input_key != INPUT_KEY):
        flag = "--output-key" if args.output_key else "--input-key"
        raise UserError(
            f"{flag} is for rows of inputs and outputs; leave it out, or leave out --messages-key and --text-key"
        )


def keys_of(args: argparse.Namespace) -> list[list[str]]:
    """For each text of a row, the names that its key may have."""
    if one := args.messages_key or args.text_key:
        return [[one]]
    return [[args.input_key], [args.output_key] if args.output_key else ["outputs", "targets"]]
