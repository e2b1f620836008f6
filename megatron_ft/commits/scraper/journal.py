"""What is known of one part of the input so far, on disk: a killed run fetches nothing twice.

The journal is a file of JSON lines, one per row and repository that was asked, with the contents.
The lines of one fetch are appended together and followed by a line that completes them; without it
they are removed by the next run. Only offsets are kept in memory.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

import orjson

from megatron_ft.commits.scraper.protocol import Result
from megatron_ft.commits.scraper.status import ANOTHER_MAY_HAVE, RETRIED, Status
from megatron_ft.files.atomic import sync_file

COMPLETE = b'{"complete": true}\n'


class Batch:
    """Results of one fetch, in a file of their own until they are complete."""

    def __init__(self, path: Path, repo: str):
        self.path, self.repo = path, repo
        self.entries: list[tuple[int, Status, int]] = []  # row, status, offset of the line
        self._file = open(path, "wb")

    def add(self, result: Result) -> None:
        """Append a result; OSError if the disk is full."""
        self.entries.append((result.row, result.status, self._file.tell()))
        row = {"row": result.row, "repo": self.repo, "status": result.status}
        if result.status == Status.OK:
            row |= {"old_contents": result.old_contents, "new_contents": result.new_contents}
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()

    def discard(self) -> None:
        """Delete the file."""
        with suppress(OSError):  # a full disk fails again while flushing
            self._file.close()
        self.path.unlink(missing_ok=True)


class Journal:
    """The journal of one part. `tried[row]` has the repositories asked for a row, and their
    statuses; never one that is to be retried."""

    def __init__(self, path: Path):
        self.path = path
        self.tried: dict[int, dict[str, Status]] = {}
        self._ok: dict[int, int] = {}  # row to the offset of its line
        self._file: IO[bytes] = open(path, "a+b")
        self._recover()

    def _recover(self) -> None:
        """Read the complete lines; cut off the rest."""
        self._file.seek(0)
        end, offset = 0, 0
        entries: list[tuple[int, str, Status, int]] = []
        for line in self._file:
            try:
                row = orjson.loads(line)
                if not line.endswith(b"\n"):
                    break
                if "complete" in row:
                    end = offset + len(line)
                    for entry in entries:
                        self._know(*entry)
                    entries = []
                else:
                    entries.append((row["row"], row["repo"], Status(row["status"]), offset))
            except (ValueError, TypeError, KeyError):  # as after a crash of the machine
                break
            offset += len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _know(self, row: int, repo: str, status: Status, offset: int) -> None:
        self.tried.setdefault(row, {})[repo] = status
        if status == Status.OK:
            self._ok[row] = offset

    def append(self, batch: Batch) -> None:
        """Move a complete batch to the journal; OSError if the disk is full."""
        assert not any(status in RETRIED for _, status, _ in batch.entries)
        base = self._file.seek(0, os.SEEK_END)
        with open(batch.path, "rb") as lines:
            shutil.copyfileobj(lines, self._file, 1 << 20)
        self._file.write(COMPLETE)
        sync_file(self._file)
        for row, status, offset in batch.entries:
            self._know(row, batch.repo, status, base + offset)

    def final(self, row: int) -> Status | None:
        """The status that no other repository can change; None if there is none so far."""
        statuses = self.tried.get(row, {}).values()
        return next((status for status in statuses if status not in ANOTHER_MAY_HAVE), None)

    def contents(self, row: int) -> tuple[str, str]:
        """The file before and after the commit, of a row that is OK."""
        self._file.seek(self._ok[row])
        found = orjson.loads(self._file.readline())
        return found["old_contents"], found["new_contents"]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, once the part has its final name."""
        self.path.unlink(missing_ok=True)
