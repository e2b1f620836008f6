"""Scores of rows by a command of the user's, such as a classifier or a model as a judge."""

import math
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_ft.errors import UserError


def run_scores(command: str, rows: Path, scores: Path) -> None:
    """Run a command, which is not given to a shell, with the JSONL file `rows` as its input and
    `scores` as its output; its stderr is not redirected.

    Raises UserError if it cannot be started, or fails.
    """
    try:
        with open(rows, "rb") as reads, open(scores, "wb") as writes:
            status = subprocess.run(shlex.split(command), stdin=reads, stdout=writes).returncode
    except (OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--score-command {command!r}: cannot be started ({reason}); give a program in PATH and its arguments"
        ) from None
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise UserError(f"--score-command {command!r}: {how}; its messages are above")


def read_scores(command: str, scores: Path, rows: int) -> Iterator[float]:
    """The scores that a command wrote, one per row; UserError if a line is not a number, or there
    are fewer or more than `rows`."""
    count = 0
    expected = f"expected one number per row, {rows:,} lines in all"
    with open(scores, "rb") as lines:
        for count, line in enumerate(lines, 1):
            if count > rows:
                raise UserError(f"--score-command {command!r}: wrote more than {rows:,} lines; {expected}")
            try:
                score = float(line)
            except ValueError:
                score = math.nan
            if math.isnan(score):
                shown = line.strip()[:40].decode("utf-8", "replace")
                raise UserError(f"--score-command {command!r}: line {count} is {shown!r}, not a number; {expected}")
            yield score
    if count < rows:
        raise UserError(f"--score-command {command!r}: wrote {count:,} lines; {expected}")
