"""Which documents stand together in which row: the packing index of one data set, built once and kept on disk.

Two orders. `best-fit` shuffles the documents anew each epoch and packs them best-fit decreasing within a bounded look-ahead; every
document comes exactly once an epoch, and rows end where the epoch ends. `greedy` is the mtf branch's, bit for bit: numpy's
legacy shuffle, documents as they come, rows run on over the end of an epoch.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np

from megatron_ft.data import _packing
from megatron_ft.data.build_once import build_once
from megatron_ft.data.indexed import IndexedReader, field_paths
from megatron_ft.errors import UserError

FORMAT = 1  # raised when the same settings would give another index


class TokenizedDocuments:
    """The two fields of a data set, `<prefix>_inputs_document` and `<prefix>_targets_document`, sequence i of each being document i.

    Raises UserError where a file is missing or damaged, or the fields do not have the same number of documents.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        inputs, targets = field_paths(prefix)
        self.inputs, self.targets = IndexedReader(inputs), IndexedReader(targets)
        if len(self.inputs) != len(self.targets):
            raise UserError(
                f"{prefix}: {len(self.inputs)} inputs but {len(self.targets)} targets; make both again in one run of preprocess/tokenize.py"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of every document's lengths, which are all of the data that shapes an index."""
        digest = hashlib.blake2b(digest_size=16)
        for reader in (self.inputs, self.targets):
            digest.update(reader.sizes)
        return digest.hexdigest()


@dataclass(frozen=True)
class Packing:
    """Everything besides the data that shapes an index.

    `start`, `stop`: the range of documents. `capacity`: tokens of a row, the sequence length + 1. `keep_last`: in greedy order, keep the
    unfinished last row too (validation, which shall see its whole range).
    """

    start: int
    stop: int
    capacity: int
    order: str = "best-fit"
    lookahead: int = 4096
    overlong: str = "drop"
    seed: int = 1234
    epochs: int = 1
    keep_last: bool = False


@dataclass
class PackedIndex:
    """Row r holds `documents[rows[r, 0] : rows[r, 1]]`; both int64, memory-mapped. `facts` are the counts of `pack`."""

    documents: np.ndarray
    rows: np.ndarray
    facts: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill_rate(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.facts["packed_tokens"] / max(1, len(self.rows) * self.facts["capacity"])


def row_lengths(total: np.ndarray, targets: np.ndarray, capacity: int, overlong: str) -> np.ndarray:
    """Tokens each document takes in a row: int32, `capacity + 1` for one that is left out.

    `drop` leaves out what is longer than a row; `truncate` cuts such a document's inputs from the left, and leaves it out
    where its outputs leave no room for a single input token.
    """
    lengths = np.minimum(total, capacity + 1).astype(np.int32)
    if overlong == "truncate":
        lengths[(total > capacity) & (targets < capacity)] = capacity
    return lengths


def pack(documents: TokenizedDocuments, packing: Packing) -> PackedIndex:
    """Compute an index in memory. Raises UserError where no document of the range fits a row."""
    chosen = slice(packing.start, packing.stop)
    targets = documents.targets.sizes[chosen]
    total = np.add(documents.inputs.sizes[chosen], targets, dtype=np.int64)
    lengths = row_lengths(total, targets, packing.capacity, packing.overlong)
    overlong, left_out = total > packing.capacity, lengths > packing.capacity
    kept = np.where(left_out, 0, lengths)
    _check_something_fits(documents.prefix, packing, total, left_out, kept)
    order, rows = _greedy(lengths, packing) if packing.order == "greedy" else _best_fit(lengths, packing)
    tokens, kept_tokens = int(total.sum()), int(kept.sum(dtype=np.int64))
    in_rows = rows[-1, 1] if len(rows) else 0  # what comes after is greedy's unfinished row
    facts = {
        "documents": len(total),
        "tokens": tokens,
        "overlong_documents": int(overlong.sum()),
        "left_out_documents": int(left_out.sum()),
        "lost_tokens": tokens - kept_tokens,
        "capacity": packing.capacity,
        "packed_tokens": packing.epochs * kept_tokens - int(kept[order[in_rows:]].sum(dtype=np.int64)),
    }
    order += packing.start
    return PackedIndex(order, rows, facts)


def _check_something_fits(
    prefix: str, packing: Packing, total: np.ndarray, left_out: np.ndarray, kept: np.ndarray
) -> None:
    if len(total) == 0:
        raise UserError(f"{prefix}: the range holds no document; widen START:END or take a larger data set")
    if left_out.all():
        remedy = "" if packing.overlong == "truncate" else " or give --overlong truncate"
        raise UserError(
            f"{prefix}: all {len(total)} documents are longer than a row of {packing.capacity} tokens (the shortest has {total.min()}); "
            f"raise --seq-length{remedy}"
        )
    if kept.max() == 0:
        raise UserError(
            f"{prefix}: all {(~left_out).sum()} documents that fit a row are empty; make the data set again"
        )


def _greedy(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(packing.seed)
    order = np.empty((packing.epochs, len(lengths)), np.int64)
    for epoch in order:
        epoch[:] = np.arange(len(lengths))
        random.shuffle(epoch)
    order = order.reshape(-1)
    rows, unfinished = _packing.greedy(lengths, order, packing.capacity)
    if packing.keep_last and unfinished < len(order):
        rows = np.concatenate([rows, [[unfinished, len(order)]]])
    return order, rows


def _best_fit(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    orders, bounds = [], [np.zeros(1, np.int64)]
    for epoch in range(packing.epochs):
        seed = hashlib.blake2b(f"{packing.seed} {epoch}".encode(), digest_size=8).digest()
        order, ends = _packing.best_fit(lengths, packing.capacity, packing.lookahead, int.from_bytes(seed, "little"))
        orders.append(order)
        bounds.append(bounds[-1][-1] + ends)
    bounds = np.concatenate(bounds)
    return np.concatenate(orders) if len(orders) > 1 else orders[0], np.stack([bounds[:-1], bounds[1:]], axis=1)


def load_index(documents: TokenizedDocuments, packing: Packing, cache: str | None = None) -> PackedIndex:
    """The index from disk, built first if this is the first process to ask for it.

    It lies beside the data in `<prefix>_packing/`, or in the directory `cache`. Its name is a digest of everything that shapes it.
    """
    settings = {"format": FORMAT, "lengths": documents.fingerprint, **asdict(packing)}
    if packing.order == "greedy":
        del settings["lookahead"]  # has no say there
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
    prefix = Path(documents.prefix)
    parent = (Path(cache) if cache else prefix.parent) / f"{prefix.name}_packing"
    name = f"{packing.start}-{packing.stop}_row{packing.capacity}_{packing.order}_seed{packing.seed}_epochs{packing.epochs}_{digest}"
    directory = parent / name

    def build(partial: Path) -> None:
        index = pack(documents, packing)
        np.save(partial / "documents.npy", index.documents)
        np.save(partial / "rows.npy", index.rows)
        (partial / "index.json").write_text(json.dumps({"settings": settings, "facts": index.facts}, indent=1))

    build_once(directory, build)
    try:
        return PackedIndex(
            np.load(directory / "documents.npy", mmap_mode="r").view(np.ndarray),
            np.load(directory / "rows.npy", mmap_mode="r").view(np.ndarray),
            json.loads((directory / "index.json").read_text())["facts"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{directory}: this packing index is damaged ({error}); remove the directory and start again"
        ) from error


def load_index_of_rows(
    documents: TokenizedDocuments, packing: Packing, num_rows: int, cache: str | None = None
) -> PackedIndex:
    """An index with as many epochs as `num_rows` rows need. More epochs never change the rows before them, so a longer run
    sees what a shorter one saw."""
    epochs, index = 1, load_index(documents, packing, cache)
    while len(index) < num_rows:
        a_row_more = len(index) / epochs if len(index) else 0.5
        epochs = max(epochs + 1, ceil(num_rows / a_row_more))
        index = load_index(documents, Packing(**{**asdict(packing), "epochs": epochs}), cache)
    return index
