"""Whether a dataset's files still have the content that a run began with, without reading them.

A size does not change when a file is edited in place. A digest of evenly spaced blocks does, if the
edit touches one of them, and costs a few reads even for terabytes. The modification time tells of
every other edit, but also of copies with the same content, so it is only a hint.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_ft.data.file_array import file_version, read_error
from megatron_ft.data.indexed import MISSING, field_paths, learned_path

BLOCKS = 16  # per file, the first and the last included
BLOCK_BYTES = 16 << 10


def token_files(prefix: str) -> list[Path]:
    """The four files of a tokenized dataset, six if it marks which tokens are learned."""
    fields = [*field_paths(prefix)]
    if Path(learned_path(prefix) + ".idx").exists():
        fields.append(learned_path(prefix))
    return [Path(field + suffix) for field in fields for suffix in (".bin", ".idx")]


def sampled_digest(paths: Iterable[Path], digits: int = 12) -> str:
    """Digest of the sizes of files and of BLOCKS blocks of each, as hexadecimal digits. Files of at
    most BLOCKS * BLOCK_BYTES bytes are read completely.

    Raises UserError if one cannot be read.
    """
    digest = hashlib.blake2b(digest_size=digits // 2)
    for path in paths:
        size = file_version(str(path), MISSING).size
        digest.update(size.to_bytes(8, "little"))
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for offset in _offsets(size):
                    digest.update(os.pread(handle, BLOCK_BYTES, offset))
            finally:
                os.close(handle)
        except OSError as error:
            raise read_error(str(path), error, MISSING) from error
    return digest.hexdigest()


def modified(paths: Iterable[Path]) -> int:
    """When one of these files was modified last, in seconds since the epoch; 0 for no files."""
    return max((file_version(str(path), MISSING).modified // 10**9 for path in paths), default=0)


def _offsets(size: int) -> list[int]:
    """Where the sampled blocks of a file of `size` bytes start.

    >>> _offsets(20_000)
    [0, 16384]
    >>> len(_offsets(10**12)), _offsets(10**12)[-1] + BLOCK_BYTES
    (16, 1000000000000)
    """
    if size <= BLOCKS * BLOCK_BYTES:
        return list(range(0, size, BLOCK_BYTES))
    return [i * (size - BLOCK_BYTES) // (BLOCKS - 1) for i in range(BLOCKS)]
