"""Output files that appear whole or not at all: written under a temporary name, renamed when done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ft.errors import UserError


class OutputFile:
    """A binary file to write; `commit` gives it its name, leaving the `with` block without one removes it.

    `path` "-" is standard output, which is written as it comes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._standard = str(path) == "-"
        self._partial = self.path.with_name(self.path.name + ".partial")
        if self._standard:
            self._file = open(1, "wb", closefd=False)
            return
        with writing(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "wb", buffering=1 << 20)

    def write(self, data: bytes) -> None:
        """Append bytes; OSError where the disk is full (see `writing`)."""
        self._file.write(data)

    def commit(self) -> None:
        """The file is whole: on disk, under its own name."""
        self._file.flush()
        if not self._standard:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk fails again when buffers are flushed; the file goes anyway
            pass
        if not self._standard:
            self._partial.unlink(missing_ok=True)


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
