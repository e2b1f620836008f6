"""A .zst file as a stream: bounded memory whatever it expands to, and an error if it is truncated.

zstandard's own readers give either: `stream_reader` ends silently in a truncated frame, and
`decompressobj` returns all that its input expands to, which may be 30,000 times as much. So frames
are cut into their blocks (RFC 8878, section 3.1.1), none of which expands to more than 128 KiB.
"""

import io
import struct

import zstandard

from megatron_ft.errors import UserError

MAX_WINDOW = 128 << 20  # bytes; zstd's own limit unless it is given --long
MAGIC = 0xFD2FB528
SKIPPABLE = 0x184D2A50  # and the 15 numbers after it
RLE = 1  # block type: one byte, repeated


class ZstdFile(io.RawIOBase):
    """Reads one or more frames, as written by zstd, pzstd or several files joined by cat.

    Raises EOFError if the last frame is truncated, zstandard.ZstdError if one is damaged, and
    UserError if one refers back further than MAX_WINDOW bytes.
    """

    def __init__(self, raw: io.BufferedReader, name: str):
        self._raw, self._name = raw, name
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = self._last_block = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            piece = self._next_block() if self._in_frame else self._next_header()
            if not piece:
                return 0
            self._ready = memoryview(self._frame.decompress(piece))
            self._in_frame = not self._frame.eof
        amount = min(len(buffer), len(self._ready))
        buffer[:amount], self._ready = self._ready[:amount], self._ready[amount:]
        return amount

    def _next_header(self) -> bytes:
        """The header of the next frame; b"" at the end of the file."""
        while start := self._raw.read(4):
            start += self._read(4 - len(start))
            magic = struct.unpack("<I", start)[0]
            if SKIPPABLE <= magic < SKIPPABLE + 16:
                self._skip(struct.unpack("<I", self._read(4))[0])
            elif magic == MAGIC:
                return self._frame_header(start)
            else:
                raise zstandard.ZstdError("what follows a frame is not one")
        return b""

    def _frame_header(self, magic: bytes) -> bytes:
        descriptor = self._read(1)
        flags = descriptor[0]
        single_segment = flags >> 5 & 1
        size = (1 - single_segment) + (0, 1, 2, 4)[flags & 3] + (single_segment, 2, 4, 8)[flags >> 6]
        header = magic + descriptor + self._read(size)
        window = zstandard.get_frame_parameters(header).window_size
        if window > MAX_WINDOW:
            raise UserError(
                f"{self._name}: needs {window >> 20:,} MiB to decompress, expected at most {MAX_WINDOW >> 20}; "
                "compress the file again, without --long and --ultra"
            )
        self._frame = self._decompressor.decompressobj()
        self._in_frame, self._last_block = True, False
        return header

    def _next_block(self) -> bytes:
        """The next block of the frame, or the checksum after the last one."""
        if self._last_block:
            return self._read(4)
        header = self._read(3)
        bits = int.from_bytes(header, "little")
        self._last_block = bool(bits & 1)
        size = 1 if bits >> 1 & 3 == RLE else bits >> 3
        if size > zstandard.BLOCKSIZE_MAX:
            raise zstandard.ZstdError("a block is larger than 128 KiB")
        return header + self._read(size)

    def _read(self, size: int) -> bytes:
        found = self._raw.read(size)
        if len(found) < size:
            raise EOFError("compressed file ended before the end of its last frame")
        return found

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._read(min(size, 1 << 20)))
