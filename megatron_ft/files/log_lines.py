"""Reading the .jsonl files that a run appends to, without lines truncated by a crash."""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file without truncated lines; [] if the file does not exist."""
    if not path.exists():
        return []
    with path.open() as file:
        return [record for line in file if (record := parse_log_line(line)) is not None]


def parse_log_line(line: str) -> dict | None:
    """The object on a line of a .jsonl file; None if a crash or a full disk truncated the line.

    >>> parse_log_line('{"iteration": 1}\\n')
    {'iteration': 1}
    >>> parse_log_line('{"iterat')
    """
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
