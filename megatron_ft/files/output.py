"""Outputs that appear whole or not at all: written under a temporary name, renamed when done, by one process at a time.

What a killed process leaves behind is taken by the next start: a partial file is written anew, a scratch directory is removed.
"""

import fcntl
import gzip
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import zstandard

from megatron_ft.errors import UserError

STANDARD_OUTPUT = ("-", "/dev/stdout")


class OutputFile:
    """A binary file to write; `commit` gives it its name, leaving the `with` block without one removes it.

    A name that ends in .gz or .zst is compressed. A link is followed: what it points to is replaced, the link stays. What is no regular
    file ("-" and /dev/stdout for standard output, a FIFO, a device) is written as it comes. UserError where it cannot be written, or
    another process is writing it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._partial = None
        if str(path) in STANDARD_OUTPUT:
            self._file = open(1, "wb", closefd=False)
        else:
            with writing(path):
                if self.path.exists() and not stat.S_ISREG(self.path.stat().st_mode):
                    self._file = open(self.path, "wb")
                else:
                    self.path = Path(os.path.realpath(path))
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._partial = self.path.with_name(self.path.name + ".partial")
                    self._file = open_alone(self._partial)
        self._stream = _compressed(self._file, self.path.suffix)

    def write(self, data: bytes) -> None:
        """Append bytes; OSError where the disk is full (see `writing`)."""
        self._stream.write(data)

    def commit(self) -> None:
        """The file is whole: on disk, under its own name."""
        if self._stream is not self._file:
            self._stream.close()
        self._file.flush()
        if self._partial:
            os.fsync(self._file.fileno())
            os.replace(self._partial, self.path)  # before the lock goes with the file
            self._partial = None

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *exception) -> None:
        if self._partial:
            self._partial.unlink(missing_ok=True)
        for file in (self._stream, self._file):
            with suppress(OSError):  # a full disk fails again when buffers are flushed; the file is gone anyway
                file.close()


def _compressed(file, suffix: str):
    """A stream that compresses into `file` as the suffix says, and leaves `file` open; `file` itself for other names."""
    if suffix == ".gz":
        return gzip.GzipFile("", "wb", 6, file, mtime=0)  # no name, no time: the same rows give the same bytes
    if suffix == ".zst":
        return zstandard.ZstdCompressor().stream_writer(file, closefd=False)
    return file


def open_alone(path: str | Path):
    """An empty file to write that no other process is writing; UserError where one is. The lock goes when the file is closed."""
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
        f"{path}: another process is writing this; wait for it, or give each process an output of its own, "
        "such as PREFIX-$SLURM_ARRAY_TASK_ID"
    )


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """An empty directory `parent/name-HOST-xxxxxxxx`, removed at the end where it is still there.

    Its process holds a lock on it. So what killed processes of this host left behind under the same name is known, and removed first.
    OSError where it cannot be made.
    """
    name = f"{name}-{socket.gethostname()}-"
    parent.mkdir(parents=True, exist_ok=True)
    for entry in list(parent.iterdir()):
        if entry.name.startswith(name):
            _remove_leftover(entry)
    path, handle = _claim(parent, name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _claim(parent: Path, name: str) -> tuple[Path, int]:
    """A new directory and the open handle that holds its lock."""
    while True:
        path = parent / f"{name}{uuid.uuid4().hex[:8]}"
        path.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            _lock(handle, wait=True)
            if path.exists():  # no other start took it for a leftover before it was locked
                return path, handle
            os.close(handle)


def _remove_leftover(path: Path) -> None:
    """Remove a scratch directory whose process is gone: its lock is free. One that cannot be locked stays."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(handle)


def _lock(handle: int, wait: bool = False) -> None:
    """Lock a file for this process; BlockingIOError where another has it. A file system without locks goes without."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the system says about writing `path` (no space, no permission) into a UserError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space there, or name another place"
        ) from error
