"""Megatron's MMIDIDX token files: a `.bin` with the tokens of all sequences, an `.idx` of offsets.

Byte for byte the format of Megatron-LM's `indexed_dataset` with the mmap implementation, which both
it and Megatron-Core's `IndexedDataset` read. The `.idx`, all little-endian: 9 bytes
`MMIDIDX\\0\\0`; uint64 version 1; uint8 dtype code; uint64 number of sequences n; uint64 number of
document bounds; int32 sizes[n] in tokens; int64 pointers[n] in bytes; int64 document bounds. We
write one sequence per document, so the bounds are 0..n.

A dataset is two such pairs, one per field (`field_paths`); conversations have a third one, of bytes
(`learned_path`). Writers use temporary names, and `commit` makes all files appear together, so a
killed run leaves nothing that looks complete.
"""

import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ft.data.file_array import FileArray, FileVersion, file_version, read_error
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.files.first_bytes import describe, what_it_is
from megatron_ft.files.output import open_locked

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
# Megatron's table of dtypes (megatron/data/indexed_dataset.py): those of token ids, and the others.
DTYPES: dict[int, np.dtype] = {
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
MASK = {1: np.dtype("u1")}
OTHER_DTYPES = {1: "uint8 values", 2: "int8 values", 6: "float64 values", 7: "float32 values"}
CODES = {dtype: code for code, dtype in (DTYPES | MASK).items()}
_FILES_OF_A_PREFIX = re.compile(
    r"(_(inputs|targets|learned)_document(\.(bin|idx))?|_rejected\.jsonl|_made_from\.json|_packing/?)$"
)
CHUNK = 1 << 16  # sequences per step of checking or writing an .idx, to bound memory
BLOCK = 8  # sequences per start kept in memory
MISSING = "make a tokenized dataset with preprocess/tokenize.py"
DAMAGED = "copy the file again, or make the dataset again with preprocess/tokenize.py"


def field_paths(prefix: str | Path) -> tuple[str, str]:
    """Paths, without suffix, of a dataset's two fields, inputs and targets.

    >>> field_paths("data/train")
    ('data/train_inputs_document', 'data/train_targets_document')
    """
    return f"{prefix}_inputs_document", f"{prefix}_targets_document"


def learned_path(prefix: str | Path) -> str:
    """Path, without suffix, of the marks of a dataset's learned tokens (see data/documents.py)."""
    return f"{prefix}_learned_document"


def prefix_of(path: str) -> str:
    """The prefix of the dataset that a file belongs to, so that a shell's PREFIX* can be given; any
    other text is returned as is.

    >>> prefix_of("data/part-1_inputs_document.bin")
    'data/part-1'
    >>> prefix_of("data/part-1")
    'data/part-1'
    """
    return _FILES_OF_A_PREFIX.sub("", path)


def stored_counts(path: str | Path) -> tuple[int, int]:
    """Sequences and tokens of a pair, from its header and the size of its `.bin`: a quick look.

    Raises UserError if one of the files is missing or the `.idx` is not an index of tokens.
    """
    index, data = (file_version(f"{path}{suffix}", MISSING) for suffix in (".idx", ".bin"))
    try:
        with open(index.path, "rb") as file:
            dtype, count, _ = _read_header(file, index, DTYPES)
    except OSError as error:
        raise read_error(index.path, error, MISSING) from error
    return count, data.size // dtype.itemsize


class IndexedReader:
    """Sequences of one `.bin/.idx` pair. `reader[i]` is an array [tokens] of `reader.dtype`, read
    from the file.

    dtypes: those it may have, DTYPES for token ids or MASK, by their codes.
    sizes: int32 [n], tokens of each sequence. num_tokens: their sum.

    The complete index is checked when it is opened: no length is negative, each sequence starts
    where the previous one ends, as every writer of Megatron's format lays them out, and the last
    one ends with the `.bin`. Raises UserError if a file is missing, has another format or fails
    this check, and later if a file is truncated while it is in use.
    """

    def __init__(self, path: str | Path, dtypes: Mapping[int, np.dtype] = DTYPES):
        self.path = str(path)
        index = file_version(self.path + ".idx", MISSING)
        data = file_version(self.path + ".bin", MISSING)
        try:
            with open(index.path, "rb") as file:
                self.dtype, self.sizes, self._starts = _read_index(file, index, dtypes)
        except OSError as error:
            raise read_error(index.path, error, MISSING) from error
        self.num_tokens = int(self._starts[-1])
        expected = self.num_tokens * self.dtype.itemsize
        if data.size != expected:
            found = (
                what_it_is(Path(data.path), {"nul"})
                or f"{data.size} bytes, expected {expected} from its index; {DAMAGED}"
            )
            raise UserError(f"{data.path}: {found}")
        self._tokens = FileArray(data, self.dtype, (self.num_tokens,))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read_many([range(len(self.sizes))[i]])[0]

    def read_many(self, ids: Iterable[int]) -> list[np.ndarray]:
        """The sequences of these numbers, each 0 or more."""
        starts, counts = [], []
        for i in ids:
            block = i // BLOCK
            *before, count = self.sizes[block * BLOCK : i + 1].tolist()
            starts.append(int(self._starts[block]) + sum(before))
            counts.append(count)
        return self._tokens.read_many(starts, counts)


def _read_header(file: BinaryIO, index: FileVersion, dtypes: Mapping[int, np.dtype]) -> tuple[np.dtype, int, int]:
    """The dtype, the number of sequences and that of document bounds of an `.idx`."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
        found = describe(header) or "not a Megatron MMIDIDX index; make it with preprocess/tokenize.py"
        raise UserError(f"{index.path}: {found}")
    _, version, code, count, num_bounds = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{index.path}: version {version} of the format, expected {VERSION}; {DAMAGED}")
    if code not in dtypes:
        other = f"{DTYPES[code].name} values" if code in DTYPES else "values of an unknown type"
        supported = ", ".join(dtype.name for dtype in dtypes.values())
        expected = f"token ids of one of {supported}" if dtypes is DTYPES else f"marks of type {supported}"
        raise UserError(
            f"{index.path}: {OTHER_DTYPES.get(code, other)} (dtype code {code}), expected {expected}; "
            "make it with preprocess/tokenize.py"
        )
    return dtypes[code], count, num_bounds


def _read_index(
    file: BinaryIO, index: FileVersion, dtypes: Mapping[int, np.dtype]
) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """The dtype, the lengths and the block starts (see `_check_pointers`) of a checked `.idx`."""
    dtype, count, num_bounds = _read_header(file, index, dtypes)
    size = HEADER.size + 12 * count + 8 * num_bounds
    if count and index.size == size + count:
        raise UserError(
            f"{index.path}: has the modes of a multimodal dataset after its document bounds, expected token ids only; "
            "make it with preprocess/tokenize.py"
        )
    if index.size != size:
        raise UserError(
            f"{index.path}: {index.size} bytes, expected {size} from its header "
            f"({count} sequences, {num_bounds} document bounds); {DAMAGED}"
        )
    sizes = _read_values(file, index, np.dtype("<i4"), count)
    if count and sizes.min() < 0:
        i = int(np.argmax(sizes < 0))
        raise UserError(f"{index.path}: sequence {i} has a length of {sizes[i]} tokens; {DAMAGED}")
    starts = _check_pointers(file, index, sizes, dtype.itemsize)
    _check_bounds(file, index, count, num_bounds)
    return dtype, sizes, starts


def _check_pointers(file: BinaryIO, index: FileVersion, sizes: np.ndarray, itemsize: int) -> np.ndarray:
    """Check that each sequence starts where the previous one ends.

    Returns int64 [ceil(n / BLOCK) + 1], the first token of every BLOCK-th sequence and the end of
    the last one: a table of all starts would take twice the memory of the lengths.
    """
    starts = [np.zeros(0, np.int64)]
    edges = np.zeros(CHUNK + 1, np.int64)
    for first in range(0, len(sizes), CHUNK):
        lengths = sizes[first : first + CHUNK]
        count = len(lengths)
        np.cumsum(lengths, dtype=np.int64, out=edges[1 : count + 1])
        edges[1 : count + 1] += edges[0]
        pointers = _read_values(file, index, np.dtype("<i8"), count)
        expected = edges[:count] * itemsize
        if not (pointers == expected).all():
            i = int(np.argmax(pointers != expected))
            raise UserError(
                f"{index.path}: sequence {first + i} starts at byte {pointers[i]} of the .bin, expected {expected[i]}, "
                f"where the previous one ends; {DAMAGED}"
            )
        starts.append(edges[-first % BLOCK : count : BLOCK].copy())
        edges[0] = edges[count]
    return np.concatenate([*starts, edges[:1]])


def _check_bounds(file: BinaryIO, index: FileVersion, count: int, num_bounds: int) -> None:
    """The first sequences of documents rise from 0 to `count`. An old merge_datasets of Megatron
    wrote only the 0."""
    last = 0
    for first in range(0, num_bounds, CHUNK):
        bounds = _read_values(file, index, np.dtype("<i8"), min(CHUNK, num_bounds - first))
        rises = bounds[0] >= last and bool((bounds[1:] >= bounds[:-1]).all())
        if not rises or (first == 0 and bounds[0] != 0):
            raise UserError(f"{index.path}: its document bounds do not rise from 0 to {count}; {DAMAGED}")
        last = int(bounds[-1])
    if num_bounds == 0 or (num_bounds > 1 and last != count):
        raise UserError(f"{index.path}: its document bounds end at {last}, expected {count}; {DAMAGED}")


def _read_values(file: BinaryIO, index: FileVersion, dtype: np.dtype, count: int) -> np.ndarray:
    """The next `count` values of an open index."""
    data = file.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise UserError(f"{index.path}: truncated while it was read; {DAMAGED}")
    return np.frombuffer(data, dtype)


class IndexedWriter:
    """Writes one `.bin/.idx` pair sequence by sequence, in constant memory.

    Everything goes to `<path>.bin.partial` and the like until `commit([writer, ...])`. Leaving the
    `with` block without a commit removes these files.
    """

    def __init__(self, path: str | Path, dtype: np.dtype):
        self.path, self.dtype = str(path), np.dtype(dtype)
        self.num_sequences = self.num_tokens = 0
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open_locked(self.path + ".bin.partial")
        self._sizes = open(self.path + ".sizes.partial", "w+b", buffering=1 << 16)

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one sequence of token ids; OverflowError if an id does not fit the dtype."""
        self.add_many(np.array(tokens, self.dtype).tobytes(), [len(tokens)])

    def add_many(self, data: bytes, sizes: Sequence[int] | np.ndarray) -> None:
        """Append sequences of `sizes` tokens. `data` is their concatenated ids, in the file's
        dtype."""
        lengths = np.asarray(sizes, "<i4")
        tokens = int(lengths.sum(dtype=np.int64))
        if len(data) != tokens * self.dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for {tokens} tokens of {self.dtype}")
        self._bin.write(data)
        self._sizes.write(lengths.tobytes())
        self.num_sequences += len(lengths)
        self.num_tokens += tokens

    def add_file(self, path: str | Path) -> None:
        """Append every sequence of another pair of the same dtype."""
        other = IndexedReader(path, DTYPES | MASK)
        if other.dtype != self.dtype:
            raise UserError(
                f"{path}.idx: tokens are {other.dtype}, expected {self.dtype}; tokenize all parts with the same tokenizer"
            )
        self._bin.flush()
        start = self._bin.tell()
        with open(f"{path}.bin", "rb") as file:
            shutil.copyfileobj(file, self._bin, 1 << 20)
        copied, expected = self._bin.tell() - start, other.num_tokens * self.dtype.itemsize
        if copied != expected:
            raise UserError(
                f"{path}.bin: {copied} bytes when it was copied, {expected} when it was opened; run merge.py again"
            )
        self._sizes.write(other.sizes.astype("<i4").tobytes())
        self.num_sequences += len(other)
        self.num_tokens += other.num_tokens

    def finish(self) -> None:
        """Write the index and sync both files to disk, still locked and under temporary names."""
        sync_file(self._bin)
        index = open(self.path + ".idx.partial", "wb", buffering=1 << 20)
        n, start = self.num_sequences, 0
        index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1))
        self._sizes.seek(0)
        shutil.copyfileobj(self._sizes, index, 1 << 20)
        self._sizes.seek(0)
        while chunk := self._sizes.read(4 * CHUNK):
            ends = start + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, n + 1, CHUNK):
            index.write(np.arange(first, min(first + CHUNK, n + 1), dtype="<i8").tobytes())
        sync_file(index)
        index.close()
        self._sizes.close()
        os.unlink(self.path + ".sizes.partial")

    def discard(self) -> None:
        """Remove the temporary files and release the lock; no effect after a commit."""
        if self._bin.closed:
            return
        for suffix in (".bin.partial", ".sizes.partial", ".idx.partial"):
            Path(self.path + suffix).unlink(missing_ok=True)
        for file in (self._sizes, self._bin):
            with suppress(OSError):  # a full disk fails again while flushing; the file is gone anyway
                file.close()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.discard()


def commit(writers: Iterable[IndexedWriter], absent: Iterable[str] = ()) -> None:
    """Finish all writers and give their files the final names.

    absent: paths, without suffix, of the pairs that an earlier dataset of this name may have and
    this one does not; they are removed.

    Old indices are removed first and new ones appear last: killed at any point, no index is left
    next to tokens of another dataset.
    """
    writers = list(writers)
    for writer in writers:
        writer.finish()
    for path in (*absent, *(writer.path for writer in writers)):
        Path(path + ".idx").unlink(missing_ok=True)
    for path in absent:
        Path(path + ".bin").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        for writer in writers:
            os.replace(writer.path + suffix + ".partial", writer.path + suffix)
    for writer in writers:
        writer._bin.close()  # releases the lock
