"""Rows of instruction data from any file they are published in: `open_records`, `read_records`.

JSONL, also of lists instead of objects; JSON arrays; parquet; Arrow streams and files, which the
`datasets` library writes, and its `save_to_disk` directories. Of all of them, only a batch of rows
is in memory. Parquet and Arrow need pyarrow, of the extra `dataset`.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from megatron_ft.conversations.oasst import are_messages
from megatron_ft.conversations.turns import ROLE_KEYS, TEXT_KEYS
from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.files.first_bytes import HEAD_BYTES, kind_of_bytes
from megatron_ft.files.json_array import elements
from megatron_ft.files.json_file import kind_of, optional, read_json
from megatron_ft.files.json_file import require as require_key
from megatron_ft.files.jsonl import STDIN, Source, blocks_of, byte_ranges, decompressed, unreadable
from megatron_ft.files.jsonl_row import BadRow, parse_object
from megatron_ft.files.tables import BAD_ROW, Chunk, Row, open_tables, parquet_chunks

BATCH = 1024  # rows per chunk of an array or an Arrow file
LIST = "turns"  # the key under which a row that is a list gets its value
TREE = "message_tree_id"


def open_records(paths: Iterable[str | Path], outputs: Sequence[str | Path] = ()) -> list[Source]:
    """As tables.open_tables, and Arrow files and `save_to_disk` directories."""
    files = [file for path in map(Path, paths) for file in _saved_files(path)]
    if files.count(STDIN) > 1:
        raise UserError("standard input (-) can be read only once; give it once")
    sources: list[Source] = []
    for arrow, group in itertools.groupby(files, _is_arrow):
        if arrow:
            sources += [Source(file, file.stat().st_size, "arrow") for file in group]
        else:
            sources += open_tables(group, outputs)
    return sources or open_tables([], outputs)  # which raises


def _is_arrow(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return kind_of_bytes(file.read(HEAD_BYTES)) == "arrow"
    except OSError:  # reported by open_tables
        return False


def _saved_files(path: Path) -> list[Path]:
    """The Arrow files of a `save_to_disk` directory; `path` itself if it is anything else."""
    if (path / "dataset_dict.json").is_file():
        splits = require_key(read_json(path / "dataset_dict.json"), "splits", list, f"{path}/dataset_dict.json", of=str)
        if len(splits) != 1:
            raise UserError(f"{path}: a dataset of the splits {', '.join(splits)}; give one of them, as {path}/SPLIT")
        path = path / splits[0]
    if not (path / "state.json").is_file():
        return [path]
    state, where = read_json(path / "state.json"), f"{path}/state.json"
    if optional(state, "_indices_files", list, where, []):
        raise UserError(f"{path}: a selection of rows by indices; save it again after flatten_indices()")
    files = require_key(state, "_data_files", list, where, low=1, of=dict)
    names = [require_key(file, "filename", str, where) for file in files]
    if any(Path(name).name != name for name in names):
        raise UserError(f"{where}: names files outside of the directory; save the dataset again with save_to_disk")
    return [path / name for name in names]


def read_records(
    sources: Sequence[Source], shard: tuple[int, int] = (1, 1), bad: Counter[str] | None = None
) -> Iterator[Chunk]:
    """The rows of shard (I, N), in order. A row that is a list of objects becomes {LIST: list}.

    JSONL is divided by lines and parquet by row groups; an array or an Arrow file belongs to the
    shard of its first byte. A row that is anything else is a UserError; with `bad` it is skipped
    and its reason counted there. Also raises UserError if a file cannot be read.
    """
    for source, start, stop in byte_ranges(sources, shard):
        if source.kind == "parquet":
            yield from parquet_chunks(source, start, stop)
        elif source.kind == "arrow" or (source.path != STDIN and source.size and _holds_array(source)):
            if start == 0 and stop > 0:
                values = _arrow_values(source) if source.kind == "arrow" else _array_values(source)
                yield from _chunks(source, values, bad)
        else:
            for block in blocks_of(source, start, stop):
                rows = []
                for i, line in block.rows():
                    try:
                        rows.append(Row(_parse(line), line, (block, i)))
                    except BadRow as reason:
                        if bad is None:
                            raise block.error(i, reason, BAD_ROW) from None
                        bad[str(reason)] += 1
                yield Chunk(rows, block.consumed)


def first_row(source: Source) -> Row | None:
    """The first row of a file; None if it has none, or it is standard input."""
    if source.path == STDIN:
        return None
    chunks = read_records([source], bad=Counter())
    return next((row for chunk in chunks for row in chunk.rows), None)


def _parse(line: bytes | None) -> dict[str, Any]:
    if line is not None and line.lstrip()[:1] == b"[":
        try:
            return _fields(orjson.loads(line))
        except orjson.JSONDecodeError:
            pass  # parse_object knows the reason
    return parse_object(line)


def _fields(value: Any) -> dict[str, Any]:
    """A value as a row; BadRow if it is neither an object nor a list of objects."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return {LIST: value}
    if not isinstance(value, dict):
        raise BadRow(f"{kind_of(value)}, not a JSON object")
    return value


def _chunks(source: Source, values: Iterator[Any], bad: Counter[str] | None) -> Iterator[Chunk]:
    """Chunks of the rows of a file that has no lines; its size counts as consumed at the end."""
    number = 0
    while batch := list(itertools.islice(values, BATCH)):
        rows = []
        for value in batch:
            number += 1
            try:
                rows.append(Row(_fields(value), None, (source, number)))
            except BadRow as reason:
                if bad is None:
                    raise UserError(f"{source.name}, row {number}: {reason}; {BAD_ROW}") from None
                bad[str(reason)] += 1
        yield Chunk(rows, 0)
    yield Chunk([], source.size)


@contextmanager
def _stream(source: Source) -> Iterator[BinaryIO]:
    """A source's bytes, decompressed."""
    with ExitStack() as stack:
        raw = stack.enter_context(open(source.path, "rb"))
        yield cast(BinaryIO, decompressed(raw, source) if source.kind else raw)


def _holds_array(source: Source) -> bool:
    """Whether a file is one JSON array of rows, not lines: a line may also be a list, of turns."""
    try:
        with _stream(source) as stream:
            if stream.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
                return False
        with _stream(source) as stream:
            first = next(elements(stream), None)
    except BadRow:
        return True
    except Exception as error:  # of several decompressors; the reader of lines reports it
        if isinstance(error, UserError):
            raise
        return False
    is_turn = (
        isinstance(first, dict) and any(key in first for key in ROLE_KEYS) and any(key in first for key in TEXT_KEYS)
    )
    return not is_turn


def _array_values(source: Source) -> Iterator[Any]:
    try:
        with _stream(source) as stream:
            yield from elements(stream)
    except BadRow as reason:
        raise UserError(f"{source.name}: {reason}") from None
    except (OSError, EOFError) as error:
        raise unreadable(source, error) from error


def _arrow_values(source: Source) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow stream or file, by record batch."""
    pyarrow, ipc = require("pyarrow", "dataset"), require("pyarrow.ipc", "dataset")
    try:
        with pyarrow.OSFile(str(source.path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
            for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(source, error) from error


def is_message(fields: dict[str, Any]) -> bool:
    """Whether a row is one message of an OASST tree, whose other messages are rows next to it."""
    return TREE in fields and are_messages([fields])


def join_trees(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks with consecutive rows that are messages of one tree joined into one row, {LIST:
    messages}; other rows as they are."""
    tree: list[Row] = []
    for chunk in chunks:
        rows: list[Row] = []
        for row in chunk.rows:
            if tree and tree[0].fields[TREE] != row.fields.get(TREE):
                rows.append(_joined(tree))
                tree = []
            if is_message(row.fields):
                tree.append(row)
            else:
                rows.append(row)
        yield Chunk(rows, chunk.consumed)
    if tree:
        yield Chunk([_joined(tree)], 0)


def _joined(tree: list[Row]) -> Row:
    return Row({LIST: [row.fields for row in tree]}, None, tree[0].where)
