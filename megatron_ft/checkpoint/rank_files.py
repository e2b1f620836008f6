"""Write and read sharded tensors in torch_dist format (Megatron-Core's, a torch DCP directory).

    .metadata         which box of which tensor is where (a pickle, read through an allow-list)
    __3_0.distcp      the boxes of rank 3, one torch.save after the other
    common.pt, metadata.json     what else Megatron-Core expects

Megatron-Core's own writer forks processes, which segfaults after CUDA and hangs when one of them
dies. This one copies a rank's tensors and writes them from a thread, so a save continues in the
background of training and an error is reported as an error.
"""

import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.model.boxes import Box
from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.torch_dist_files import TorchDistFiles
from megatron_ft.weights.torch_dist_metadata import StoredChunk

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

HASHED_IN_THREAD = 1 << 16  # bytes; smaller writes are hashed faster than handed over


class Writer(Protocol):
    """What writes one rank's part of a checkpoint.

    After `wait`, either `error` is the reason of a failure, or `files` are {name: {"size": bytes,
    "sha256": digest}} and `entries` the chunks for `.metadata`.
    """

    error: str | None
    files: dict[str, dict]
    entries: list[StoredChunk]

    @property
    def running(self) -> bool:
        """Whether a background thread is still writing."""

    def start(self) -> None:
        """Write, in this thread or in the background. Never raises: see `error`."""

    def wait(self) -> None:
        """Block until everything is written and durable, or has failed."""


class RankWriter:
    """One rank's file of one checkpoint; no file if it has nothing to write.

    With `background`, the tensors are copied to the CPU on construction and written by a thread.
    """

    def __init__(
        self, directory: Path, rank: int, items: list[ShardedTensor | ShardedObject], background: bool
    ) -> None:
        self.path = directory / f"__{rank}_0.distcp"
        self.items = [item for item in items if is_main_replica(item.replica_id)]
        self.background = background
        self.copies: list[torch.Tensor | bytes | None] = [_copy_of(item) for item in self.items] if background else []
        self.entries: list[StoredChunk] = []
        self.files: dict[str, dict] = {}
        self.error: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write, in this thread or in the background. Never raises: see `error`."""
        if self.background:
            self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def running(self) -> bool:
        """Whether the background thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Block until everything is written and durable, or has failed."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self.items:
                self._write()
        except OSError as error:
            self.error = f"{self.path}: {error.strerror or error}"
        # torch reports a failed write as RuntimeError; the other ranks must learn of any failure
        except Exception as error:
            self.error = f"{self.path}: {type(error).__name__}: {error}"

    def _write(self) -> None:
        with open(self.path, "wb") as file, ThreadPoolExecutor(1, "checkpoint checksum") as thread:
            stream = _Hashing(file, thread)
            try:
                self._write_items(stream)
            finally:
                if stream.failure:  # torch's own error does not mention the cause
                    raise stream.failure
            sync_file(file)
            self.files = {self.path.name: {"size": stream.tell(), "sha256": stream.digest()}}
        written = self.path.stat().st_size
        if written != stream.tell():
            raise OSError(f"{written} bytes arrived of {stream.tell()}")

    def _write_items(self, stream: "_Hashing") -> None:
        for number, item in enumerate(self.items):
            start = stream.tell()
            content = self.copies[number] if self.background else _copy_of(item)
            if isinstance(content, bytes):
                stream.write(content)
            else:
                torch.save(content, stream)  # type: ignore[arg-type]  # torch only calls write and flush
            del content
            if self.background:
                self.copies[number] = None  # written: release its memory
            self.entries.append(_chunk_of(item, self.path.name, start, stream.tell() - start))


class _Copy(NamedTuple):
    """A part of a stored chunk and the view that it is copied into."""

    chunk: StoredChunk
    part: tuple[slice, ...]
    target: torch.Tensor


def read_tensors(directory: Path, wanted: list[ShardedTensor], metadata: "Metadata | None" = None) -> None:
    """Fill the data of `wanted` in place, whatever layout wrote them.

    Values are converted to the data's dtype and device. A tensor that may differ in size (a padded
    vocabulary) is filled as far as the checkpoint goes, and with zeros beyond. Files are read in
    order, one after the other.

    Raises UserError for a tensor that the checkpoint does not have or has in another shape, and for
    a refused pickle; Damaged for a tensor that is stored only in part or cannot be read.
    """
    files = TorchDistFiles(directory, metadata)
    copies: list[_Copy] = []
    for item in wanted:
        if item.key not in files.tensors:
            raise UserError(
                f"{directory} holds no {item.key}, which this run's flags require; "
                "give it as --load to take only its weights"
            )
        if files.shape(item.key) != tuple(item.global_shape) and not item.allow_shape_mismatch:
            raise UserError(
                f"{directory}: {item.key} has shape {list(files.shape(item.key))}, "
                f"expected {list(item.global_shape)}; use the architecture flags it was saved with"
            )
        data = _full_rank_view(item)
        box = Box(tuple(item.global_offset), tuple(data.shape))
        filled = 0
        for chunk, common in files.overlapping(item.key, box):
            target = data[common.within(box)]
            copies.append(_Copy(chunk, common.within(chunk), target))
            filled += target.numel()
        if filled < data.numel():
            if not item.allow_shape_mismatch:
                raise Damaged(f"{directory}: {item.key} is stored only in part")
            data.zero_()
    copies.sort(key=lambda copy: (copy.chunk.file, copy.chunk.start))
    for _, of_file in groupby(copies, key=lambda copy: copy.chunk.file):
        for copy in of_file:
            copy.target.copy_(files.chunk(copy.chunk)[copy.part])
        files.close()  # mapped pages count as this process's memory


def _chunk_of(item: ShardedTensor | ShardedObject, file: str, start: int, length: int) -> StoredChunk:
    if not isinstance(item, ShardedTensor):
        return StoredChunk(item.unique_key, file, start, length)
    shape, offsets = tuple(item.global_shape), tuple(item.global_offset)
    return StoredChunk(item.key, file, start, length, item.dtype, shape, offsets, _full_rank_shape(item))


def _full_rank_shape(item: ShardedTensor) -> tuple[int, ...]:
    """Local shape with the axes that Megatron-Core prepends (the layer axis of stacked layers)."""
    return (1,) * item.prepend_axis_num + tuple(item.local_shape)


def _full_rank_view(item: ShardedTensor) -> torch.Tensor:
    return item.data.detach().view(_full_rank_shape(item))


def _copy_of(item: ShardedTensor | ShardedObject) -> torch.Tensor | bytes:
    """A CPU copy with its own storage (torch.save writes all of a shared one); objects pickled."""
    if isinstance(item, ShardedTensor):
        tensor = _full_rank_view(item)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
    content = io.BytesIO()
    torch.save([item.data], content)
    return content.getvalue()


class _Hashing(io.RawIOBase):
    """A stream that hashes in a second thread what it writes, and keeps the first failure."""

    def __init__(self, file: BinaryIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self._hash, self._size = hashlib.sha256(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        hashed = None
        if size >= HASHED_IN_THREAD:
            hashed = self._thread.submit(self._hash.update, data)
        else:
            self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        finally:
            if hashed is not None:
                hashed.result()  # the caller may reuse the buffer after return
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()
