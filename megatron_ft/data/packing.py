"""Which documents make up each packed sequence: the packing index of one dataset, built once and
kept on disk.

There are two orders. `best-fit` shuffles the documents in each epoch and packs them best-fit
decreasing within a bounded look-ahead; every document occurs exactly once per epoch, and no
sequence crosses the end of an epoch. `greedy` is the mtf branch's order, bit for bit: numpy's
legacy shuffle, documents in that order, and sequences that may cross the end of an epoch.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from pathlib import Path

import numpy as np

from megatron_ft.data import _packing
from megatron_ft.data.build_once import build_once
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.file_array import FileArray, file_version, read_error
from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_json, require
from megatron_ft.printable import counted

FORMAT = 1  # increase when the same settings would give another index
# Of a .npy file of int64 (version 1.0 of NEP 1); numpy's own reader evaluates it as Python.
NPY_HEADER_BYTES = 1024
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '<i8', 'fortran_order': False, 'shape': \((?P<shape>\d{1,18},(?: \d{1,9})?)\), \} *\n",
    re.DOTALL,
)
REBUILD = "remove the directory and start again"
MUCH_LOST = 0.05  # of the tokens, in documents longer than a packed sequence
FACTS = (
    "documents",
    "tokens",
    "overlong_documents",
    "left_out_documents",
    "lost_tokens",
    "capacity",
    "packed_tokens",
)


@dataclass(frozen=True)
class Packing:
    """The settings that determine an index, together with the data.

    `start`, `stop`: the range of documents. `capacity`: tokens of a packed sequence, the sequence
    length + 1. `keep_last`: in greedy order, keep the incomplete last sequence too (for validation,
    which covers its entire range).
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
    """Packed sequence i consists of `documents[bounds[i, 0] : bounds[i, 1]]`.

    `documents`: int64 [n]. `bounds`: int64 [sequences, 2]. Both are read piece by piece if the
    index is on disk, in `directory`. `facts` are the counts computed by `pack`.
    """

    documents: np.ndarray | FileArray
    bounds: np.ndarray | FileArray
    facts: dict[str, int]
    directory: Path | None = None

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def fill_rate(self) -> float:
        """Fraction of the sequences' token positions that hold a token; the rest is padding."""
        return self.facts["packed_tokens"] / max(1, len(self) * self.facts["capacity"])


def packed_lengths(total: np.ndarray, targets: np.ndarray, capacity: int, overlong: str) -> np.ndarray:
    """Tokens that each document takes in a packed sequence: int32, `capacity + 1` for a document
    that is left out.

    `drop` leaves out documents longer than `capacity`. `truncate` cuts their inputs on the left and
    leaves out only documents whose targets leave no room for a single input token.

    >>> total, targets = np.array([5, 12, 15]), np.array([2, 4, 10])
    >>> packed_lengths(total, targets, capacity=10, overlong="drop").tolist()
    [5, 11, 11]
    >>> packed_lengths(total, targets, capacity=10, overlong="truncate").tolist()
    [5, 10, 11]
    """
    lengths = np.minimum(total, capacity + 1).astype(np.int32)
    if overlong == "truncate":
        lengths[(total > capacity) & (targets < capacity)] = capacity
    return lengths


def pack(documents: TokenizedDocuments, packing: Packing) -> PackedIndex:
    """Compute an index in memory. Raises UserError if no document of the range fits a sequence."""
    chosen = slice(packing.start, packing.stop)
    targets = documents.targets.sizes[chosen]
    total = np.add(documents.inputs.sizes[chosen], targets, dtype=np.int64)
    lengths = packed_lengths(total, targets, packing.capacity, packing.overlong)
    overlong, left_out = total > packing.capacity, lengths > packing.capacity
    kept = np.where(left_out, 0, lengths)
    _check_something_fits(documents.prefix, packing, total, left_out, kept)
    order, bounds = _greedy(lengths, packing) if packing.order == "greedy" else _best_fit(lengths, packing)
    tokens, kept_tokens = int(total.sum()), int(kept.sum(dtype=np.int64))
    used = bounds[-1, 1] if len(bounds) else 0  # the rest is greedy's incomplete last sequence
    facts = {
        "documents": len(total),
        "tokens": tokens,
        "overlong_documents": int(overlong.sum()),
        "left_out_documents": int(left_out.sum()),
        "lost_tokens": tokens - kept_tokens,
        "capacity": packing.capacity,
        "packed_tokens": packing.epochs * kept_tokens - int(kept[order[used:]].sum(dtype=np.int64)),
    }
    order += packing.start
    return PackedIndex(order, bounds, facts)


def loss_remedy(facts: dict[str, int], overlong: str) -> str:
    """What to do, for the end of a message, if documents that are too long cost more than MUCH_LOST
    of the tokens; else nothing."""
    if facts["lost_tokens"] <= MUCH_LOST * facts["tokens"]:
        return ""
    return "; raise --seq-length" + (", or cut them with --overlong truncate" if overlong == "drop" else "")


def _check_something_fits(
    prefix: str, packing: Packing, total: np.ndarray, left_out: np.ndarray, kept: np.ndarray
) -> None:
    if len(total) == 0:
        raise UserError(f"{prefix}: the range has no documents; widen START:END or use a larger dataset")
    if left_out.all():
        remedy = "" if packing.overlong == "truncate" else " or give --overlong truncate"
        raise UserError(
            f"{prefix}: all {len(total)} documents are longer than a packed sequence of {packing.capacity} tokens "
            f"(the shortest has {total.min()}); raise --seq-length{remedy}"
        )
    if kept.max() == 0:
        raise UserError(
            f"{prefix}: all {(~left_out).sum()} documents that fit a packed sequence are empty; make the dataset again"
        )


def _greedy(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(packing.seed)
    epochs = np.empty((packing.epochs, len(lengths)), np.int64)
    for epoch in epochs:
        epoch[:] = np.arange(len(lengths))
        random.shuffle(epoch)
    order = epochs.reshape(-1)
    bounds, incomplete = _packing.greedy(lengths, order, packing.capacity)
    if packing.keep_last and incomplete < len(order):
        bounds = np.concatenate([bounds, [[incomplete, len(order)]]])
    return order, bounds


def _best_fit(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    orders, ends = [], [np.zeros(1, np.int64)]
    for epoch in range(packing.epochs):
        seed = hashlib.blake2b(f"{packing.seed} {epoch}".encode(), digest_size=8).digest()
        order, ends_in_epoch = _packing.best_fit(
            lengths, packing.capacity, packing.lookahead, int.from_bytes(seed, "little")
        )
        orders.append(order)
        ends.append(ends[-1][-1] + ends_in_epoch)
    edges = np.concatenate(ends)
    return np.concatenate(orders) if len(orders) > 1 else orders[0], np.stack([edges[:-1], edges[1:]], axis=1)


def load_index(documents: TokenizedDocuments, packing: Packing, cache: str | None = None) -> PackedIndex:
    """The index from disk, built first if it does not exist.

    It is in `<prefix>_packing/` next to the data, or in the directory `cache`, under a name that
    contains a digest of the settings and of the data's lengths. Raises UserError.
    """
    settings = {"format": FORMAT, "lengths": documents.fingerprint, **asdict(packing)}
    if packing.order == "greedy":
        del settings["lookahead"]  # has no effect
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
    prefix = Path(documents.prefix)
    parent = (Path(cache) if cache else prefix.parent) / f"{prefix.name}_packing"
    name = f"{packing.start}-{packing.stop}_row{packing.capacity}_{packing.order}_seed{packing.seed}_epochs{packing.epochs}_{digest}"
    directory = parent / name

    def build(partial: Path) -> None:
        try:
            index = pack(documents, packing)
        except MemoryError:
            raise UserError(
                f"{documents.prefix}: the packing index of {packing.epochs:,} epochs of {counted(packing.stop - packing.start, 'document')} "
                "does not fit in memory; use more data, train for fewer iterations, or use a larger machine"
            ) from None
        _save_array(partial / "documents.npy", np.asarray(index.documents))
        _save_array(partial / "rows.npy", np.asarray(index.bounds))
        (partial / "index.json").write_text(
            json.dumps({"settings": settings, "facts": index.facts}, indent=1), encoding="utf-8"
        )

    build_once(directory, build)
    return _open_index(directory, packing)


def _open_index(directory: Path, packing: Packing) -> PackedIndex:
    """An index on disk. Its arrays are checked as far as their sizes tell; `PackedDocuments` checks
    each sequence that it reads."""
    facts = require(read_json(directory / "index.json", remedy=REBUILD), "facts", dict, str(directory / "index.json"))
    for name in FACTS:
        require(facts, name, int, str(directory / "index.json"), low=0, high=2**62)
    documents, bounds = _open_array(directory / "documents.npy"), _open_array(directory / "rows.npy", 2)
    per_epoch = facts["documents"] - (0 if packing.order == "greedy" else facts["left_out_documents"])
    if (
        facts["documents"] != packing.stop - packing.start
        or facts["capacity"] != packing.capacity
        or facts["tokens"] < max(1, facts["lost_tokens"])
        or len(documents) != packing.epochs * per_epoch
    ):
        raise damaged(directory, "its files do not fit together")
    return PackedIndex(documents, bounds, facts, directory)


def _save_array(path: Path, array: np.ndarray) -> None:
    """Write the bytes of np.save, which reports a full disk without an errno."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _open_array(path: Path, *rest: int) -> FileArray:
    """An int64 array [n, *rest] in a .npy file."""
    file = file_version(str(path), REBUILD)
    try:
        with open(path, "rb") as content:
            start = content.read(NPY_HEADER_BYTES)
    except OSError as error:
        raise read_error(str(path), error, REBUILD) from error
    header = _NPY_HEADER.match(start)
    expected = f"expected a .npy file of int64 {['n', *rest]}"
    if header is None:
        raise damaged(path, expected)
    shape = tuple(int(size) for size in header["shape"].split(b",") if size)
    if len(shape) != 1 + len(rest) or shape[1:] != rest:
        raise damaged(path, f"shape {list(shape)}, {expected}")
    offset = 10 + int.from_bytes(header["length"], "little")
    if file.size != offset + 8 * prod(shape):
        raise damaged(path, f"{file.size} bytes, expected {offset + 8 * prod(shape)}")
    return FileArray(file, np.dtype(np.int64), shape, offset)


def damaged(path: Path | None, reason: str) -> UserError:
    """The error for an index whose content cannot be right."""
    return UserError(f"{path}: this packing index is damaged ({reason}); {REBUILD}")


def load_index_covering(
    documents: TokenizedDocuments, packing: Packing, num_sequences: int, cache: str | None = None
) -> PackedIndex:
    """An index with enough epochs for `num_sequences` packed sequences.

    More epochs never change earlier sequences, so a longer run begins with the same ones as a
    shorter run.
    """
    epochs, index = 1, load_index(documents, packing, cache)
    kept = index.facts["tokens"] - index.facts["lost_tokens"]  # per epoch, at least 1
    # A sequence has at most `capacity` tokens, and greedy order leaves less than one incomplete.
    enough = ceil((num_sequences + 1) * packing.capacity / max(1, kept))
    while len(index) < num_sequences:
        if epochs >= enough:
            raise damaged(index.directory, f"{epochs} epochs have {len(index)} sequences")
        estimate = ceil(num_sequences * epochs / len(index)) if len(index) else enough
        epochs = min(max(epochs + 1, estimate), enough)
        index = load_index(documents, replace(packing, epochs=epochs), cache)
    return index
