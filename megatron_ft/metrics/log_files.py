"""The .jsonl files of a save directory: appending lines, and removing lines after a resume."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_ft.files.log_lines import MAX_LINE_BYTES, parse_log_line
from megatron_ft.metrics.lines import usable


class LogFiles:
    """Appends JSON objects to files of `directory`, one per line.

    A write error, such as a full disk, loses lines but does not stop the run: it is reported once
    per file with `warn`, and every further line is tried again.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._warn = warn
        self._files: dict[str, IO[bytes]] = {}
        self._failed: set[str] = set()

    def append(self, name: str, record: dict) -> None:
        """Append one line to file `name`; unbuffered."""
        path = self.directory / name
        try:
            if name not in self._files:
                self._files[name] = path.open("ab", buffering=0)
                if name in self._failed:
                    self._files[name].write(b"\n")  # end a line that was written in part
            self._files[name].write(json.dumps(record).encode() + b"\n")
            self._failed.discard(name)
        except OSError as error:
            if name not in self._failed:
                self._warn(f"{path}: {error.strerror}; lines are lost until there is free space again")
            self._failed.add(name)
            self._close(name)

    def filter(self, name: str, keep: Callable[[dict], bool]) -> None:
        """Rewrite file `name`, if it exists, with the lines that `keep` accepts, in their order.

        `keep` is called with `lines.usable` lines; damaged ones are removed. A write error leaves
        the file as it was, and is reported with `warn`.
        """
        self._close(name)
        path, filtered = self.directory / name, self.directory / f"{name}.kept"
        if not path.exists():
            return
        try:
            with path.open("rb") as source, filtered.open("wb") as target:
                while raw := source.readline(MAX_LINE_BYTES):
                    record = parse_log_line(raw)
                    line = usable(record, name) if record is not None else None
                    if line is not None and keep(line):
                        target.write(raw)
            os.replace(filtered, path)
        except OSError as error:
            self._warn(f"{path}: {error.strerror}; lines of steps that are repeated stay in it")
            with contextlib.suppress(OSError):
                filtered.unlink()

    def close(self) -> None:
        """Close all files; a further `append` opens its file again."""
        for name in list(self._files):
            self._close(name)

    def _close(self, name: str) -> None:
        if name in self._files:
            self._files.pop(name).close()
