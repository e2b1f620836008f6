"""The verdict cache: what was run once is not run again.

    NAME/verdicts/LANGUAGE.RANDOM.jsonl   one `Verdict` per line, one file per scoring process

A verdict is found by its key, a digest of the program, the toolchain, the sandbox and the limits.
"""

import secrets
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_ft.evaluation.records import NO_SCORE, RecordWriter, Verdict, read_records

UNCACHED = ("Go/95", "Rust/32")  # random


class VerdictCache(AbstractContextManager):
    """The verdicts of a language in a directory, and those added in this process."""

    def __init__(self, directory: Path, language: str):
        self.known: dict[str, Verdict] = {}
        for path in sorted(directory.glob(f"{language}.*.jsonl")):
            self.known |= {verdict.key: verdict for verdict in read_records(path, Verdict)}
        self._path = directory / f"{language}.{secrets.token_hex(8)}.jsonl"
        self._writer: RecordWriter | None = None

    def add(self, verdict: Verdict, keep: bool = True) -> None:
        """Add a verdict; on disk when this returns, unless it is of the machine, or not `keep`."""
        self.known[verdict.key] = verdict
        if not keep or verdict.status in NO_SCORE:
            return
        if self._writer is None:
            self._writer = RecordWriter(self._path)
        self._writer.append([verdict])

    def __exit__(self, *exception) -> None:
        if self._writer is not None:
            self._writer.__exit__()
