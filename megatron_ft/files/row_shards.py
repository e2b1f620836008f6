"""A row program run in shards: which parts exist, and how they become the file that one run would
have written.

Every part has a stamp of the command that made it: its program and arguments, and the size and
modification time of the files among them. A part with another stamp counts as missing, so parts of
different commands never end up in one file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ft import __version__
from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.json_file import read_json
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.files.report import report_path, write_report
from megatron_ft.files.tables import Sink

COPY_BYTES = 1 << 20
SETTINGS = "settings"  # of a report: what was asked for, equal in all parts


def part_path(output: Path, index: int, count: int) -> Path:
    """The part of `output` that shard (index, count) writes.

    >>> part_path(Path("data/kept.jsonl.gz"), 2, 16)
    PosixPath('data/kept-shard-2-of-16.jsonl.gz')
    """
    name, dot, suffixes = output.name.partition(".")
    return output.with_name(f"{name}-shard-{index}-of-{count}{dot}{suffixes}")


def command_stamp(program: Path, arguments: Sequence[str], output: Path) -> str:
    """Identifies what a command makes its output from; hexadecimal.

    Raises UserError if the output is in a directory among the arguments, where each shard would
    take the parts of the others for input.
    """
    found: list[Any] = [__version__, program.name, list(arguments)]
    for word in arguments:
        value = word.partition("=")[2] if word.startswith("--") else word  # --input=FILE, or FILE
        path = Path(value)
        if not value or path == output or not os.path.exists(path):
            continue
        if path.is_dir() and output.resolve().parent == path.resolve():
            raise UserError(
                f"--output {output}: is in the directory {value}, which is also given; write it to another one"
            )
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.exists():  # unless it is a broken link
                status = file.stat()
                found.append([str(file), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def stamp_path(part: Path) -> Path:
    """Where a part's stamp is."""
    return part.with_name(f".{part.name}.stamp")


def missing_parts(output: Path, count: int, stamp: str) -> Iterator[tuple[int, str]]:
    """The shards that a command has to run, and why; none if their joined output exists."""
    if _made_by(output, stamp):
        return
    for index in range(1, count + 1):
        part = part_path(output, index, count)
        if not part.exists():
            yield index, f"{part}: not found"
        elif not _made_by(part, stamp):
            yield index, f"{part}: made by another command, or from other input"


def _made_by(path: Path, stamp: str) -> bool:
    return path.exists() and stamp_path(path).exists() and stamp_path(path).read_text(encoding="utf-8") == stamp


def write_stamp(path: Path, stamp: str) -> None:
    """Record which command made a complete part or output."""
    with writing(path):
        replace_file(stamp_path(path), stamp.encode())


def join(output: Path, count: int, stamp: str) -> bool:
    """Write `output` from its parts, in order, and its report from theirs; then remove them.

    False if it exists already.
    """
    if _made_by(output, stamp):
        return False
    with writing(output):
        stamp_path(output).unlink(missing_ok=True)  # of the output that is about to be replaced
    parts = [part_path(output, index, count) for index in range(1, count + 1)]
    with writing(output):
        if output.suffix == ".parquet":
            _join_parquet(parts, output)
        else:
            _join_bytes(parts, output)
    reports = [read_json(report_path(part)) for part in parts if report_path(part).exists()]
    report: dict[str, Any] = {}
    for found in reports:
        report = add_reports(report, found)
    if report:
        write_report(output, report)
    write_stamp(output, stamp)
    for part in parts:
        for path in (part, stamp_path(part), report_path(part)):
            path.unlink(missing_ok=True)
    return True


def _join_bytes(parts: Sequence[Path], output: Path) -> None:
    """Lines, and the members of gzip and zstd files, are joined as they are."""
    with OutputFile(output, compressed=True) as target:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(COPY_BYTES):
                    target.write(block)
        target.commit()


def _join_parquet(parts: Sequence[Path], output: Path) -> None:
    """The row groups of all parts. A part without rows has no columns, and one without a value in a
    column no type for it: the columns are those of all parts together, as of a single run."""
    pyarrow, parquet = require("pyarrow", "dataset"), require("pyarrow.parquet", "dataset")
    schema = pyarrow.schema([])
    for part in parts:
        try:
            schema = pyarrow.unify_schemas([schema, parquet.read_schema(part)], promote_options="permissive")
        except (pyarrow.ArrowException, ValueError) as error:
            raise UserError(f"{part}: other columns than the parts before it ({error})") from None
    with OutputFile(output) as target:
        sink = Sink(target)
        try:
            with parquet.ParquetWriter(pyarrow.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
                for part in parts:
                    with parquet.ParquetFile(part) as file:
                        for number in range(file.num_row_groups if file.metadata.num_columns else 0):
                            rows = [schema.empty_table(), file.read_row_group(number)]
                            writer.write_table(pyarrow.concat_tables(rows, promote_options="permissive"))
        finally:
            sink.discard = True  # what Arrow writes later, after an error
        target.commit()


def add_reports(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one: numbers added up, except for the settings, which are the first one's.

    >>> add_reports({"rows": 2, "dropped": {"a": 1}}, {"rows": 3, "dropped": {"b": 1}})
    {'rows': 5, 'dropped': {'a': 1, 'b': 1}}
    """
    total = dict(first)
    for key, value in second.items():
        if key == SETTINGS:
            continue
        if key not in total or total[key] is None:
            total[key] = value
        elif isinstance(value, dict) and isinstance(total[key], dict):
            total[key] = add_reports(total[key], value)
        elif isinstance(value, list) and isinstance(total[key], list):
            total[key] = total[key] if total[key] == value else [*total[key], *value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            total[key] += value
    return total
