"""Megatron's MMIDIDX token files: a `.bin` with the tokens of all sequences, an `.idx` of offsets.

Byte for byte the format of Megatron-LM's `indexed_dataset` with the mmap implementation, which both
it and Megatron-Core's `IndexedDataset` read. The `.idx`, all little-endian: 9 bytes
`MMIDIDX\\0\\0`; uint64 version 1; uint8 dtype code; uint64 number of sequences n; uint64 number of
document bounds; int32 sizes[n] in tokens; int64 pointers[n] in bytes; int64 document bounds. We
write one sequence per document, so the bounds are 0..n.

A dataset is two such pairs, one per field (`field_paths`). Writers use temporary names, and
`commit` makes all files appear together, so a killed run leaves nothing that looks complete.
"""

import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.files.output import open_locked

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
# Integer dtypes of Megatron's table (megatron/data/indexed_dataset.py); codes 6 and 7 are floats.
DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_FILES_OF_A_PREFIX = re.compile(
    r"(_(inputs|targets)_document(\.(bin|idx))?|_rejected\.jsonl|_made_from\.json|_packing/?)$"
)
CHUNK = 1 << 20  # sequences per step of writing an .idx, to bound memory


def field_paths(prefix: str | Path) -> tuple[str, str]:
    """Paths, without suffix, of a dataset's two fields, inputs and targets.

    >>> field_paths("data/train")
    ('data/train_inputs_document', 'data/train_targets_document')
    """
    return f"{prefix}_inputs_document", f"{prefix}_targets_document"


def prefix_of(path: str) -> str:
    """The prefix of the dataset that a file belongs to, so that a shell's PREFIX* can be given; any
    other text is returned as is.

    >>> prefix_of("data/part-1_inputs_document.bin")
    'data/part-1'
    >>> prefix_of("data/part-1")
    'data/part-1'
    """
    return _FILES_OF_A_PREFIX.sub("", path)


class IndexedReader:
    """Sequences of one `.bin/.idx` pair, memory-mapped. `reader[i]` is an array [tokens] of
    `reader.dtype`, a view of the file.

    Raises UserError if a file is missing, has another format, or its length does not match the
    index.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        index = _map(self.path + ".idx")
        if len(index) < HEADER.size or index[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.path}.idx: not a Megatron MMIDIDX index; make it with preprocess/tokenize.py")
        _, version, code, self._count, bounds = HEADER.unpack_from(index)
        if version != VERSION or code not in DTYPES:
            raise UserError(
                f"{self.path}.idx: version {version}, dtype code {code}; expected version 1 of integer tokens"
            )
        expected = HEADER.size + 12 * self._count + 8 * bounds
        if len(index) != expected:
            raise UserError(
                f"{self.path}.idx: {len(index)} bytes, expected {expected} from its header; make the file again"
            )
        self.dtype = DTYPES[code]
        self._index = index
        self._pointers = np.frombuffer(index, "<i8", self._count, HEADER.size + 4 * self._count)
        data = _map(self.path + ".bin")
        expected = int(self._pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if self._count else 0
        if len(data) != expected:
            raise UserError(
                f"{self.path}.bin: {len(data)} bytes, expected {expected} from its index; make the file again"
            )
        self._tokens = np.frombuffer(data, self.dtype)

    @cached_property
    def sizes(self) -> np.ndarray:
        """int32 [n], tokens of each sequence; a copy, because the file's are not aligned."""
        return np.frombuffer(self._index, "<i4", self._count, HEADER.size).astype(np.int32)

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """int64 [documents + 1], the first sequence of each document; 0..n if each document is one
        sequence."""
        return np.frombuffer(self._index, "<i8", offset=HEADER.size + 12 * self._count).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the file."""
        return len(self._tokens)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> np.ndarray:
        if not -self._count <= i < self._count:
            raise IndexError(f"sequence {i} of {self._count} in {self.path}")
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.sizes[i])]


def _map(path: str) -> mmap.mmap | bytes:
    """The file's bytes, memory-mapped read-only; b'' for an empty file, which cannot be mapped."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; make a tokenized dataset with preprocess/tokenize.py"
        ) from error


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
        other = IndexedReader(path)
        if other.dtype != self.dtype:
            raise UserError(
                f"{path}.idx: tokens are {other.dtype}, expected {self.dtype}; tokenize all parts with the same tokenizer"
            )
        self._bin.flush()
        with open(f"{path}.bin", "rb") as file:
            shutil.copyfileobj(file, self._bin, 1 << 20)
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


def commit(writers: Iterable[IndexedWriter]) -> None:
    """Finish all writers and give their files the final names.

    Old indices are removed first and new ones appear last: killed at any point, no index is left
    next to tokens of another dataset.
    """
    writers = list(writers)
    for writer in writers:
        writer.finish()
    for writer in writers:
        Path(writer.path + ".idx").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        for writer in writers:
            os.replace(writer.path + suffix + ".partial", writer.path + suffix)
    for writer in writers:
        writer._bin.close()  # releases the lock
