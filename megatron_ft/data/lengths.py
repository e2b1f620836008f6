"""Document lengths of a dataset and how well they pack, as text and as a plot."""

import io
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np

from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.packing import PackedIndex, Packing, loss_remedy, pack
from megatron_ft.errors import UserError
from megatron_ft.printable import counted

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BAR = 40  # characters of the longest bar of the text histogram


def packing_report(documents: TokenizedDocuments, packing: Packing, batch_sizes: list[int]) -> str:
    """Document lengths, fill rates of both packing orders, and steps per epoch, as text."""
    lengths = _lengths(documents, packing)
    inputs, outputs, both = lengths.values()
    too_long = both > packing.capacity
    orders = {order: pack(documents, replace(packing, order=order)) for order in ("best-fit", "greedy")}
    of_these = ""
    if documents.learned is not None:
        of_these = f", {documents.learned_tokens(packing.start, packing.stop):,} of these learned"
    lines = [
        f"{documents.prefix}: {counted(len(both), 'document')}, {both.sum():,} tokens "
        f"({inputs.sum():,} in inputs, {outputs.sum():,} in outputs{of_these})",
        f"longer than a packed sequence of {packing.capacity:,} tokens: {counted(int(too_long.sum()), 'document')} "
        f"({too_long.mean():.2%}), {both[too_long].sum() / max(1, both.sum()):.2%} of the tokens",
        "",
        *_percentile_lines(lengths),
        "",
        *_histogram_lines(inputs, outputs),
        "",
        f"{'packing':10}{'sequences':>12}{'fill rate':>12}{'padding tokens':>18}",
    ]
    for order, index in orders.items():
        padding = len(index) * packing.capacity - index.facts["packed_tokens"]
        lines.append(f"{order:10}{len(index):>12,}{index.fill_rate:>12.2%}{padding:>18,}")
    lines += ["", f"{'global batch':>12}" + "".join(f"{f'steps, {order}':>18}" for order in orders)]
    for size in batch_sizes:
        lines.append(f"{size:>12,}" + "".join(f"{ceil(len(index) / size):>18,}" for index in orders.values()))
    return "\n".join([*lines, *_lost_lines(orders["best-fit"], packing)])


def _percentile_lines(lengths: dict[str, np.ndarray]) -> Iterator[str]:
    """A table of percentiles and means, one line per field."""
    names = {0: "min", 100: "max"}
    yield "tokens    " + "".join(f"{names.get(p, f'{p}%'):>9}" for p in PERCENTILES) + "     mean"
    for name, sizes in lengths.items():
        values = np.percentile(sizes, PERCENTILES, method="nearest")
        yield f"{name:10}" + "".join(f"{value:>9,}" for value in values.astype(int)) + f"{sizes.mean():>9,.0f}"


def _histogram_lines(inputs: np.ndarray, outputs: np.ndarray) -> Iterator[str]:
    """Bars of the numbers of inputs and outputs between two powers of two."""
    longest = int(max(inputs.max(), outputs.max()))
    edges = np.concatenate([[0], 2 ** np.arange(0, max(1, longest).bit_length() + 1)])  # 0, 1, 2, 4, ...
    counts = [np.histogram(sizes, edges)[0] for sizes in (inputs, outputs)]
    most = max(count.max() for count in counts)
    yield f"{'length':>17}  {'inputs':{BAR + 10}}outputs"
    for i in np.flatnonzero(counts[0] + counts[1]):
        bars = [f"{count[i]:>8,} {'█' * ceil(BAR * count[i] / most):{BAR}}" for count in counts]
        yield f"{edges[i]:>8,} to {edges[i + 1] - 1:>5,} {bars[0]} {bars[1].rstrip()}"


def _lost_lines(index: PackedIndex, packing: Packing) -> Iterator[str]:
    """What --overlong costs, if any document is longer than a sequence."""
    facts = index.facts
    if facts["overlong_documents"]:
        much = loss_remedy(facts, packing.overlong)
        yield ""
        yield (
            f"{'warning: ' * bool(much)}--overlong {packing.overlong}: {counted(facts['left_out_documents'], 'document')} dropped, "
            f"{facts['lost_tokens']:,} tokens lost ({facts['lost_tokens'] / facts['tokens']:.2%}){much}"
        )


def length_plot(documents: TokenizedDocuments, packing: Packing, image_format: str) -> bytes:
    """A histogram of the lengths as an image, with the length of a packed sequence as a line.

    `image_format` is "png", "pdf" or "svg". Raises UserError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"a plot needs matplotlib ({error}); type: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = _lengths(documents, packing)
    edges = np.unique(np.geomspace(1, max(2, int(lengths["both"].max()) + 1), 33).astype(int))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, sizes in lengths.items():
        axes.hist(np.maximum(sizes, 1), bins=edges, histtype="step", linewidth=1.6, label=name)
    label = f"packed sequence: {packing.capacity:,}"
    axes.axvline(packing.capacity, color="black", linestyle="--", linewidth=1, label=label)
    title = f"{Path(documents.prefix).name}: {len(lengths['both']):,} documents"
    axes.set(xscale="log", xlabel="tokens", ylabel="documents", title=title)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format=image_format, dpi=150)
    return image.getvalue()


def _lengths(documents: TokenizedDocuments, packing: Packing) -> dict[str, np.ndarray]:
    """Tokens of each document of the range: in its inputs, in its outputs, and in both."""
    chosen = slice(packing.start, packing.stop)
    inputs, outputs = documents.inputs.sizes[chosen], documents.targets.sizes[chosen]
    return {"inputs": inputs, "outputs": outputs, "both": inputs.astype(np.int64) + outputs}
