"""The row schema of CommitPack: a commit that modified one file, with the file before and after."""

from dataclasses import dataclass
from typing import Any

from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, parse_object, text_of, to_line

# The fields that training text is made of; a row without one of them is of no use.
TEXT_FIELDS = ("old_contents", "new_contents", "subject")


@dataclass(frozen=True)
class CommitRow:
    """One row, its keys in the order of CommitPack and CommitPackFT (arXiv 2308.07124)."""

    commit: str  # commit id, 40 hexadecimal digits
    old_file: str  # path before the commit, relative to the repository root
    new_file: str  # path after the commit
    old_contents: str  # text of the file before the commit
    new_contents: str  # text of the file after the commit
    subject: str  # first paragraph of the message, on one line; the instruction in training
    message: str  # complete message
    lang: str  # display name of the language, see languages.py
    license: str  # identifier of the repository's license, or "unknown", see licenses.py
    repos: str  # comma-separated names of the repositories that contain the commit

    def to_json(self) -> bytes:
        """The row as one JSONL line, in UTF-8, with its newline."""
        return to_line(vars(self))


def parse_commit(line: bytes | None) -> dict[str, Any]:
    """Parse one JSONL line whose TEXT_FIELDS are strings; other fields are returned as found.

    Raises BadRow if the line is not a JSON object (None is a line over the length limit), or as
    `check_commit`.

    >>> parse_commit(b'{"old_contents": "", "new_contents": "x", "subject": 1}')
    Traceback (most recent call last):
    megatron_ft.files.jsonl_row.BadRow: 'subject' is an integer, not a string
    """
    row = parse_object(line)
    check_commit(row, line)
    return row


def check_commit(row: dict[str, Any], line: bytes | None = None) -> None:
    """Raise BadRow if a text field of a row is missing, not a string, or contains a lone surrogate.

    `line` is the JSONL line that the row was parsed from, None for parquet.
    """
    for name in TEXT_FIELDS:
        if name not in row:
            raise BadRow(f"{NO_KEY} {name!r}; {keys_of(row)}")
        text_of(row, name, line)
