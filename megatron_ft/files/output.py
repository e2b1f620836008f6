"""Outputs that appear complete or not at all: written under a temporary name, renamed when done.

One process at a time may write an output. What a killed process leaves behind is cleaned up by the
next start: a partial file is overwritten, a scratch directory is removed.
"""

import fcntl
import gzip
import os
import shutil
import socket
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.files.os_error import remedy

STANDARD_OUTPUT = ("-", "/dev/stdout")


class OutputFile:
    """A binary file to write. `commit` gives it its name; leaving the `with` block without a commit
    removes it.

    A name that ends in .gz or .zst is compressed, unless the data already are (`compressed`). A
    symbolic link is followed: its target is replaced, the link stays. Anything but a regular file
    ("-" and /dev/stdout for standard output, a FIFO, a device) is written directly. Raises
    UserError if the file cannot be written or another process is writing it.
    """

    def __init__(self, path: str | Path, *, compressed: bool = False):
        self.path = Path(path)
        self._partial: Path | None = None
        self._file: IO[bytes]
        if str(path) in STANDARD_OUTPUT:
            if sys.stdout is None:
                raise UserError("standard output is closed; redirect it to a file or pipe, or give a file")
            self._file = open(1, "wb", closefd=False)
        else:
            with writing(path):
                if self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode):
                    self._file = open(self.path, "wb")
                else:
                    self.path = Path(os.path.realpath(path))
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._partial = self.path.with_name(self.path.name + ".partial")
                    self._file = open_locked(self._partial)
        self._stream = self._file if compressed else _compressed(self._file, self.path.suffix)

    def write(self, data: bytes) -> None:
        """Append bytes; OSError if the disk is full (see `writing`)."""
        self._stream.write(data)

    def commit(self) -> None:
        """Sync the complete file to disk and give it its final name."""
        if self._stream is not self._file:
            self._stream.close()
        if self._partial is None:
            self._file.flush()
            return
        sync_file(self._file)
        os.replace(self._partial, self.path)  # while the file is open, and so still locked
        self._partial = None

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *exception) -> None:
        if self._partial:
            self._partial.unlink(missing_ok=True)
        for file in (self._stream, self._file):
            with suppress(OSError):  # a full disk fails again while flushing; the file is gone anyway
                file.close()


def _compressed(file: IO[bytes], suffix: str) -> Any:
    """A binary stream that compresses into `file` according to the suffix and leaves `file` open;
    `file` itself for other suffixes."""
    if suffix == ".gz":
        return gzip.GzipFile("", "wb", 6, file, mtime=0)  # no name, no time: same rows, same bytes
    if suffix == ".zst":
        return zstandard.ZstdCompressor().stream_writer(file, closefd=False)
    return file


def check_not_input(output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """UserError if an output is one of the files that are read."""
    for path in inputs:
        if path and str(output) not in STANDARD_OUTPUT and os.path.realpath(path) == os.path.realpath(output):
            raise UserError(f"{path}: is both input and output and would be overwritten; give the output another name")


def open_locked(path: str | Path) -> IO[bytes]:
    """An empty file, locked until it is closed. Raises UserError if another process has it open."""
    file = open(path, "ab", buffering=1 << 20)
    try:
        _lock(file.fileno())
        if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    raise UserError(
        f"{path}: another process is writing this file; wait for it, or give each process a different output, "
        "such as PREFIX-$SLURM_ARRAY_TASK_ID"
    )


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """An empty directory `parent/name-HOST-xxxxxxxx`, removed at the end unless it was renamed.

    Its process holds a lock on it, so directories of the same name that killed processes of this
    host left behind are recognized, and removed first. Raises OSError if it cannot be created.
    """
    name = f"{name}-{socket.gethostname()}-"
    parent.mkdir(parents=True, exist_ok=True)
    for entry in list(parent.iterdir()):
        if entry.name.startswith(name):
            _remove_if_abandoned(entry)
    path, handle = _make_locked(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _make_locked(parent: Path, name: str) -> tuple[Path, int]:
    """A new directory and the open handle that holds its lock."""
    while True:
        path = parent / f"{name}{uuid.uuid4().hex[:8]}"
        path.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            _lock(handle, wait=True)
            if path.exists():  # no other process removed it as abandoned before it was locked
                return path, handle
            os.close(handle)


def _remove_if_abandoned(path: Path) -> None:
    """Remove a scratch directory whose process is gone. A directory that cannot be locked stays."""
    with suppress(OSError), locked_if_abandoned(path) as abandoned:
        if abandoned:
            shutil.rmtree(path)


@contextmanager
def locked_if_abandoned(path: Path) -> Iterator[bool]:
    """Whether the process of a scratch directory is gone, so that its lock is free: it is then held
    here. False where locks are not supported. Raises OSError if the directory cannot be opened."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        abandoned = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            abandoned = False
        yield abandoned
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = False) -> None:
    """Lock a file for this process; BlockingIOError if another process holds the lock. On a file
    system without locks nothing is locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError raised while writing `path` (no space, no permission, too many open files)
    into a UserError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what_to_do = remedy(error, "choose another path")
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {what_to_do}") from error
