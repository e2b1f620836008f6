"""Reading JSONL: plain, gzip or zstd; files, directories or standard input; in blocks of complete
lines.

`open_sources(paths, outputs)` finds the files and checks that no output is one of them.
`read_blocks(sources, shard)` yields their lines in order. `parse_row` extracts the texts of a line.
Every defect of a line is a `BadRow` with its reason.

A shard is a range of bytes. A line belongs to the shard of its first byte, so nothing before a
shard is read. A compressed file can only be read from its start; it belongs to the shard of its
first byte.
"""

import codecs
import gzip
import io
import json
import os
import re
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

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
STDIN = Path("-")
# Suffixes of files that preprocess/tokenize.py writes: rejected rows, and a dataset's provenance.
NOT_INPUT = (*(f"_rejected{suffix}" for suffix in SUFFIXES), "_made_from.json")
# First bytes of compressed files, whatever their names. The last is a skippable frame (pzstd).
MAGIC = ((rb"\x1f\x8b", "gzip"), (rb"\x28\xb5\x2f\xfd", "zstd"), (rb"[\x50-\x5f]\x2a\x4d\x18", "zstd"))
Stream = io.BufferedIOBase | BinaryIO
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SHOWN_KEYS = 8


class BadRow(ValueError):
    """A line that is not a valid row; the message is the reason, equal for all such lines."""


@dataclass(frozen=True)
class Source:
    """One input file. `size` is in bytes, 0 for standard input; `compression` is "gzip", "zstd"
    or ""."""

    path: Path
    size: int
    compression: str

    @property
    def name(self) -> str:
        """Its name in messages."""
        return "standard input" if self.path == STDIN else str(self.path)


@dataclass(frozen=True)
class Block:
    """Complete lines of one source, without newlines; None for a line over MAX_LINE_BYTES."""

    source: Source
    lines: list[bytes | None]
    first_line: int  # number of lines[0], from 1, counted from `first_byte`
    first_byte: int  # the offset at which reading the source started
    consumed: int  # bytes of the file read for this block, before decompression

    @property
    def num_bytes(self) -> int:
        """Total size of the lines, without newlines."""
        return sum(len(line) for line in self.lines if line)

    def rows(self) -> Iterator[tuple[int, bytes | None]]:
        """Indices and lines, without blank lines."""
        return ((i, line) for i, line in enumerate(self.lines) if line is None or (line and not line.isspace()))

    def line_number(self, i: int) -> int:
        """Number of lines[i] in its file, from 1; in a shard, the lines before it are counted."""
        before = _count_lines(self.source.path, self.first_byte) if self.first_byte else 0
        return before + self.first_line + i

    def error(self, i: int, reason: BadRow, remedy: str) -> UserError:
        """The error for a program that stops at lines[i]."""
        return UserError(f"{self.source.name}, line {self.line_number(i)}: {reason}; {remedy}")


def open_sources(paths: Iterable[str | Path], outputs: Sequence[str | Path] = ()) -> list[Source]:
    """The files of `paths` in order; a directory stands for its JSONL files, sorted by name.

    `outputs` are the files that the program will write. In a directory they are left out, like the
    files written by tokenize.py, and one line on stderr lists what is read. Raises UserError if an
    input is missing, empty, or both named and an output.
    """
    sources = []
    written = {os.path.realpath(output) for output in outputs if str(output) != "-"}
    for path in map(Path, paths):
        if path == STDIN:
            sources.append(Source(STDIN, 0, ""))
        elif path.is_dir():
            sources += map(_source, _inside(path, written))
        elif os.path.realpath(path) in written:
            raise UserError(f"{path}: is both input and output and would be overwritten; give the output another name")
        else:
            sources.append(_source(path))
    if not sources:
        raise UserError("no input: give one or more JSONL files, a directory, or - for standard input")
    if sum(source.path == STDIN for source in sources) > 1:
        raise UserError("standard input (-) can be read only once; give it once")
    if all(source.size == 0 and source.path != STDIN for source in sources):
        raise UserError(f"{sources[0].name}: empty; expected one JSON object per line")
    return sources


def _inside(directory: Path, written: set[str]) -> list[Path]:
    """The JSONL files of a directory, except outputs of programs."""
    found = sorted(file for file in directory.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    inside = [file for file in found if os.path.realpath(file) not in written and not file.name.endswith(NOT_INPUT)]
    if not inside:
        others = f" but {found[0].name}, which is not an input" if found else ""
        raise UserError(
            f"{directory}: no JSONL file in this directory{others}; expected names ending in {', '.join(SUFFIXES)}"
        )
    left_out = [file.name for file in found if file not in inside]
    print(
        f"{directory}: reading {', '.join(file.name for file in inside)}"
        + (f"; leaving out {', '.join(left_out)}" if left_out else ""),
        file=sys.stderr,
    )
    return inside


def _source(path: Path) -> Source:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; pipe it to standard input and give - as the input")
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a JSONL file, a directory, or - for standard input") from error
    return Source(path, status.st_size, next((kind for magic, kind in MAGIC if re.match(magic, start)), ""))


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
    index, count = shard
    if count > 1 and any(source.path == STDIN for source in sources):
        raise UserError("--shard cannot divide standard input; give files")
    total = sum(source.size for source in sources)
    low, high = total * (index - 1) // count, total * index // count
    offset = 0  # of the source within all sources
    for source in sources:
        start, stop = max(0, low - offset), min(source.size, high - offset)
        offset += source.size
        try:
            if source.path == STDIN:
                yield from _blocks_of_stream(source, sys.stdin.buffer, None)
            elif source.compression:
                if start == 0 and stop > 0:
                    with open(source.path, "rb") as raw:
                        yield from _blocks_of_stream(source, _decompressed(raw, source.compression), raw)
            elif start < stop:
                yield from _blocks_of_range(source, start, stop)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{source.name}: cannot be read ({error}); the file may be damaged, copy it again"
            ) from error


def shard_bytes(sources: Sequence[Source], shard: tuple[int, int] = (1, 1)) -> int | None:
    """Bytes of files that `read_blocks` will read; None with standard input."""
    if any(source.path == STDIN for source in sources):
        return None
    return sum(source.size for source in sources) // shard[1]


def _decompressed(raw: io.BufferedReader, compression: str) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=raw) if compression == "gzip" else io.BufferedReader(_ZstdFile(raw), BLOCK_BYTES)


class _ZstdFile(io.RawIOBase):
    """Reads a .zst file of one or more frames; EOFError if the last is truncated, which zstandard's
    own reader ignores."""

    def __init__(self, raw: io.BufferedReader):
        self._raw, self._ready = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False  # whether the frame has had input

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._frame.eof:
                chunk = self._frame.unused_data or self._raw.read(1 << 17)
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                chunk = self._raw.read(1 << 17)
            if not chunk:
                if self._begun:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._ready, self._begun = self._frame.decompress(chunk), True
        amount = min(len(buffer), len(self._ready))
        buffer[:amount], self._ready = self._ready[:amount], self._ready[amount:]
        return amount


def _blocks_of_stream(source: Source, stream: Stream, raw: io.BufferedReader | None) -> Iterator[Block]:
    """Blocks of a stream from its start; `raw` is the compressed file below it, if any."""
    line, before = 1, 0
    for lines, consumed in _complete_lines(stream, None):
        if line == 1:
            _strip_byte_order_mark(lines)
        if raw is not None:
            before, consumed = raw.tell(), raw.tell() - before
        yield Block(source, lines, line, 0, consumed)
        line += len(lines)


def _blocks_of_range(source: Source, start: int, stop: int) -> Iterator[Block]:
    """Blocks of the lines of an uncompressed file whose first byte is in [start, stop)."""
    with open(source.path, "rb") as file:
        if start:  # the line of the byte before belongs to another shard
            file.seek(start - 1)
            while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
        first_byte, line = file.tell(), 1
        if first_byte >= stop:
            return
        for lines, consumed in _complete_lines(file, stop - first_byte):
            if first_byte == 0 and line == 1:
                _strip_byte_order_mark(lines)
            yield Block(source, lines, line, first_byte, consumed)
            line += len(lines)


def _strip_byte_order_mark(lines: list[bytes | None]) -> None:
    """Remove the byte order mark, which some editors write, from a file's first line."""
    if lines[0] is not None:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)


def _complete_lines(stream: Stream, limit: int | None) -> Iterator[tuple[list[bytes | None], int]]:
    """Lists of lines and their size in the stream; with `limit`, only lines that begin before that
    many bytes."""
    lines: list[bytes | None] = []
    position = size = 0
    while limit is None or position < limit:
        line = stream.readline(MAX_LINE_BYTES + 2)
        if not line:
            break
        position += len(line)
        size += len(line)
        body: bytes | None = line.removesuffix(b"\n")
        if len(line) - line.endswith(b"\n") > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := stream.readline(BLOCK_BYTES)):
                position += len(line)
                size += len(line)
            body = None
        lines.append(body)
        if size >= BLOCK_BYTES:
            yield lines, size
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


def parse_object(line: bytes | None) -> dict:
    """One line as a JSON object; BadRow with the reason if it is not one."""
    if line is None:
        raise BadRow(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRow(_why_not_json(line, error)) from None
    if isinstance(row, list):
        raise BadRow("a JSON array, not an object; jq -c '.[]' writes one object per line")
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def _why_not_json(line: bytes, error: Exception) -> str:
    if line.startswith(UTF16) or b"\0" in line[:2]:
        return "UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts the file"
    if isinstance(error, UnicodeDecodeError):
        return "invalid UTF-8"
    if line.strip() in (b"[", b"{", b"[{"):
        objects = "." if line.strip() == b"{" else "'.[]'"
        return f"JSON over several lines; jq -c {objects} writes one object per line"
    return "not JSON" if line.strip() else "empty line"


def parse_row(line: bytes | None, keys: Sequence[Sequence[str]]) -> list[str]:
    """The texts of one line, one per entry of `keys`. An entry lists the names that a field may
    have; the first one found is used.

    BadRow if the line is not an object, a key is missing, or a value is not a string, is empty, or
    contains a lone surrogate.

    >>> parse_row(b'{"inputs": "1 + 1", "targets": "2"}', [["inputs"], ["outputs", "targets"]])
    ['1 + 1', '2']
    """
    row = parse_object(line)
    texts = []
    for names in keys:
        name = next((name for name in names if name in row), None)
        if name is None:
            raise BadRow(f"no key {' or '.join(map(repr, names))}; {keys_of(row)}")
        text = row[name]
        if not isinstance(text, str):
            raise BadRow(f"{name!r} is not a string")
        if not text:
            raise BadRow(f"{name!r} is empty")
        check_surrogates(text, line)
        texts.append(text)
    return texts


def keys_of(row: dict) -> str:
    """The keys of a row, for messages."""
    shown = ", ".join(repr(key[:40]) for key in list(row)[:SHOWN_KEYS])
    return f"the row has {shown or 'no keys'}" + (", ..." if len(row) > SHOWN_KEYS else "")


def check_surrogates(text: str, line: bytes | None) -> None:
    """BadRow if `text`, parsed from `line`, contains half a surrogate pair, which only an escape
    like \\ud83d can produce."""
    if line and b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("lone surrogate") from None
