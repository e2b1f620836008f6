"""Rows of metadata: which commits to scrape, and the published filters of what is worth it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.commits.languages import listed_language
from megatron_ft.commits.licenses import UNKNOWN
from megatron_ft.files.jsonl import Source
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, text_of
from megatron_ft.files.tables import Row, read_table

REQUIRED = ("commit", "repos", "old_file", "new_file", "subject", "message")
BLOB_IDS = ("old_sha1", "new_sha1")
OBJECT_ID = re.compile(r"[0-9a-f]{40}")
# OWNER/NAME; mirrors may have more or fewer levels. No level is "." or "..", or starts like a flag.
REPOSITORY = re.compile(r"(?!\.\.?(?:/|$))[\w.~+][\w.~+-]*(?:/(?!\.\.?(?:/|$))[\w.~+][\w.~+-]*)*", re.ASCII)
NOISE_MESSAGES = frozenset({"initial commit", "please\n", "please", "lalala"})
MAX_PART_BYTES = 64 << 20  # of text of one part's metadata, which is held in memory


@dataclass(frozen=True)
class Metadata:
    """One row: a commit that modified one file, without the file's contents. The ids of the blobs
    are "" if they are not known."""

    commit: str
    repos: str  # as found, comma-separated
    old_file: str
    new_file: str
    subject: str
    message: str
    license: str
    old_blob: str
    new_blob: str

    @property
    def repositories(self) -> list[str]:
        """The repositories that have the commit, in the order of the row, without those whose names
        cannot be part of a URL."""
        return [repo for repo in dict.fromkeys(map(str.strip, self.repos.split(","))) if REPOSITORY.fullmatch(repo)]


def metadata_of(row: Row) -> Metadata:
    """The row as Metadata; BadRow if a key is missing, or a value is not what it should be."""
    fields = row.fields
    for name in REQUIRED:
        if name not in fields:
            raise BadRow(f"{NO_KEY} {name!r}; {keys_of(fields)}")
    texts = {name: text_of(fields, name, row.line) for name in REQUIRED}
    if not OBJECT_ID.fullmatch(texts["commit"]):
        raise BadRow("'commit' is not a commit id of 40 lower-case hexadecimal digits")
    blobs = [_optional(fields, name, row) for name in BLOB_IDS]
    if any(blob and not OBJECT_ID.fullmatch(blob) for blob in blobs):
        raise BadRow("'old_sha1' or 'new_sha1' is not a blob id of 40 lower-case hexadecimal digits")
    return Metadata(**texts, license=_optional(fields, "license", row) or UNKNOWN, old_blob=blobs[0], new_blob=blobs[1])


def _optional(fields: dict[str, Any], name: str, row: Row) -> str:
    return "" if fields.get(name) is None else text_of(fields, name, row.line)


@dataclass(frozen=True)
class Filter:
    """What is dropped before anything is fetched: files of unlisted languages, messages that say
    nothing."""

    suffixes: bool
    messages: bool

    def reason(self, row: Metadata) -> str | None:
        """Why a row is dropped; None if it is kept."""
        if self.suffixes and listed_language(row.new_file) is None:
            return "suffix"
        if self.messages and row.message == f"Update {row.old_file}":
            return "update_message"
        if self.messages and row.message in NOISE_MESSAGES:
            return "noise_message"
        return None


@dataclass
class Part:
    """Consecutive rows of the input, kept and dropped."""

    rows: list[Metadata]
    rows_in: int
    dropped: Counter[str]
    consumed: int  # bytes of the input read so far


def read_parts(sources: Sequence[Source], filter: Filter, part_rows: int, skip_bad: bool) -> Iterator[Part]:
    """The input in parts of at most `part_rows` rows to scrape and MAX_PART_BYTES.

    Which rows a part has depends on the input and the arguments only. Bad rows are a UserError, or
    dropped with `skip_bad`.
    """
    part, size, consumed = Part([], 0, Counter(), 0), 0, 0
    bad: Counter[str] | None = Counter() if skip_bad else None
    for chunk in read_table(sources, bad=bad):
        consumed += chunk.consumed
        for row in chunk.rows:
            if len(part.rows) >= part_rows or size >= MAX_PART_BYTES:
                yield part
                part, size = Part([], 0, Counter(), 0), 0
            part.rows_in += 1
            part.consumed = consumed
            try:
                metadata = metadata_of(row)
            except BadRow as reason:
                if not skip_bad:
                    raise row.error(str(reason)) from None
                part.dropped["bad_row"] += 1
                continue
            if reason_to_drop := filter.reason(metadata):
                part.dropped[reason_to_drop] += 1
            else:
                part.rows.append(metadata)
                size += sum(map(len, vars(metadata).values()))
    if bad:
        part.rows_in += bad.total()
        part.dropped["bad_row"] += bad.total()
    if part.rows_in:
        yield part
