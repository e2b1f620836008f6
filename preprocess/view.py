"""Look at tokenized data as the model will be trained on it: packed rows, loss tokens, and what packing makes of the lengths.

    python preprocess/view.py data/commits --tokenizer-file tokenizer.json --rows 0:2 --seq-length 2048
    python preprocess/view.py data/commits --tokenizer-file tokenizer.json --html rows.html
    python preprocess/view.py data/commits --stats --global-batch-size 32 128 --plot lengths.png

Rows are those of the training program with the same flags and seed. Nothing is written beside the data.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import html
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from megatron_ft.config.flags import Help, Parser
from megatron_ft.data.indexed import prefix_of
from megatron_ft.data.packed_dataset import PackedRows, PackedSample, check_vocabulary
from megatron_ft.data.packing import PackedIndex, Packing, TokenizedDocuments, pack
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Each document's colour, then again from the first: (256-colour text of context, background of loss tokens), and a hue for HTML.
COLOURS = [(75, 24, 210), (114, 22, 130), (179, 94, 40), (176, 53, 290), (174, 88, 5)]
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BAR = 40  # characters of the longest bar of the text histogram


def main() -> int | None:
    args = parse_args()
    documents = TokenizedDocuments(args.prefix)
    packing = packing_of(args, len(documents))
    if args.plot:
        plot(documents, packing, args.plot)
        print(f"{args.plot}: histogram of lengths")
    stats = stats_text(documents, packing, args.global_batch_size) if args.stats else ""
    if stats:
        print(stats)
    if args.tokenizer_file:
        rows = shown_rows(documents, packing, args)
        if args.html:
            write_whole(args.html, html_page(rows, args, stats).encode())
            print(f"{args.html}: {len(rows)} rows")
        else:
            coloured = args.color == "always" or (
                args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
            )
            print("\n".join(terminal_text(rows, coloured)))


def parse_args() -> argparse.Namespace:
    parser = Parser(prog="preprocess/view.py", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add(
        "prefix",
        metavar="PREFIX",
        help="tokenized data set: PREFIX_inputs_document.bin and so on, or one of these files",
    )
    add("--tokenizer-file", metavar="FILE", help="show rows, decoded with this tokenizer")
    add("--rows", default="0:3", metavar="FIRST:END", help="which packed rows to show; one number is one row")
    add("--html", type=Path, metavar="FILE", help="write the rows as one self-contained page instead")
    add("--stats", action="store_true", help="print rows, lengths, fill rate of both packing orders, steps an epoch")
    add(
        "--global-batch-size",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256],
        metavar="N",
        help="rows of a step, for --stats",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the length histogram as a .png (or .pdf, .svg)")
    add("--color", choices=["auto", "always", "never"], default="auto", help="colours; auto is only on a terminal")
    same = parser.add_argument_group("as for training").add_argument
    same("--seq-length", type=int, default=2048, help="tokens of a packed row")
    same("--range", default="0:1", metavar="START:END", help="share of the documents, as in a split file")
    same("--packing", choices=["best-fit", "greedy"], default="best-fit", help="order of documents in rows")
    same("--packing-lookahead", type=int, default=4096, help="documents best-fit packing chooses among")
    same("--overlong", choices=["drop", "truncate"], default="drop", help="documents longer than a row")
    same("--seed", type=int, default=1234, help="seed of the order")
    same(
        "--loss-on-targets-only", action=argparse.BooleanOptionalAction, default=True, help="loss on output tokens only"
    )
    same("--norm-target-loss", action="store_true", help="every output span weighs the same")
    same("--eod-mask-loss", action="store_true", help="no loss after end-of-text tokens")
    args = parser.parse_args()
    args.prefix = prefix_of(args.prefix)
    if not (args.tokenizer_file or args.stats or args.plot):
        raise UserError("nothing to show: give --tokenizer-file FILE to see rows, or --stats, or --plot FILE")
    if args.html and not args.tokenizer_file:
        raise UserError("--html shows rows, which need --tokenizer-file FILE")
    for flag, value in (
        ("seq-length", args.seq_length),
        ("packing-lookahead", args.packing_lookahead),
        ("global-batch-size", min(args.global_batch_size)),
    ):
        if value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    return args


def packing_of(args: argparse.Namespace, count: int) -> Packing:
    bounds = re.fullmatch(r"([\d.]+):([\d.]+)", args.range)
    try:
        start, end = (float(bound) for bound in bounds.groups())
    except (AttributeError, ValueError):
        start, end = 1.0, 0.0
    if not 0 <= start < end <= 1:
        raise UserError(f"--range {args.range}: not START:END with 0 <= START < END <= 1, like 0:0.95")
    return Packing(
        round(start * count), round(end * count), args.seq_length + 1, args.packing, args.packing_lookahead, args.overlong, args.seed, keep_last=True
    )  # fmt: skip


@dataclass
class Piece:
    """Tokens of one document that stand together and are alike: `weight` is their loss weight, 0 for context."""

    document: int  # its number in the row, from 1; 0 is padding
    weight: float
    tokens: int
    text: str


@dataclass
class ShownRow:
    number: int
    documents: list[int]
    pieces: list[Piece]

    @property
    def summary(self) -> str:
        learned = sum(piece.tokens for piece in self.pieces if piece.weight)
        padding = sum(piece.tokens for piece in self.pieces if not piece.document)
        places = sum(piece.tokens for piece in self.pieces)
        return f"row {self.number}: {places:,} places, {len(self.documents)} documents, loss on {learned:,} tokens, {padding:,} padding"


def shown_rows(documents: TokenizedDocuments, packing: Packing, args: argparse.Namespace) -> list[ShownRow]:
    """The rows of --rows, cut into pieces by the loss weights that training would use."""
    from megatron_ft.data.batch import collate  # brings torch, which --stats does without

    tokenizer = load_tokenizer(args.tokenizer_file)
    check_vocabulary(documents, tokenizer.vocab_size)
    if notice := tokenizer_warning(documents.prefix, tokenizer.path):
        print(notice, file=sys.stderr)
    pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
    rows = PackedRows(documents, packing, pack(documents, packing), pad)
    shown = []
    for number in row_numbers(args.rows, len(rows)):
        sample = rows[number]
        batch = collate(
            [sample],
            loss_on_targets_only=args.loss_on_targets_only,
            norm_target_loss=args.norm_target_loss,
            eod_mask_loss=args.eod_mask_loss,
            eod=tokenizer.eod,
        )
        # A label's weight belongs to the token it predicts; nothing predicts a row's first token.
        weights = np.concatenate([[0], batch.loss_mask[0].numpy()])
        shown.append(ShownRow(number, rows.document_ids(number).tolist(), list(pieces_of(sample, weights, tokenizer))))
    return shown


def row_numbers(text: str, count: int) -> range:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        raise UserError(f"--rows {text}: give one row like 7, or FIRST:END like 0:3")
    first = int(found[1])
    end = int(found[2]) if found[2] else first + 1
    if first >= min(end, count):
        raise UserError(f"--rows {text}: no such row; there are {count:,}, from 0 to {count - 1}")
    return range(first, min(end, count))


def pieces_of(sample: PackedSample, weights: np.ndarray, tokenizer: Tokenizer) -> Iterator[Piece]:
    changes = (np.diff(sample.segment_ids) != 0) | (np.diff(weights) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(weights)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        document = int(sample.segment_ids[start])
        text = tokenizer.decode(sample.tokens[start:end].tolist()) if document else ""
        yield Piece(document, float(weights[start]), end - start, visible(text))


def visible(text: str) -> str:
    """Control characters spelled out, so that data cannot steer a terminal."""
    return re.sub(
        r"[^\S \n\t]|[\x00-\x08\x0e-\x1f\x7f-\x9f]", lambda c: c.group().encode("unicode_escape").decode(), text
    )


def terminal_text(rows: list[ShownRow], coloured: bool) -> Iterator[str]:
    """Lines for a terminal. Without colours, loss tokens stand between guillemets."""
    context, loss = (
        (f"\x1b[38;5;{COLOURS[0][0]}mcontext\x1b[0m", f"\x1b[1;97;48;5;{COLOURS[0][1]}mloss\x1b[0m")
        if coloured
        else ("context", "«loss»")
    )
    yield f"each document in its colour: {context} {loss}" if coloured else f"{context}, {loss}"
    for row in rows:
        yield "" if not coloured else "\x1b[0m"
        yield f"── {row.summary}"
        for place, document in enumerate(row.documents, 1):
            pieces = [piece for piece in row.pieces if piece.document == place]
            body = "".join(terminal_piece(piece, coloured) for piece in pieces)
            yield f"┌ document {place} (no. {document} of the data set), {sum(piece.tokens for piece in pieces):,} tokens"
            yield body


def terminal_piece(piece: Piece, coloured: bool) -> str:
    if not coloured:
        return f"«{piece.text}»" if piece.weight else piece.text
    text, background, _ = COLOURS[(piece.document - 1) % len(COLOURS)]
    style = f"\x1b[1;97;48;5;{background}m" if piece.weight else f"\x1b[38;5;{text}m"
    # The style ends before each line break: a background would otherwise fill the rest of the line.
    return style + piece.text.replace("\n", f"\x1b[0m\n{style}") + "\x1b[0m"


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
<p class="h1">Each document has its colour: <span class="context">context</span>, <span class="loss">tokens with loss</span>.</p>
{stats}{rows}
</html>
"""


def html_page(rows: list[ShownRow], args: argparse.Namespace, stats: str) -> str:
    """The rows as one page that needs nothing else."""
    settings = f"{args.packing} packing, sequence length {args.seq_length:,}, range {args.range}, over-long documents: {args.overlong}, seed {args.seed}"
    return PAGE.format(
        title=f"Packed rows of {html.escape(Path(args.prefix).name)}",
        settings=settings,
        hues="\n".join(f".h{i} {{ --hue: {hue} }}" for i, (_, _, hue) in enumerate(COLOURS, 1)),
        stats=f"<pre>{html.escape(stats)}</pre>" if stats else "",
        rows="\n".join(html_row(row) for row in rows),
    )


def html_row(row: ShownRow) -> str:
    parts = [f"<section><h2>{row.summary}</h2>"]
    for place, document in enumerate(row.documents, 1):
        pieces = [piece for piece in row.pieces if piece.document == place]
        parts.append(
            f'<div class="document h{(place - 1) % len(COLOURS) + 1}"><small>document {place} (no. {document} of the data set), '
            f"{sum(piece.tokens for piece in pieces):,} tokens</small><pre>"
        )
        for piece in pieces:
            kind, weight = ("loss", f", weight {piece.weight:.3g} each") if piece.weight else ("context", "")
            parts.append(f'<span class="{kind}" title="{piece.tokens} tokens{weight}">{html.escape(piece.text)}</span>')
        parts.append("</pre></div>")
    padding = sum(piece.tokens for piece in row.pieces if not piece.document)
    parts.append(f'<div class="padding">{padding:,} padding</div></section>' if padding else "</section>")
    return "".join(parts)


def stats_text(documents: TokenizedDocuments, packing: Packing, batch_sizes: list[int]) -> str:
    """Rows, lengths, both packing orders and steps an epoch, as text."""
    chosen = slice(packing.start, packing.stop)
    inputs, outputs = documents.inputs.sizes[chosen], documents.targets.sizes[chosen]
    both = inputs.astype(np.int64) + outputs
    over = both > packing.capacity
    orders = {order: pack(documents, replace(packing, order=order)) for order in ("best-fit", "greedy")}
    fields = {"inputs": inputs, "outputs": outputs, "both": both}
    lines = [
        f"{documents.prefix}: {len(both):,} documents, {both.sum():,} tokens ({inputs.sum():,} in inputs, {outputs.sum():,} in outputs)",
        f"longer than a row of {packing.capacity:,} tokens: {over.sum():,} documents ({over.mean():.2%}), {both[over].sum() / max(1, both.sum()):.2%} of the tokens",
        "",
        "tokens    "
        + "".join(f"{'min' if p == 0 else 'max' if p == 100 else f'{p}%':>9}" for p in PERCENTILES)
        + "     mean",
    ]
    for name, sizes in fields.items():
        values = np.percentile(sizes, PERCENTILES, method="nearest")
        lines.append(f"{name:10}" + "".join(f"{value:>9,}" for value in values.astype(int)) + f"{sizes.mean():>9,.0f}")
    lines += [
        "",
        *histogram_lines(inputs, outputs),
        "",
        f"{'packing':10}{'rows':>12}{'fill rate':>12}{'padding tokens':>18}",
    ]
    for order, index in orders.items():
        padding = len(index) * packing.capacity - index.facts["packed_tokens"]
        lines.append(f"{order:10}{len(index):>12,}{index.fill_rate:>12.2%}{padding:>18,}")
    lines += ["", f"{'global batch':>12}" + "".join(f"{f'steps, {order}':>18}" for order in orders)]
    for size in batch_sizes:
        lines.append(f"{size:>12,}" + "".join(f"{ceil(len(index) / size):>18,}" for index in orders.values()))
    return "\n".join([*lines, *left_out_line(orders["best-fit"], packing)])


def left_out_line(index: PackedIndex, packing: Packing) -> list[str]:
    facts = index.facts
    if not facts["overlong_documents"]:
        return []
    return [
        "", f"--overlong {packing.overlong}: {facts['left_out_documents']:,} documents left out, {facts['lost_tokens']:,} tokens lost "
        f"({facts['lost_tokens'] / facts['tokens']:.2%})"
    ]  # fmt: skip


def bin_edges(*fields: np.ndarray) -> np.ndarray:
    """Powers of two that hold all lengths: 0, 1, 2, 4, ..."""
    longest = max(int(sizes.max()) for sizes in fields)
    return np.concatenate([[0], 2 ** np.arange(0, max(1, longest).bit_length() + 1)])


def histogram_lines(inputs: np.ndarray, outputs: np.ndarray) -> Iterator[str]:
    edges = bin_edges(inputs, outputs)
    counts = [np.histogram(sizes, edges)[0] for sizes in (inputs, outputs)]
    most = max(count.max() for count in counts)
    yield f"{'length':>17}  {'inputs':{BAR + 10}}outputs"
    for i in np.flatnonzero(counts[0] + counts[1]):
        bars = [f"{count[i]:>8,} {'█' * ceil(BAR * count[i] / most):{BAR}}" for count in counts]
        yield f"{edges[i]:>8,} to {edges[i + 1] - 1:>5,} {bars[0]} {bars[1].rstrip()}"


def plot(documents: TokenizedDocuments, packing: Packing, path: Path) -> None:
    """Draw the histogram of input, output and document lengths, with the row's length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: the name must end in .png, .pdf or .svg")
    chosen = slice(packing.start, packing.stop)
    inputs, outputs = documents.inputs.sizes[chosen], documents.targets.sizes[chosen]
    edges = np.unique(np.geomspace(1, max(2, int((inputs.astype(np.int64) + outputs).max()) + 1), 33).astype(int))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, sizes in (("inputs", inputs), ("outputs", outputs), ("both", inputs.astype(np.int64) + outputs)):
        axes.hist(np.maximum(sizes, 1), bins=edges, histtype="step", linewidth=1.6, label=label)
    axes.axvline(packing.capacity, color="black", linestyle="--", linewidth=1, label=f"a row: {packing.capacity:,}")
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="documents",
        title=f"{Path(documents.prefix).name}: {len(inputs):,} documents",
    )
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    write_whole(path, drawn.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole; UserError where it cannot be written."""
    with OutputFile(path) as output, writing(path):
        output.write(content)
        output.commit()


if __name__ == "__main__":
    run_program(main)
