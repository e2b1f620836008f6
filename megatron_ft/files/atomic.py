"""Replacing files and directories in one step: after a crash, the old content or the new, complete.

Everything is written next to its final name, synced to disk and renamed. Small files go through
`replace_file`; streams that may take hours through `files.output.OutputFile`, which also locks out
a second writer; directories through `rename_directory`.
"""

import os
import shutil
from pathlib import Path
from typing import IO


def sync_file(file: IO[bytes]) -> None:
    """Write an open file's buffers to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file; after a crash it has either the old content or the new.

    A device or a pipe is written to, not replaced.
    """
    if path.exists() and not path.is_file():  # opening a directory raises OSError
        with open(path, "wb") as file:
            file.write(content)
        return
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        sync_file(file)
    os.rename(new, path)
    sync_path(path.parent)


def rename_directory(scratch: Path, path: Path) -> None:
    """Give a complete scratch directory its final name, which must be free.

    After a crash `path` has every file of `scratch` or does not exist. The files themselves must be
    on disk already. Raises OSError.
    """
    sync_path(scratch)
    os.rename(scratch, path)
    sync_path(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged writer may still write to `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
