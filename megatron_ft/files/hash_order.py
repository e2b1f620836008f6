"""Random choices by hash: an order, or a fraction, that depends on a seed and on texts only.

So a choice is independent of the order of the rows, of how they are split into files or shards, and
of memory: rows are spilled to disk and read back in the order of their keys.
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from megatron_ft.progress import Progress

KEY_BYTES = 16
DIGIT_BITS = 6
RECORD = struct.Struct(f"<{KEY_BYTES}sI")  # header of a spilled row: its key and the length of its line
ROW_OVERHEAD = 200  # bytes per row in memory in addition to its line: key, objects, dict entry


def key_of(texts: Sequence[str], seed: int) -> bytes:
    """Hash of the seed and the texts, KEY_BYTES long, by which rows are compared and ordered."""
    digest = blake2b(f"{seed} {len(texts[0])} ".encode(), digest_size=KEY_BYTES)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def fraction_of(texts: Sequence[str], seed: int) -> float:
    """A number in [0, 1) by the hash of the seed and the texts: below f for a fraction f of rows.

    >>> sum(fraction_of([str(n)], seed=1) < 0.25 for n in range(1000))
    229
    """
    return int.from_bytes(key_of(texts, seed)[:4]) / 2**32


class Buckets:
    """Rows on disk, distributed over 2^DIGIT_BITS files by a digit of their keys: digit `depth`.

    A file that does not fit in memory is distributed again by the next digit. Few files are open at
    a time, since a process may be limited to 256.
    """

    def __init__(self, directory: Path, depth: int):
        self.directory, self.depth = directory, depth
        self._shift = 8 * KEY_BYTES - DIGIT_BITS * (depth + 1)
        directory.mkdir(exist_ok=True)
        self._files = [open(directory / f"{digit:02x}", "wb", buffering=1 << 15) for digit in range(1 << DIGIT_BITS)]

    def add(self, key: bytes, line: bytes) -> None:
        """Append a row to its file."""
        file = self._files[int.from_bytes(key) >> self._shift & ((1 << DIGIT_BITS) - 1)]
        file.write(RECORD.pack(key, len(line)))
        file.write(line)

    def in_order(self, memory: int, progress: Progress, *, smallest: bool = False) -> Iterator[bytes]:
        """Yield the first line of each key, or the smallest, whatever the order they were added in;
        ordered by key. Each file is deleted once it is read.

        No more than `memory` bytes of rows are held at a time, unless all have the same key.
        """
        for file in self._files:
            file.close()
        for path in [Path(file.name) for file in self._files]:
            first: dict[bytes, bytes] = {}
            size = count = 0
            deeper: Buckets | None = None
            for key, line in _records(path):
                count += 1
                if deeper is not None:
                    deeper.add(key, line)
                elif key not in first:
                    first[key] = line
                    size += len(line) + ROW_OVERHEAD
                    if size > memory and len(first) > 1:
                        deeper = Buckets(path.with_suffix(".divided"), self.depth + 1)
                        for item in first.items():
                            deeper.add(*item)
                        first.clear()
                elif smallest and line < first[key]:
                    size += len(line) - len(first[key])
                    first[key] = line
            path.unlink()
            if deeper is not None:
                yield from deeper.in_order(memory, progress, smallest=smallest)
            for key in sorted(first):
                yield first[key]
            progress.update(count if deeper is None else 0)


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and lines of a spilled file, in the order they were written."""
    with open(path, "rb") as file:
        while head := file.read(RECORD.size):
            key, length = RECORD.unpack(head)
            yield key, file.read(length)
