"""The stored tensors of a torch_dist checkpoint, memory-mapped; no pickle is executed.

`.metadata` maps each box of each tensor to a byte range of a `.distcp` file. Each range is a small
torch archive, whose only data record is mapped. Both readers are built on this: weights for
conversion (torch_dist_reader.py) and the state of a resumed run (checkpoint/rank_files.py).
"""

import io
import math
import mmap
import zipfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import what_it_is
from megatron_ft.files.os_error import remedy
from megatron_ft.model.boxes import Box, overlap, whole
from megatron_ft.weights.directory import check_link
from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.safe_pickle import UNREADABLE, check_stored, referenced, refusal, why_unreadable
from megatron_ft.weights.torch_dist_metadata import StoredChunk, read_metadata, stored_parts

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


class TorchDistFiles:
    """The tensors and byte objects of one torch_dist directory, by their keys.

    Opening one reads `.metadata` (unless it is given). Raises Damaged when that is missing or
    contradicts itself, UserError when its pickle is refused or its files are compressed.
    """

    def __init__(self, directory: Path, metadata: "Metadata | None" = None) -> None:
        self.path = directory
        parts = stored_parts(directory, metadata or read_metadata(directory))
        self.tensors, self._chunks, self.objects = parts
        self._maps: dict[str, mmap.mmap] = {}
        self._opened: dict[tuple[str, int], torch.Tensor] = {}
        self._tallest = {key: max(map(_rows, chunks)) for key, chunks in self._chunks.items()}

    def check_sizes(self) -> None:
        """Raise Damaged unless every file exists and is as long as `.metadata` requires."""
        needed: dict[str, int] = {}
        for chunk in [*self.objects.values(), *(chunk for chunks in self._chunks.values() for chunk in chunks)]:
            needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
        sizes = {path.name: path.stat().st_size for path in self.path.glob("*.distcp")}
        if missing := sorted(needed.keys() - sizes.keys()):
            raise Damaged(f"{self.path}: missing {', '.join(missing)}")
        for file, end in needed.items():
            if sizes[file] < end:
                raise Damaged(f"{self.path / file}: cut short, {sizes[file]} bytes of at least {end}")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the complete tensor."""
        return tuple(self.tensors[key].size)

    def chunks_of(self, key: str) -> list[StoredChunk]:
        """All stored parts of a tensor, in order of their offsets."""
        return list(self._chunks.get(key, ()))

    def overlapping(self, key: str, box: Box) -> Iterator[tuple[StoredChunk, Box]]:
        """The stored parts of a tensor that overlap a box, each with the box they have in common.

        Parts are found by their offset on axis 0: where layers are stacked, a layer's box is not
        compared with the parts of all other layers.
        """
        chunks = self._chunks.get(key, [])
        if box.offsets and chunks:
            begin, end = box.offsets[0] - self._tallest[key] + 1, box.offsets[0] + box.sizes[0]
            chunks = chunks[bisect_left(chunks, begin, key=_first_row) : bisect_left(chunks, end, key=_first_row)]
        for chunk in chunks:
            if (common := overlap(box, chunk)) is not None:
                yield chunk, common

    def chunk(self, chunk: StoredChunk) -> torch.Tensor:
        """One stored part as a memory-mapped CPU tensor [*sizes] in its dtype; do not write to it.

        Raises Damaged when it is not readable, UserError when it is a pickle of anything else.
        """
        place = chunk.file, chunk.start
        if place not in self._opened:
            self._opened[place] = self._open(chunk)
        return self._opened[place]

    def read_box(self, key: str, box: Box) -> torch.Tensor:
        """A box [*sizes] of a tensor in its dtype, in memory.

        Raises Damaged when parts of it are not stored, and as `chunk` does.
        """
        found = list(self.overlapping(key, box))
        if sum(math.prod(common.sizes) for _, common in found) != math.prod(box.sizes):
            raise Damaged(f"{self.path}: {key} is stored only in part")
        out = torch.empty(box.sizes, dtype=self.tensors[key].properties.dtype)
        for chunk, common in found:
            out[common.within(box)].copy_(self.chunk(chunk)[common.within(chunk)])
        return out

    def read(self, key: str) -> torch.Tensor:
        """A complete tensor in its dtype, in memory. Raises as `read_box` does."""
        return self.read_box(key, whole(self.shape(key)))

    def bytes_of(self, key: str) -> bytes:
        """Content of a byte object, a torch archive that nobody has checked: never unpickle it."""
        chunk = self.objects[key]
        return self._map(chunk.file)[chunk.start : chunk.start + chunk.length]

    def close(self) -> None:
        """Unmap the files once nothing refers to their tensors; later reads map them again."""
        self._opened.clear()
        self._maps.clear()

    def _open(self, chunk: StoredChunk) -> torch.Tensor:
        try:
            return self._mapped(chunk)
        except UNREADABLE as error:
            file = self.path / chunk.file
            if found := referenced(error):
                what = f"a pickle in it (byte {chunk.start}) references {found}"
                raise UserError(refusal(file, what)) from None
            if other := what_it_is(file, ("zip",)):
                raise Damaged(f"{file}: {other}") from None
            raise Damaged(f"{file}: damaged at byte {chunk.start} ({why_unreadable(error)[:100]})") from None

    def _mapped(self, chunk: StoredChunk) -> torch.Tensor:
        mapped = self._map(chunk.file)
        view = io.BufferedReader(_Range(mapped, chunk.start, chunk.length))
        with zipfile.ZipFile(view) as archive:
            check_stored(archive)
            record = next((info for info in archive.infolist() if info.filename.endswith("/data/0")), None)
        view.seek(0)
        # On the meta device torch reads only the small pickle: dtype, shape and strides.
        described = torch.load(view, map_location="meta", weights_only=True)
        if tuple(described.shape) != chunk.sizes:
            raise ValueError(f"shape {list(described.shape)}, expected {list(chunk.sizes)}")
        if described.dtype != chunk.dtype:
            raise ValueError(f"{described.dtype}, expected {chunk.dtype}")
        if described.numel() == 0:
            return torch.empty(chunk.sizes, dtype=described.dtype)
        if record is None:
            raise ValueError("no data record")
        start = record.header_offset + _local_header_length(view, record.header_offset)
        if start + record.file_size > chunk.length:
            raise ValueError("a data record that ends outside of its archive")
        flat = torch.frombuffer(
            mapped,
            dtype=described.dtype,
            count=record.file_size // described.element_size(),
            offset=chunk.start + start,
        )
        return flat.as_strided(described.shape, described.stride(), described.storage_offset())

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            path = self.path / file
            check_link(path, self.path)
            try:
                with path.open("rb") as handle:
                    # Copy on write: torch requires a writable buffer, and nothing is written.
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            except FileNotFoundError:
                raise Damaged(f"{path} is missing") from None
            except ValueError:
                raise Damaged(f"{path} is empty") from None
            except OSError as error:
                reason = f"cannot be read ({error.strerror})"
                raise UserError(f"{path}: {reason}; {remedy(error, 'copy the checkpoint again')}") from None
        return self._maps[file]


class _Range(io.RawIOBase):
    """A range of a mapped file, as a file."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._mapped, self._start, self._length, self._position = mapped, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        stop = min(self._length, self._position + len(buffer))
        found = self._mapped[self._start + self._position : self._start + stop] if stop > self._position else b""
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def _first_row(chunk: StoredChunk) -> int:
    return chunk.offsets[0]


def _rows(chunk: StoredChunk) -> int:
    return chunk.sizes[0] if chunk.sizes else 1


def _local_header_length(archive: BinaryIO, header_offset: int) -> int:
    """Length of a zip record's local header: 30 bytes, its name, and torch's padding."""
    archive.seek(header_offset + 26)
    lengths = archive.read(4)
    return 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
