"""`Candidate`: a commit row on its way through the rules of a filter, and `read_candidates`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from megatron_ft.commits.languages import language_of
from megatron_ft.commits.row import TEXT_FIELDS
from megatron_ft.files.jsonl import Block, Source, blocks_of, byte_ranges
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, parse_object, text_of
from megatron_ft.files.tables import BAD_ROW, Row, parquet_chunks


class Columns(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The columns of a row (see CommitRow), as they were read."""

    commit: str
    old_file: str
    old_contents: str
    new_contents: str
    subject: str
    new_file: str | None = None
    message: str | None = None
    lang: str | None = None
    license: str | None = None
    repos: str | None = None


REQUIRED = tuple(column.name for column in msgspec.structs.fields(Columns) if column.required)
OPTIONAL = tuple(column.name for column in msgspec.structs.fields(Columns) if not column.required)
decode = msgspec.json.Decoder(Columns).decode


class Candidate(msgspec.Struct, gc=False, eq=False):
    """A row whose texts rules look at and cleaning steps change."""

    columns: Columns  # the row as it was read
    line: bytes | None  # the one it was read from; None for parquet
    fields: dict[str, Any] | None  # its keys and values; None if the line tells no more than the columns
    old: str  # old_contents
    new: str  # new_contents
    path: str  # old_file
    pieces: list[str]  # of the base name of the path, between dots
    language: str  # display name; the row's own, else by the path
    subject: str
    lower: str  # the subject in lower case
    words: list[str]  # of the subject

    def set_subject(self, subject: str) -> None:
        self.subject, self.lower, self.words = subject, subject.lower(), subject.split()

    @property
    def message(self) -> str:
        return self.columns.message or ""

    @property
    def unchanged_line(self) -> bytes | None:
        """Its line; None if it has none, or if a step changed one of the texts."""
        before = self.columns
        unchanged = (
            self.subject == before.subject and self.new == before.new_contents and self.old == before.old_contents
        )
        return self.line if unchanged else None

    def row(self) -> dict[str, Any]:
        """The fields with the texts as they are now; keys keep their order."""
        fields = parse_object(self.line) if self.fields is None else self.fields
        return fields | dict(zip(TEXT_FIELDS, (self.old, self.new, self.subject), strict=True))

    def chance(self, seed: int, of: str) -> float:
        """A number in [0, 1) from a hash of the seed, the commit and the name of a decision: the
        same in every shard and every order of the rows."""
        key = f"{seed} {of} {self.columns.commit}".encode(errors="backslashreplace")
        return int.from_bytes(blake2b(key, digest_size=7).digest()) / (1 << 56)


def parse_candidate(line: bytes | None) -> Candidate:
    """The row of a line of JSONL; BadRow if it is not a row of commits.

    A line that is what it should be is decoded by its types, which is faster than parsing it and
    then checking them. Any other is parsed to find out what there is to say about it.
    """
    try:
        columns = decode(line)  # type: ignore[arg-type]
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):  # also if it has more columns
        fields = parse_object(line)
        return candidate_of(columns_of(fields, line), line, fields)
    return candidate_of(columns, line, None)


def candidate_of(columns: Columns, line: bytes | None, fields: dict[str, Any] | None) -> Candidate:
    """The row with these columns, which were read from a line or are among the fields."""
    path, subject = columns.old_file, columns.subject
    return Candidate(
        columns,
        line,
        fields,
        columns.old_contents,
        columns.new_contents,
        path,
        path.rpartition("/")[2].split("."),
        columns.lang or language_of(path),
        subject,
        subject.lower(),
        subject.split(),
    )


def columns_of(fields: dict[str, Any], line: bytes | None = None) -> Columns:
    """The columns of a row that was parsed from `line`, None for parquet; BadRow if a text is
    missing or is not a string."""
    for name in REQUIRED:
        if name not in fields:
            raise BadRow(f"{NO_KEY} {name!r}; {keys_of(fields)}")
    given = (*REQUIRED, *(name for name in OPTIONAL if fields.get(name) is not None))
    return Columns(**{name: text_of(fields, name, line) for name in given})


def read_candidates(
    sources: Sequence[Source], shard: tuple[int, int] = (1, 1), bad: Counter[str] | None = None
) -> Iterator[tuple[Iterator[Candidate], int]]:
    """The rows of shard (I, N) in order: those of a part of a file, parsed one at a time, and the
    bytes that were read for them.

    Raises UserError at a row that is not one of commits; with `bad` it is skipped and its reason
    counted there. Also raises UserError if a file cannot be read.
    """
    for source, start, stop in byte_ranges(sources, shard):
        if source.kind == "parquet":
            for chunk in parquet_chunks(source, start, stop):
                yield _of_rows(chunk.rows, bad), chunk.consumed
        else:
            for block in blocks_of(source, start, stop):
                yield _of_block(block, bad), block.consumed


def _of_block(block: Block, bad: Counter[str] | None) -> Iterator[Candidate]:
    for i, line in block.rows():
        try:
            yield parse_candidate(line)
        except BadRow as reason:
            if bad is None:
                raise block.error(i, reason, BAD_ROW) from None
            bad[str(reason)] += 1


def _of_rows(rows: Iterable[Row], bad: Counter[str] | None) -> Iterator[Candidate]:
    for row in rows:
        try:
            yield candidate_of(columns_of(row.fields), None, row.fields)
        except BadRow as reason:
            if bad is None:
                raise row.error(str(reason)) from None
            bad[str(reason)] += 1
