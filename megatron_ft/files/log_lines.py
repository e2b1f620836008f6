"""Reading the .jsonl files that a run appends to: a line that a crash truncated is left out."""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """Objects of a .jsonl file, none when it does not exist; torn lines are left out."""
    if not path.exists():
        return []
    with path.open() as file:
        return [record for line in file if (record := whole_line(line)) is not None]


def whole_line(line: str) -> dict | None:
    """The object on a line of a .jsonl file, or None for a line torn by a crash or a full disk."""
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
