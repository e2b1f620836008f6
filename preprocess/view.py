"""Inspect a tokenized dataset as a model is trained on it: packed sequences, loss, statistics.

    python preprocess/view.py data/rows --tokenizer-file MODEL --sequences 0:2 --load MODEL
    python preprocess/view.py data/rows --tokenizer-file MODEL --html sequences.html
    python preprocess/view.py data/rows --stats --global-batch-size 32 128 --plot lengths.png

Sequences are those of a training run with the same flags and seed: give --load or --preset for its
sequence length, and --validation-fraction for what it holds out of --data-prefix (0.05 by default).
Nothing is written next to the data.
"""

import sys
from pathlib import Path

# The repository root instead of this directory, whose tokenize.py would shadow Python's own.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.indexed import prefix_of
from megatron_ft.data.lengths import length_plot, packing_report
from megatron_ft.data.packed_dataset import PackedDocuments, PackedSample, check_vocabulary
from megatron_ft.data.packing import Packing, pack
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.data.sequence_page import DecodedDocument, DecodedSequence, Span, html_page, title_of
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.model.families import PRESETS
from megatron_ft.printable import counted, printable
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.weights.stored_shape import stored_shape

# A document's colors on a terminal, of the 256: context as text, loss as background. Documents of a
# sequence take them in turn.
COLORS = [(75, 24), (114, 22), (179, 94), (176, 53), (174, 88)]
PLOT_FORMATS = (".png", ".pdf", ".svg")
DEFAULT_SEQ_LENGTH = 2048
LONGEST_CHARACTER = 8  # tokens that may share a character; more of them are not text
NUMBER = r"(\d+\.?\d*|\.\d+)"
# The largest values of flags: a sequence is held in memory, and the packing counts in 31 bits.
MOST = {"seq_length": 10**7, "packing_lookahead": 2**31 - 1, "global_batch_size": 2**31 - 1}


def parse_args() -> argparse.Namespace:
    parser = Parser(prog="preprocess/view.py", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="tokenized dataset: --output-prefix of tokenize.py, or a file of its output")
    add("--tokenizer-file", metavar="PATH", help="show packed sequences, decoded with this tokenizer")
    add(
        "--sequences",
        "--rows",
        metavar="FIRST:END",
        help="packed sequences to show, END excluded; a single number shows one (default: 0:3)",
    )
    add("--html", type=Path, metavar="FILE", help="write a self-contained HTML page instead of text")
    add("--color", choices=["auto", "always", "never"], default="auto", help="colors; auto: only on a terminal")
    add(
        "--stats",
        action="store_true",
        help="print document lengths, fill rate of both packing orders, steps per epoch; sequences only with --sequences",
    )
    add(
        "--global-batch-size",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256],
        metavar="N",
        help="batch sizes, in sequences, for the steps per epoch of --stats",
    )
    add("--plot", type=Path, metavar="FILE", help="write a histogram of the lengths, as .png, .pdf or .svg")
    same = parser.add_argument_group("as in training").add_argument
    same(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens the model sees per packed sequence (default: the positions of the model, else 2048)",
    )
    same("--load", metavar="DIR", help="checkpoint to train, which has the number of positions")
    same("--preset", choices=sorted(PRESETS), help="published model, the same")
    same("--range", metavar="START:END", help="part of the documents, as fractions like 0:0.95 (default: 0:1)")
    same(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="show what training reads of --data-prefix: all but this fraction, from its end",
    )
    same("--packing", choices=["best-fit", "greedy"], default="best-fit", help="packing order")
    same("--packing-lookahead", type=int, default=4096, metavar="N", help="documents that best-fit chooses from")
    same(
        "--overlong",
        choices=["drop", "truncate"],
        default="drop",
        help="documents longer than a sequence: drop them, or cut their inputs from the left",
    )
    same("--seed", type=int, default=1234, help="seed of the order")
    same(
        "--loss-on-targets-only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="loss on output tokens only",
    )
    same("--norm-target-loss", action="store_true", help="equal total weight for every output, whatever its length")
    same("--eod-mask-loss", action="store_true", help="no loss after end-of-text tokens")
    args = parser.parse_args()
    args.prefix = prefix_of(args.prefix)
    args.shows_sequences = bool(args.tokenizer_file and (args.sequences or args.html or not args.stats))
    args.sequences = args.sequences or "0:3"
    if args.seq_length is None:
        args.seq_length = model_positions(args)
    if not (args.tokenizer_file or args.stats or args.plot):
        raise UserError("nothing to show: give --tokenizer-file PATH for packed sequences, --stats, or --plot FILE")
    if args.html and not args.tokenizer_file:
        raise UserError("--html shows packed sequences, which need --tokenizer-file PATH")
    if args.plot and args.plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
    if args.validation_fraction is not None and (args.range or not 0 <= args.validation_fraction < 1):
        raise UserError(
            f"--validation-fraction {args.validation_fraction:g}: must be at least 0 and below 1, "
            "and excludes --range, which shows any other part"
        )
    for flag, most in MOST.items():
        values = getattr(args, flag)
        for value in values if isinstance(values, list) else [values]:
            if not 1 <= value <= most:
                raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1 and at most {most:,}")
    return args


def main() -> None:
    args = parse_args()
    documents = TokenizedDocuments(args.prefix)
    packing = packing_of(args, len(documents))
    if args.plot:
        write_file(args.plot, length_plot(documents, packing, args.plot.suffix[1:]))
        print(f"{args.plot}: histogram of lengths")
    stats = packing_report(documents, packing, args.global_batch_size) if args.stats else ""
    if stats:
        print(stats)
    if args.shows_sequences:
        sequences = decoded_sequences(documents, packing, args)
        if args.html:
            page = html_page(sequences, Path(args.prefix).name, settings_of(args), stats)
            write_file(args.html, page.encode())
            print(f"{args.html}: {counted(len(sequences), 'sequence')}")
        else:
            on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            colored = args.color == "always" or (args.color == "auto" and on_terminal)
            print("\n".join(terminal_lines(sequences, colored)))


def packing_of(args: argparse.Namespace, num_documents: int) -> Packing:
    """The packing that training uses with these flags, for one epoch."""
    start, end = range_of(args)
    first, stop = round(start * num_documents), round(end * num_documents)
    if first == stop:
        raise UserError(
            f"{args.prefix}: --range {start:g}:{end:g} holds none of its {counted(num_documents, 'document')}; "
            "widen the range, or use a larger dataset"
        )
    return Packing(
        start=first,
        stop=stop,
        capacity=args.seq_length + 1,
        order=args.packing,
        lookahead=args.packing_lookahead,
        overlong=args.overlong,
        seed=args.seed,
        keep_last=args.validation_fraction is None,  # training leaves it to the next epoch
    )


def range_of(args: argparse.Namespace) -> tuple[float, float]:
    """The part of the documents to show, as fractions. Raises UserError."""
    if args.validation_fraction is not None:
        return 0.0, 1 - args.validation_fraction
    match = re.fullmatch(f"{NUMBER}:{NUMBER}", args.range or "0:1")
    start, end = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= start < end <= 1:
        raise UserError(f"--range {args.range}: not START:END with 0 <= START < END <= 1, like 0:0.95")
    return start, end


def model_positions(args: argparse.Namespace) -> int:
    """The sequence length that training takes from --preset or --load. Raises UserError."""
    shape = PRESETS[args.preset] if args.preset else stored_shape(args.load) if args.load else None
    if shape is None and args.load:
        raise UserError(f"--load {args.load}: its files do not tell its number of positions; give --seq-length")
    return shape.max_position_embeddings if shape else DEFAULT_SEQ_LENGTH


def decoded_sequences(
    documents: TokenizedDocuments, packing: Packing, args: argparse.Namespace
) -> list[DecodedSequence]:
    """The packed sequences of --sequences, with the loss weights that training uses."""
    from megatron_ft.data.batch import collate  # imports torch, which --stats and --plot do not need

    tokenizer = load_tokenizer(args.tokenizer_file)
    check_vocabulary(documents, tokenizer.vocab_size)
    if warning := tokenizer_warning(documents.prefix, tokenizer.path):
        print(printable(warning), file=sys.stderr)
    pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
    packed = PackedDocuments(documents, packing, pack(documents, packing), pad)
    sequences = []
    for number in sequence_numbers(args.sequences, len(packed)):
        sample = packed[number]
        batch = collate(
            [sample],
            loss_on_targets_only=args.loss_on_targets_only,
            norm_target_loss=args.norm_target_loss,
            eod_mask_loss=args.eod_mask_loss,
            eod=tokenizer.eod,
        )
        # A label's weight belongs to the token it predicts; nothing predicts the first token.
        weights = np.concatenate([[0], batch.loss_mask[0].numpy()])
        sequences.append(decode(number, packed.document_ids(number).tolist(), sample, weights, tokenizer))
    return sequences


def sequence_numbers(text: str, count: int) -> range:
    """--sequences as a range of the `count` packed sequences."""
    match = re.fullmatch(r"(\d{1,15})(?::(\d{1,15}))?", text)
    if not match:
        raise UserError(f"--sequences {text}: give one number like 7, or FIRST:END like 0:3")
    first = int(match[1])
    end = min(int(match[2]) if match[2] else first + 1, count)
    if first >= end:
        raise UserError(f"--sequences {text}: not found; there are {count:,}, from 0 to {count - 1}")
    return range(first, end)


def decode(
    number: int, document_numbers: list[int], sample: PackedSample, weights: np.ndarray, tokenizer: Tokenizer
) -> DecodedSequence:
    """Cut a packed sequence into spans; `weights` is the loss weight of each token, [s + 1]."""
    documents = [DecodedDocument(document_number) for document_number in document_numbers]
    padding = 0
    changes = (np.diff(sample.segment_ids) != 0) | (np.diff(weights) != 0)
    for start, end in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(weights)]):
        segment = int(sample.segment_ids[start])
        if segment == 0:
            padding += end - start
            continue
        tokens = sample.tokens[start:end].tolist()
        pieces = tuple(printable(piece, limit=None, keep="\n\t") for piece in pieces_of(tokens, tokenizer))
        documents[segment - 1].spans.append(Span(end - start, float(weights[start]), "".join(pieces), pieces))
    return DecodedSequence(number, documents, padding)


def pieces_of(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of `tokens`, cut wherever a token ends a character; uncut if the tokenizer decodes
    tokens differently together than one by one, as SentencePiece does with spaces."""
    text, pieces, started = tokenizer.decode(tokens), [], 0
    for end in range(1, len(tokens) + 1):
        piece = tokenizer.decode(tokens[started:end])
        if "\ufffd" not in piece or end - started == LONGEST_CHARACTER:
            pieces.append(piece)
            started = end
    return pieces if "".join(pieces) == text else [text]


def terminal_lines(sequences: list[DecodedSequence], colored: bool) -> Iterator[str]:
    """Lines for a terminal. Without colors, tokens with loss are between guillemets."""
    if colored:
        context, loss = (
            terminal_span(Span(1, weight, name), 0, True) for weight, name in ((0, "context"), (1, "loss"))
        )
        yield f"each document in its own color: {context} {loss}"
    else:
        yield "context, «loss»"
    for sequence in sequences:
        yield "\x1b[0m" if colored else ""
        yield f"── {sequence.summary}"
        for i, document in enumerate(sequence.documents):
            yield f"┌ {title_of(i, document)}"
            yield "".join(terminal_span(span, i, colored) for span in document.spans)


def terminal_span(span: Span, i: int, colored: bool) -> str:
    """A span of the i-th document of a sequence."""
    if not colored:
        return f"«{span.text}»" if span.weight else span.text
    text, background = COLORS[i % len(COLORS)]
    style = f"\x1b[1;97;48;5;{background}m" if span.weight else f"\x1b[38;5;{text}m"
    # The style ends before each line break, or the background would fill the rest of the line.
    return style + span.text.replace("\n", f"\x1b[0m\n{style}") + "\x1b[0m"


def settings_of(args: argparse.Namespace) -> str:
    """The flags that determine the sequences, in words."""
    start, end = range_of(args)
    return (
        f"{args.packing} packing, sequence length {args.seq_length:,}, range {start:g}:{end:g}, "
        f"documents longer than a sequence: {args.overlong}, seed {args.seed}"
    )


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step; UserError if it cannot be written."""
    with OutputFile(path) as output, writing(path):
        output.write(content)
        output.commit()


if __name__ == "__main__":
    run_program(main)
