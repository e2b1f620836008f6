"""Reading JSONL: plain, gzip or zstd; files, directories or standard input; in blocks of complete
lines.

`open_sources(paths, outputs)` finds the files and checks that no output is one of them.
`read_blocks(sources, shard)` yields their lines in order, for `jsonl_row.parse_row`.

A shard is a range of bytes. A line belongs to the shard of its first byte, so nothing before a
shard is read. A compressed file can only be read from its start; it belongs to the shard of its
first byte.
"""

import codecs
import gzip
import io
import math
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import HEAD_BYTES, describe, kind_of_bytes
from megatron_ft.files.jsonl_row import MAX_LINE_BYTES, BadRow, of_the_file
from megatron_ft.files.os_error import remedy
from megatron_ft.files.zstd_file import ZstdFile
from megatron_ft.printable import printable

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
BLOCK_BYTES = 1 << 18  # stays in the cache of a core until its rows are parsed
READ_BYTES = 1 << 17  # per system call; the default, 8 KiB, is about one line of a commit row
STDIN = Path("-")
BYTE_ORDER_MARK, NEWLINE = codecs.BOM_UTF8, ord("\n")
# Suffixes of files that programs write next to rows: rejected rows, provenance, reports.
NOT_INPUT = (*(f"_rejected{suffix}" for suffix in SUFFIXES), "_made_from.json", "_report.json")
# Files of these kinds are read: the compressed ones whatever their names, the others line by line.
COMPRESSED = ("gzip", "zstd")
LINE_BY_LINE = ("utf-16", "utf-32", "nul")
Stream = io.BufferedIOBase | BinaryIO


@dataclass(frozen=True)
class Source:
    """One input file. `size` is in bytes, 0 for standard input; `kind` is "gzip", "zstd" or
    "parquet", "" for plain JSONL."""

    path: Path
    size: int
    kind: str

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "standard input" if self.path == STDIN else str(self.path)


@dataclass(frozen=True)
class Block:
    """Complete lines of one source, each with its newline, which the last line of a file gets if it
    has none; None for a line over MAX_LINE_BYTES."""

    source: Source
    lines: list[bytes | None]
    first_line: int  # number of lines[0], from 1, counted from `first_byte`
    first_byte: int  # the offset at which reading the source started
    consumed: int  # bytes of the file read for this block, before decompression

    @property
    def num_bytes(self) -> int:
        """Total size of the lines."""
        return sum(len(line) for line in self.lines if line)

    def rows(self) -> Iterator[tuple[int, bytes | None]]:
        """Indices and lines, without blank lines."""
        return ((i, line) for i, line in enumerate(self.lines) if line is None or not line.isspace())

    def line_number(self, i: int) -> int:
        """Number of lines[i] in its file, from 1; in a shard, the lines before it are counted."""
        before = _count_lines(self.source.path, self.first_byte) if self.first_byte else 0
        return before + self.first_line + i

    def error(self, i: int, reason: BadRow, remedy: str) -> UserError:
        """The error for a program that stops at lines[i]; `remedy` is for a defect of the row, not
        of the file."""
        what_to_do = "" if of_the_file(reason) else f"; {remedy}"
        return UserError(f"{self.source.name}, line {self.line_number(i)}: {reason}{what_to_do}")


def open_sources(
    paths: Iterable[str | Path], outputs: Sequence[str | Path] = (), *, parquet: bool = False, allow_empty: bool = False
) -> list[Source]:
    """The files of `paths` in order; a directory stands for its JSONL files, sorted by name, and
    with `parquet` for its parquet files, too.

    `outputs` are the files that the program will write. In a directory they are left out, like the
    files written by tokenize.py, and one line on stderr lists what is read. Raises UserError if an
    input is missing, both named and an output, or if all are empty, unless that is allowed.
    """
    sources = []
    suffixes = (*SUFFIXES, ".parquet") if parquet else SUFFIXES
    kinds = (*COMPRESSED, "parquet") if parquet else COMPRESSED
    written = {os.path.realpath(output) for output in outputs if str(output) != "-"}
    for path in map(Path, paths):
        if path == STDIN:
            sources.append(Source(STDIN, 0, ""))
        elif path.is_dir():
            sources += [_source(file, kinds) for file in _inside(path, written, suffixes)]
        elif os.path.realpath(path) in written:
            raise UserError(f"{path}: is both input and output and would be overwritten; give the output another name")
        else:
            sources.append(_source(path, kinds))
    if not sources:
        raise UserError("no input: give one or more JSONL files, a directory, or - for standard input")
    if sum(source.path == STDIN for source in sources) > 1:
        raise UserError("standard input (-) can be read only once; give it once")
    if not allow_empty and all(source.size == 0 and source.path != STDIN for source in sources):
        raise UserError(f"{sources[0].name}: empty; expected one JSON object per line")
    return sources


def _inside(directory: Path, written: set[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The input files of a directory, except hidden ones and outputs of programs."""
    try:
        found = sorted(file for file in directory.iterdir() if file.name.endswith(suffixes) and file.is_file())
    except OSError as error:
        raise _unreadable(directory, error) from error
    inside = [
        file
        for file in found
        if os.path.realpath(file) not in written and not file.name.endswith(NOT_INPUT) and not file.name.startswith(".")
    ]
    if not inside:
        others = f" but {found[0].name}, which is not an input" if found else ""
        raise UserError(
            f"{directory}: no JSONL file in this directory{others}; expected names ending in {', '.join(suffixes)}"
        )
    left_out = [file.name for file in found if file not in inside]
    notice = f"{directory}: reading {', '.join(file.name for file in inside)}"
    print(printable(notice + (f"; leaving out {', '.join(left_out)}" if left_out else "")), file=sys.stderr)
    return inside


def _source(path: Path, kinds: tuple[str, ...]) -> Source:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; pipe it to standard input and give - as the input")
        with open(path, "rb") as file:
            start = file.read(HEAD_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    if other := describe(start, expected=(*kinds, *LINE_BY_LINE)):
        raise UserError(f"{path}: {other}")
    kind = kind_of_bytes(start)
    return Source(path, status.st_size, kind if kind in kinds else "")


def _unreadable(path: Path, error: OSError) -> UserError:
    what_to_do = remedy(error, "give a JSONL file, a directory, or - for standard input")
    return UserError(f"{path}: {error.strerror}; {what_to_do}")


def parse_shard(text: str) -> tuple[int, int]:
    """'I/N' as (I, N) with 1 <= I <= N; UserError otherwise.

    >>> parse_shard("3/8")
    (3, 8)
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text}: expected I/N with I from 1 to N, for example 1/8 for the first of eight")
    return int(index), int(count)


def read_blocks(sources: Sequence[Source], shard: tuple[int, int] = (1, 1)) -> Iterator[Block]:
    """The lines of shard (I, N) in order, in blocks of about BLOCK_BYTES. Shards divide the bytes
    of all sources.

    Raises UserError if a file cannot be read or decompressed.
    """
    for source, start, stop in byte_ranges(sources, shard):
        yield from blocks_of(source, start, stop)


def byte_ranges(sources: Sequence[Source], shard: tuple[int, int]) -> Iterator[tuple[Source, int, int]]:
    """The part of each source that belongs to shard (I, N), as (source, start, stop); a part may be
    empty."""
    index, count = shard
    if count > 1 and any(source.path == STDIN for source in sources):
        raise UserError("--shard cannot divide standard input; give files")
    total = sum(source.size for source in sources)
    low, high = total * (index - 1) // count, total * index // count
    offset = 0  # of the source within all sources
    for source in sources:
        yield source, max(0, low - offset), min(source.size, high - offset)
        offset += source.size


def blocks_of(source: Source, start: int, stop: int) -> Iterator[Block]:
    """The lines of a source whose first byte is in [start, stop); all of standard input."""
    try:
        if source.path == STDIN:
            if sys.stdin is None:
                raise UserError("standard input is closed; pipe rows to it, or give files")
            yield from _blocks_of_stream(source, sys.stdin.buffer, None)
        elif source.kind:
            if start == 0 and stop > 0:
                with open(source.path, "rb") as raw:
                    yield from _blocks_of_stream(source, decompressed(raw, source), raw)
        elif start < stop:
            yield from _blocks_of_range(source, start, stop)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise unreadable(source, error) from error


def unreadable(source: Source, error: Exception) -> UserError:
    """The error for a file that turns out to be damaged, or cannot be read further."""
    damaged = "the file may be damaged, copy it again"
    what_to_do = remedy(error, damaged) if isinstance(error, OSError) else damaged
    return UserError(f"{source.name}: cannot be read ({error}); {what_to_do}")


def shard_bytes(sources: Sequence[Source], shard: tuple[int, int] = (1, 1)) -> int | None:
    """Bytes of files that `read_blocks` will read; None with standard input."""
    if any(source.path == STDIN for source in sources):
        return None
    return sum(source.size for source in sources) // shard[1]


def decompressed(raw: io.BufferedReader, source: Source) -> io.BufferedIOBase:
    """The stream of a compressed source, decompressed."""
    if source.kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(ZstdFile(raw, source.name), BLOCK_BYTES)


def _blocks_of_stream(source: Source, stream: Stream, raw: io.BufferedReader | None) -> Iterator[Block]:
    """Blocks of a stream from its start; `raw` is the compressed file below it, if any."""
    line, before = 1, 0
    for lines, consumed in _complete_lines(stream, None):
        if raw is not None:
            before, consumed = raw.tell(), raw.tell() - before
        yield Block(source, lines, line, 0, consumed)
        line += len(lines)


def _blocks_of_range(source: Source, start: int, stop: int) -> Iterator[Block]:
    """Blocks of the lines of an uncompressed file whose first byte is in [start, stop)."""
    with open(source.path, "rb", READ_BYTES) as file:
        if start:  # the line of the byte before belongs to another shard
            file.seek(start - 1)
            while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
        first_byte, line = file.tell(), 1
        if first_byte >= stop:
            return
        for lines, consumed in _complete_lines(file, stop - first_byte):
            yield Block(source, lines, line, first_byte, consumed)
            line += len(lines)


def _complete_lines(stream: Stream, limit: int | None) -> Iterator[tuple[list[bytes | None], int]]:
    """Lists of lines and their size in the stream; with `limit`, only lines that begin before that
    many bytes.

    A byte order mark, which some editors write at the start of a file, is removed from any line:
    files joined by cat have one in the middle.
    """
    lines: list[bytes | None] = []
    size, left = 0, math.inf if limit is None else limit
    longest = MAX_LINE_BYTES + 1  # with its newline
    while left > size and (line := stream.readline(longest + 1)):
        size += len(line)
        if line[-1] == NEWLINE and line[0] != BYTE_ORDER_MARK[0] and len(line) <= longest:  # nearly all
            lines.append(line)
        elif len(body := line.removesuffix(b"\n")) <= MAX_LINE_BYTES:
            lines.append(body.removeprefix(BYTE_ORDER_MARK) + b"\n")
        else:
            while not line.endswith(b"\n") and (line := stream.readline(BLOCK_BYTES)):
                size += len(line)
            lines.append(None)
        if size >= BLOCK_BYTES:
            yield lines, size
            left -= size
            lines, size = [], 0
    if lines:
        yield lines, size


@lru_cache(maxsize=8)  # called again for every bad row of a shard
def _count_lines(path: Path, stop: int) -> int:
    """Newlines in the first `stop` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (chunk := file.read(min(stop, BLOCK_BYTES))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count
