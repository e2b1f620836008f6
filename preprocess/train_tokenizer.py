"""Train a byte-level BPE tokenizer like StarCoder's on JSONL rows.

    python preprocess/train_tokenizer.py --input rows.jsonl --vocab-size 2048 --output t.json

For demonstrations and for languages StarCoder was not trained on; to fine-tune a published model,
use that model's tokenizer. Pre-tokenization is StarCoder's (single digits, then byte level). Its
19 special tokens come first, in its order, so <|endoftext|> is 0. Special tokens spelled out in
the rows are left out of the training text.
"""

import sys
from pathlib import Path

# The repository root instead of this directory, whose tokenize.py would shadow Python's own.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import Source, open_sources, read_blocks, shard_bytes
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress

# StarCoder's, in the order of their ids.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>",
    "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>",
    "<commit_msg>", "<commit_after>", "<reponame>",
]  # fmt: skip
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSONL files (also .gz, .zst), directories of them, or - for stdin",
    )
    add("--output", required=True, metavar="FILE", help="tokenizer.json to write")
    add(
        "--vocab-size",
        type=int,
        default=49152,
        metavar="N",
        help=f"number of token ids, including {len(SPECIAL_TOKENS)} special tokens and 256 bytes",
    )
    add(
        "--keys",
        nargs="+",
        default=["inputs", "outputs"],
        metavar="KEY",
        help="keys of the texts to train on; 'outputs' also accepts 'targets'",
    )
    args = parser.parse_args(argv)
    if not MIN_VOCAB_SIZE <= args.vocab_size < 1 << 31:
        raise UserError(
            f"--vocab-size {args.vocab_size}: must be at least {MIN_VOCAB_SIZE}, the number of bytes and special tokens, "
            "and below 2^31"
        )
    return args


def main() -> None:
    args = parse_args()
    sources = open_sources(args.input, [args.output])
    with default_signal_handlers():
        tokenizer = train(texts_of(sources, args.keys), args.vocab_size)
    with OutputFile(args.output) as output, writing(args.output):
        output.write(tokenizer.to_str().encode())
        output.commit()
    size = tokenizer.get_vocab_size()
    fewer = f" (the rows yield fewer than the requested {args.vocab_size})" if size < args.vocab_size else ""
    print(f"tokenizer of {size} ids{fewer} -> {args.output}", file=sys.stderr)


@contextmanager
def default_signal_handlers() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once.

    Python runs its handlers only after the library's call returns, which takes as long as the
    training. No output is open meanwhile, so there is nothing to clean up.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def texts_of(sources: list[Source], keys: list[str]) -> Iterator[str]:
    """The texts of all rows, split at the special tokens they spell out.

    Raises UserError for a bad row, or if there are no rows.
    """
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    names = [["outputs", "targets"] if key == "outputs" else [key] for key in keys]
    rows = 0
    with Progress("read rows", shard_bytes(sources), "B") as progress:
        for block in read_blocks(sources):
            for i, line in block.rows():
                try:
                    texts = parse_row(line, names)
                except BadRow as reason:
                    raise block.error(i, reason, "fix the row, or name other --keys") from reason
                rows += 1
                for text in texts:
                    yield from filter(None, special.split(text))
            progress.update(block.consumed)
    if not rows:
        raise UserError(f"{sources[0].name}: no rows; expected one JSON object per line")


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer; equal texts give equal tokenizers, whatever the number of threads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    run_program(main)
