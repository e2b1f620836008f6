"""Arrays in files, read piece by piece with pread.

A memory map would kill the process with SIGBUS when its file is truncated or the disk fails, and
would hold a descriptor as long as it exists. pread reports an error instead, and the descriptors
come from one bounded pool, so a blend of hundreds of datasets fits a small `ulimit -n`.
"""

import errno
import os
import resource
import stat
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.files.os_error import remedy

# Descriptors in the pool: at most a quarter of what this process may open.
_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
POOL_SIZE = 256 if _limit == resource.RLIM_INFINITY else max(8, min(256, _limit // 4))


class FileVersion(NamedTuple):
    """A file as it was when it was opened first."""

    path: str
    size: int
    inode: int
    modified: int  # ns


def file_version(path: str, otherwise: str) -> FileVersion:
    """The current version of a regular file. `otherwise` ends the UserError if it is missing."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise read_error(path, error, otherwise) from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{path}: {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}; {otherwise}"
        )
    return FileVersion(path, status.st_size, status.st_ino, status.st_mtime_ns)


def read_error(path: str, error: OSError, otherwise: str) -> UserError:
    """The UserError for a file that cannot be read."""
    return UserError(f"{path}: {error.strerror or error}; {remedy(error, otherwise)}")


class FileArray:
    """The array of `dtype` and `shape` at byte `offset` of a file. `array[i]` and `array[a:b]` read
    from the file; `np.asarray(array)` reads all of it.

    Each read raises UserError if the file has been truncated or cannot be read.
    """

    def __init__(self, file: FileVersion, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0):
        self.dtype, self.shape = np.dtype(dtype), shape
        self._file, self._offset = file, offset
        self._item_bytes = self.dtype.itemsize * prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                raise IndexError(f"step {step}; only consecutive items can be read")
            return self.read(start, max(0, stop - start))
        return self.read(range(self.shape[0])[key], 1)[0]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` items from `start` on, a read-only copy. The caller checks the bounds."""
        return self.read_many([start], [count])[0]

    def read_many(self, starts: Sequence[int], counts: Sequence[int]) -> list[np.ndarray]:
        """Several times `read`."""
        size, dtype, rest = self._item_bytes, self.dtype, self.shape[1:]
        found = []
        try:
            descriptor = _open(self._file)  # open while this name exists, even if it leaves the pool
            for start, count in zip(starts, counts, strict=True):
                offset, num_bytes = self._offset + start * size, count * size
                data = os.pread(descriptor.number, num_bytes, offset)
                if len(data) < num_bytes:
                    data += self._read_rest(descriptor, offset + len(data), num_bytes - len(data))
                items = np.frombuffer(data, dtype)
                found.append(items.reshape(count, *rest) if rest else items)
        except OSError as error:
            raise read_error(self._file.path, error, "run the command again") from error
        return found

    def _read_rest(self, descriptor: "_Descriptor", offset: int, num_bytes: int) -> bytes:
        """What a pread left out: Linux reads at most 2 GiB at once."""
        data = b""
        while len(data) < num_bytes:
            more = os.pread(descriptor.number, num_bytes - len(data), offset + len(data))
            if not more:
                size = os.fstat(descriptor.number).st_size
                raise UserError(
                    f"{self._file.path}: {size} bytes, but {self._file.size} when it was opened; "
                    "restore the file, and run the command again"
                )
            data += more
        return data

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(0, len(self)), dtype)


class _Descriptor:
    """An open file, closed with its last reference: a thread may still read from it when the pool
    drops it."""

    def __init__(self, path: str):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(POOL_SIZE)
def _open(file: FileVersion) -> _Descriptor:
    try:
        descriptor = _Descriptor(file.path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        _open.cache_clear()  # other parts of the program took the rest
        descriptor = _Descriptor(file.path)
    status = os.fstat(descriptor.number)
    # A touched file has another time, and on some file systems inodes change; not both.
    same = status.st_ino == file.inode or status.st_mtime_ns == file.modified
    if status.st_size != file.size or not same:
        raise UserError(f"{file.path}: replaced by another file while it was in use; run the command again")
    return descriptor
