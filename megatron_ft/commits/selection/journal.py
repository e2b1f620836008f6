"""The commits of many repositories on disk, so that a killed run continues with the next one.

The journal holds one zstd frame of JSONL per repository; the manifest, one line of JSON per
repository that is done, with its end in the journal. What lies behind the last end is of a
repository that was not finished, and is cut off by the next start.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megatron_ft.commits.selection.history import Repository, commits
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file, sync_file
from megatron_ft.files.json_file import parse_json
from megatron_ft.files.jsonl_row import to_line


@dataclass(frozen=True)
class Entry:
    """A repository that is done, as a line of the manifest."""

    path: str
    status: str  # ok, empty, shallow, unreadable or same_name
    name: str
    commits: int
    license: str
    languages: list[dict[str, Any]]
    reason: str  # why it is not ok
    end: int  # bytes of the journal up to and including its commits


class Journal:
    """The journal and the manifest of one run. Raises UserError if they do not belong together."""

    def __init__(self, journal: Path, manifest: Path):
        self.path, self._manifest = journal, manifest
        self.entries = list(_read_manifest(manifest))
        self.end = self.entries[-1].end if self.entries else 0
        self._file = open(journal, "ab")
        if self._file.tell() < self.end:
            raise UserError(f"{journal}: shorter than {manifest} requires; delete both and start again")
        self._file.truncate(self.end)
        replace_file(manifest, b"".join(map(_line, self.entries)))  # without a truncated last line

    def add(self, repo: Repository) -> Entry:
        """Append the commits of a repository; those of one that git cannot read are not kept."""
        count = 0
        if repo.status == "ok":
            try:
                count = self._append(commits(repo.path, repo.name))
            except UserError as error:
                self._file.truncate(self.end)
                repo = Repository(repo.path, "unreadable", reason=str(error))
        self._file.seek(0, os.SEEK_END)
        self.end = self._file.tell()
        entry = Entry(
            str(repo.path), repo.status, repo.name, count, repo.license, repo.languages, repo.reason, self.end
        )
        with open(self._manifest, "ab") as manifest:
            manifest.write(_line(entry))
            sync_file(manifest)
        self.entries.append(entry)
        return entry

    def _append(self, records: Iterable[dict[str, Any]]) -> int:
        count = 0
        with zstandard.ZstdCompressor().stream_writer(self._file, closefd=False) as frame:
            for record in records:
                frame.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                count += 1
        sync_file(self._file)
        return count

    def forget(self, statuses: Iterable[str]) -> list[str]:
        """Take repositories with one of these statuses out of the manifest; returns their paths."""
        forgotten = [entry.path for entry in self.entries if entry.status in statuses]
        self.entries = [entry for entry in self.entries if entry.status not in statuses]
        replace_file(self._manifest, b"".join(map(_line, self.entries)))
        return forgotten

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _line(entry: Entry) -> bytes:
    return to_line(vars(entry))


def _read_manifest(path: Path) -> Iterator[Entry]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            yield Entry(**parse_json(line, f"{path}, line {number}"))
        except TypeError:
            raise UserError(
                f"{path}, line {number}: not an entry of commits_table.py; choose another --output"
            ) from None
