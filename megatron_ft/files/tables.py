"""Tables of rows in JSONL or parquet: `read_table` and `TableWriter`.

The name of a file decides the format it is written in: `.parquet`, else JSONL (`.gz` and `.zst`
compressed). JSONL is divided into shards by bytes (see jsonl.py); a row group of a parquet file
belongs to the shard of its first byte. Parquet needs pyarrow, of the extra `dataset`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.files.jsonl import Block, Source, blocks_of, byte_ranges, open_sources, unreadable
from megatron_ft.files.jsonl_row import BadRow, parse_object, to_line
from megatron_ft.files.output import OutputFile

PARQUET_BATCH = 1024  # rows that are in memory at a time while parquet is read
ROW_GROUP_BYTES = 64 << 20  # of text per row group that is written, which bounds memory
BAD_ROW = "fix the row, or skip such rows (--skip-bad-rows)"


class Row(NamedTuple):
    """One row. `line` is its JSONL line with its newline, None if it was read from parquet."""

    fields: dict[str, Any]
    line: bytes | None
    where: tuple[Source | Block, int]  # the parquet file and the row's number, or its block and index

    def error(self, reason: str) -> UserError:
        """The error for a program that stops at this row."""
        origin, index = self.where
        if isinstance(origin, Block):
            return origin.error(index, BadRow(reason), BAD_ROW)
        return UserError(f"{origin.name}, row {index}: {reason}; {BAD_ROW}")


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, to be iterated over once, since JSONL is parsed row by row;
    `consumed` bytes of the file were read for them."""

    rows: Iterable[Row]
    consumed: int


def open_tables(
    paths: Iterable[str | Path], outputs: Sequence[str | Path] = (), *, allow_empty: bool = False
) -> list[Source]:
    """As jsonl.open_sources, and parquet files."""
    return open_sources(paths, outputs, parquet=True, allow_empty=allow_empty)


def read_table(
    sources: Sequence[Source], shard: tuple[int, int] = (1, 1), bad: Counter[str] | None = None
) -> Iterator[Chunk]:
    """The rows of shard (I, N), in order.

    A line that is not a JSON object is a UserError; with `bad` it is skipped and its reason counted
    there. Also raises UserError if a file cannot be read.
    """
    for source, start, stop in byte_ranges(sources, shard):
        if source.kind == "parquet":
            yield from parquet_chunks(source, start, stop)
        else:
            for block in blocks_of(source, start, stop):
                yield Chunk(_rows_of(block, bad), block.consumed)


def _rows_of(block: Block, bad: Counter[str] | None) -> Iterator[Row]:
    for i, line in block.rows():
        try:
            yield Row(parse_object(line), line, (block, i))
        except BadRow as reason:
            if bad is None:
                raise block.error(i, reason, BAD_ROW) from None
            bad[str(reason)] += 1


def parquet_chunks(source: Source, start: int, stop: int) -> Iterator[Chunk]:
    """The rows of the row groups whose first byte is in [start, stop)."""
    parquet = require("pyarrow.parquet", "dataset")
    pyarrow = require("pyarrow", "dataset")
    try:
        with parquet.ParquetFile(source.path) as file:
            before = 0  # rows of the groups before
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                first = min(_first_byte(group.column(i)) for i in range(group.num_columns)) if group.num_columns else 0
                if start <= first < stop:
                    size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
                    row = before
                    for batch in file.iter_batches(PARQUET_BATCH, row_groups=[number]):
                        found = batch.to_pylist()
                        rows = [Row(fields, None, (source, row + 1 + i)) for i, fields in enumerate(found)]
                        row += len(rows)
                        yield Chunk(rows, size * len(rows) // max(1, group.num_rows))
                before += group.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(source, error) from error


def _first_byte(column: Any) -> int:
    """Offset of a column chunk in its file."""
    dictionary = column.dictionary_page_offset
    return column.data_page_offset if dictionary is None else min(dictionary, column.data_page_offset)


class TableWriter:
    """Writes rows to a JSONL or parquet file that appears complete or not at all, see OutputFile.

    Parquet needs a type per column: `columns` has Arrow's names of them ("string", "int64",
    "list<string>" as "list:string"); without it, they are those of the rows of the first group.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, str] | None = None):
        self.path, self.rows = Path(path), 0
        self._parquet = self.path.suffix == ".parquet"
        self._arrow = require("pyarrow", "dataset") if self._parquet else None
        self._given = columns is not None
        self._schema = _schema(self._arrow, columns) if self._parquet and columns else None
        self._output = OutputFile(path)
        self._writer: Any = None
        self._sink: Sink | None = None
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def write_line(self, line: bytes) -> None:
        """Append a row that is a line of JSONL, and stays as it is; OSError if the disk is full."""
        if self._parquet:
            self.write(parse_object(line))
        else:
            self.rows += 1
            self._output.write(line)

    def write(self, fields: Mapping[str, Any], line: bytes | None = None) -> None:
        """Append a row; JSONL gets `line` as it is, if given. OSError if the disk is full."""
        self.rows += 1
        if not self._parquet:
            self._output.write(to_line(dict(fields)) if line is None else line)
            return
        self._pending.append(dict(fields))
        self._pending_bytes += _size(self._pending[-1])
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the pending rows as one row group."""
        arrow = self._arrow
        assert arrow is not None
        names = dict.fromkeys(name for row in self._pending for name in row)
        if self._schema is None:
            self._pending[:1] = [
                {**dict.fromkeys(names), **row} for row in self._pending[:1]
            ]  # Arrow takes its columns
        elif not self._given and (new := [name for name in names if name not in self._schema.names]):
            raise UserError(f"{self.path}: rows do not fit its columns (new key {new[0]!r}); write .jsonl instead")
        try:
            table = arrow.Table.from_pylist(self._pending, self._schema)
        except (arrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
            raise UserError(f"{self.path}: rows do not fit its columns ({error}); write .jsonl instead") from None
        if self._writer is None:
            self._schema = table.schema
            self._sink = Sink(self._output)
            sink = arrow.PythonFile(self._sink, mode="w")
            self._writer = require("pyarrow.parquet", "dataset").ParquetWriter(sink, self._schema, compression="zstd")
        self._writer.write_table(table)
        self._pending, self._pending_bytes = [], 0

    def commit(self) -> None:
        """Give the complete file its final name."""
        if self._parquet:
            if self._pending or self._writer is None:
                self._flush()
            self._writer.close()
        self._output.commit()

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sink is not None:
            self._sink.discard = True  # what Arrow writes when it closes its file
            with suppress(Exception):  # it repeats the error of a write that failed
                self._writer.close()
        self._output.__exit__(*exception)


def _size(value: Any) -> int:
    """Bytes of a value, about: those of its texts, and 8 for each number."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return 8


def _schema(arrow: Any, columns: Mapping[str, str]) -> Any:
    def kind(name: str) -> Any:
        inner = name.removeprefix("list:")
        return arrow.list_(kind(inner)) if inner != name else arrow.type_for_alias(name)

    return arrow.schema([(name, kind(of)) for name, of in columns.items()])


class Sink:
    """An OutputFile as the file object that Arrow writes to."""

    closed = False
    discard = False  # True once the file is given up

    def __init__(self, output: OutputFile):
        self._output = output

    def write(self, data: Any) -> int:
        if not self.discard:
            self._output.write(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...
