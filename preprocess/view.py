"""Inspect a tokenized dataset as a model is trained on it: packed sequences, loss, statistics.

    python preprocess/view.py data/rows --tokenizer-file MODEL --sequences 0:2 --seq-length 2048
    python preprocess/view.py data/rows --tokenizer-file MODEL --html sequences.html
    python preprocess/view.py data/rows --stats --global-batch-size 32 128 --plot lengths.png

Sequences are those of a training run with the same flags and seed. Nothing is written next to the
data.
"""

import sys
from pathlib import Path

# The repository root instead of this directory, whose tokenize.py would shadow Python's own.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import html
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.indexed import prefix_of
from megatron_ft.data.lengths import length_plot, packing_report
from megatron_ft.data.packed_dataset import PackedDocuments, PackedSample, check_vocabulary
from megatron_ft.data.packing import Packing, pack
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.printable import printable
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer

# A document's color on a terminal (of the 256: context as text, loss as background) and its hue in
# HTML. Documents of a sequence take them in turn.
COLORS = [(75, 24, 210), (114, 22, 130), (179, 94, 40), (176, 53, 290), (174, 88, 5)]
PLOT_FORMATS = (".png", ".pdf", ".svg")
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
        default="0:3",
        metavar="FIRST:END",
        help="packed sequences to show, END excluded; a single number shows one",
    )
    add("--html", type=Path, metavar="FILE", help="write a self-contained HTML page instead of text")
    add("--color", choices=["auto", "always", "never"], default="auto", help="colors; auto: only on a terminal")
    add(
        "--stats", action="store_true", help="print document lengths, fill rate of both packing orders, steps per epoch"
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
    same("--seq-length", type=int, default=2048, metavar="N", help="tokens the model sees per packed sequence")
    same("--range", default="0:1", metavar="START:END", help="part of the documents, as fractions like 0:0.95")
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
    if not (args.tokenizer_file or args.stats or args.plot):
        raise UserError("nothing to show: give --tokenizer-file PATH for packed sequences, --stats, or --plot FILE")
    if args.html and not args.tokenizer_file:
        raise UserError("--html shows packed sequences, which need --tokenizer-file PATH")
    if args.plot and args.plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
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
    if args.tokenizer_file:
        sequences = decoded_sequences(documents, packing, args)
        if args.html:
            write_file(args.html, html_page(sequences, args, stats).encode())
            print(f"{args.html}: {len(sequences)} sequences")
        else:
            on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            colored = args.color == "always" or (args.color == "auto" and on_terminal)
            print("\n".join(terminal_lines(sequences, colored)))


def packing_of(args: argparse.Namespace, num_documents: int) -> Packing:
    """The packing that training uses with these flags, for one epoch."""
    match = re.fullmatch(f"{NUMBER}:{NUMBER}", args.range)
    start, end = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= start < end <= 1:
        raise UserError(f"--range {args.range}: not START:END with 0 <= START < END <= 1, like 0:0.95")
    first, stop = round(start * num_documents), round(end * num_documents)
    if first == stop:
        raise UserError(
            f"{args.prefix}: --range {args.range} holds none of its {num_documents:,} documents; "
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
        keep_last=True,
    )


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a document with the same loss weight, which is 0 for context."""

    num_tokens: int
    weight: float  # of each token
    text: str


@dataclass(frozen=True)
class DecodedDocument:
    """A document of a packed sequence; `number` is its number in the dataset."""

    number: int
    spans: list[Span] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)


@dataclass(frozen=True)
class DecodedSequence:
    """A packed sequence, ready to be shown; `padding` is a number of tokens."""

    number: int
    documents: list[DecodedDocument]
    padding: int

    @property
    def summary(self) -> str:
        positions = sum(document.num_tokens for document in self.documents) + self.padding
        learned = sum(span.num_tokens for document in self.documents for span in document.spans if span.weight)
        return (
            f"sequence {self.number}: {positions:,} token positions, {len(self.documents)} documents, "
            f"loss on {learned:,} tokens, {self.padding:,} padding"
        )


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
        text = printable(tokenizer.decode(sample.tokens[start:end].tolist()), limit=None, keep="\n\t")
        documents[segment - 1].spans.append(Span(end - start, float(weights[start]), text))
    return DecodedSequence(number, documents, padding)


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


def title_of(i: int, document: DecodedDocument) -> str:
    return f"document {i + 1} (number {document.number} of the dataset), {document.num_tokens:,} tokens"


def terminal_span(span: Span, i: int, colored: bool) -> str:
    """A span of the i-th document of a sequence."""
    if not colored:
        return f"«{span.text}»" if span.weight else span.text
    text, background, _ = COLORS[i % len(COLORS)]
    style = f"\x1b[1;97;48;5;{background}m" if span.weight else f"\x1b[38;5;{text}m"
    # The style ends before each line break, or the background would fill the rest of the line.
    return style + span.text.replace("\n", f"\x1b[0m\n{style}") + "\x1b[0m"


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
pre {{ font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
section {{ border: 1px solid #8885; border-radius: 8px; margin: 1.2rem 0; overflow: hidden }}
h2 {{ font-size: 1rem; margin: 0; padding: .5rem 1rem; background: #8882 }}
div.document {{ padding: .4rem 1rem; border-left: 4px solid hsl(var(--hue) 60% 50%) }}
div.document > small, div.padding {{ color: #888; display: block }}
div.padding {{ padding: .4rem 1rem }}
.context {{ color: light-dark(hsl(var(--hue) 45% 32%), hsl(var(--hue) 45% 70%)) }}
.loss {{ background: light-dark(hsl(var(--hue) 80% 84%), hsl(var(--hue) 60% 26%)); border-radius: 2px }}
{hues}
</style>
<h1>{title}</h1>
<p>{settings}</p>
<p class="h1">Each document has its own color: <span class="context">context</span>, <span class="loss">tokens with loss</span>.</p>
{stats}{sequences}
</html>
"""


def html_page(sequences: list[DecodedSequence], args: argparse.Namespace, stats: str) -> str:
    """The sequences as one self-contained page, below the text of --stats."""
    settings = (
        f"{args.packing} packing, sequence length {args.seq_length:,}, range {args.range}, "
        f"documents longer than a sequence: {args.overlong}, seed {args.seed}"
    )
    return PAGE.format(
        title=f"Packed sequences of {html.escape(Path(args.prefix).name)}",
        settings=settings,
        hues="\n".join(f".h{i} {{ --hue: {hue} }}" for i, (_, _, hue) in enumerate(COLORS, 1)),
        stats=f"<pre>{html.escape(stats)}</pre>" if stats else "",
        sequences="\n".join(map(html_sequence, sequences)),
    )


def html_sequence(sequence: DecodedSequence) -> str:
    parts = [f"<section><h2>{sequence.summary}</h2>"]
    for i, document in enumerate(sequence.documents):
        hue = f"h{i % len(COLORS) + 1}"
        parts.append(f'<div class="document {hue}"><small>{title_of(i, document)}</small><pre>')
        for span in document.spans:
            kind, weight = ("loss", f", weight {span.weight:.3g} each") if span.weight else ("context", "")
            title = f"{span.num_tokens} tokens{weight}"
            parts.append(f'<span class="{kind}" title="{title}">{html.escape(span.text)}</span>')
        parts.append("</pre></div>")
    if sequence.padding:
        parts.append(f'<div class="padding">{sequence.padding:,} padding</div>')
    return "".join([*parts, "</section>"])


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step; UserError if it cannot be written."""
    with OutputFile(path) as output, writing(path):
        output.write(content)
        output.commit()


if __name__ == "__main__":
    run_program(main)
