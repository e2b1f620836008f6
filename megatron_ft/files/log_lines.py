"""Reading the .jsonl files that a run appends to. A line that a crash or a full disk damaged is
skipped: a run must not fail over its own log."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ft.files.json_file import is_a, parse_integer

MAX_LINE_BYTES = 1 << 20  # no program writes a longer one; the pieces of such a line are skipped


def read_lines(path: Path, fields: Mapping[str, type] | None = None, last_bytes: int | None = None) -> list[dict]:
    """The objects of a .jsonl file without damaged lines; [] if the file does not exist.

    `fields` are keys that a line must have, and the exact type of each (see `json_file.is_a`). With
    `last_bytes` only the end of the file is read.
    """
    if not path.is_file():
        return []
    records = (parse_log_line(line) for line in _lines(path, last_bytes))
    required = (fields or {}).items()
    return [
        record
        for record in records
        if record is not None and all(is_a(record.get(key), kind) for key, kind in required)
    ]


def _lines(path: Path, last_bytes: int | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        if last_bytes is not None and (start := os.fstat(file.fileno()).st_size - last_bytes) > 0:
            file.seek(start)
            file.readline(MAX_LINE_BYTES)  # the end of a line that began earlier
        while line := file.readline(MAX_LINE_BYTES):
            yield line


def parse_log_line(line: str | bytes) -> dict | None:
    """The object on a line of a .jsonl file; None if the line is truncated or otherwise damaged.

    >>> parse_log_line('{"iteration": 1}\\n')
    {'iteration': 1}
    >>> parse_log_line('{"iterat')
    >>> parse_log_line(b"\\xff\\xfe\\n")
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        record = json.loads(text, parse_int=parse_integer) if text.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
