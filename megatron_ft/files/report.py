"""A run's report: what a program read, dropped and wrote, as JSON next to its output."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import STANDARD_OUTPUT, writing

FORMAT_SUFFIXES = re.compile(r"(\.(jsonl?|parquet))?(\.(gz|zst))?$")


def report_path(output: str | Path) -> Path:
    """Where the report of an output goes: its name without the suffixes of its format, and
    `_report.json`. Other dots stay, so that rows.python.jsonl and rows.go.jsonl have one each.

    >>> report_path("data/rows.jsonl.gz"), report_path("rows.go.jsonl").name
    (PosixPath('data/rows_report.json'), 'rows.go_report.json')
    """
    path = Path(output)
    return path.with_name(FORMAT_SUFFIXES.sub("", path.name, count=1) + "_report.json")


def write_report(output: str | Path, report: dict[str, Any]) -> None:
    """Write the report of an output, unless that is standard output or a device. The keys keep
    their order."""
    output = Path(output)
    is_device = output.exists() and not (output.is_file() or output.is_dir())
    if str(output) not in STANDARD_OUTPUT and not is_device:
        path = report_path(output)
        with writing(path):
            replace_file(path, json.dumps(report, ensure_ascii=False, indent=2).encode() + b"\n")
