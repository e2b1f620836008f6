"""Writing and reading sharded tensors in Megatron-Core's torch_dist format (torch distributed checkpoint), without its writer processes.

    .metadata         which box of which tensor lies where (a pickle, read through an allow-list)
    __3_0.distcp      the boxes of rank 3, one torch.save after the other
    common.pt, metadata.json     what Megatron-Core expects beside them

Megatron-Core's own writer forks processes, which segfaults after CUDA and hangs when one of them dies. Here a rank copies its tensors and writes
them from a thread, so a save can go on behind training, and an error comes back as an error.
"""

import hashlib
import io
import mmap
import os
import pickle
import re
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box, overlap
from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.torch_dist_metadata import StoredChunk, read_metadata


class RankWriter:
    """One rank's file of one checkpoint. Made with the tensors to write (copied at once when `background`), then `start`ed."""

    def __init__(self, directory: Path, rank: int, items: list[ShardedTensor | ShardedObject], background: bool):
        self.path = directory / f"__{rank}_0.distcp"
        self.items = [item for item in items if is_main_replica(item.replica_id)]
        self.background = background
        if background:
            self.copies = [_own_copy(i) if isinstance(i, ShardedTensor) else _bytes_of(i) for i in self.items]
        self.entries: list[StoredChunk] = []
        self.file: dict | None = None
        self.error: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write: in this thread, or behind training."""
        if self.background:
            self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def running(self) -> bool:
        """Whether the background thread still writes."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until everything is written and durable, or `error` says why not."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self.items:
                self._write()
        except OSError as error:
            self.error = f"{self.path}: {error.strerror or error}"
        except (
            Exception
        ) as error:  # torch reports a failed write as RuntimeError; whatever it is, the other ranks must hear of it
            self.error = f"{self.path}: {type(error).__name__}: {error}"

    def _write(self) -> None:
        with open(self.path, "wb") as file, ThreadPoolExecutor(1, "checkpoint checksum") as beside:
            stream = _Hashing(file, beside)
            try:
                self._write_items(stream)
            finally:
                if stream.failure:  # what torch made of it does not say "no space left"
                    raise stream.failure
            file.flush()
            os.fsync(file.fileno())
            self.file = {"size": stream.tell(), "sha256": stream.digest()}
        if self.path.stat().st_size != self.file["size"]:
            raise OSError(f"{self.path.stat().st_size} bytes arrived of {self.file['size']}")

    def _write_items(self, stream: "_Hashing") -> None:
        for number, item in enumerate(self.items):
            start = stream.tell()
            if isinstance(item, ShardedTensor):
                torch.save(self.copies[number] if self.background else _own_copy(item), stream)
            else:
                stream.write(self.copies[number] if self.background else _bytes_of(item))
            if self.background:
                self.copies[number] = None  # written: let the memory go
            self.entries.append(_chunk_of(item, self.path.name, start, stream.tell() - start))


def _chunk_of(item: ShardedTensor | ShardedObject, file: str, start: int, length: int) -> StoredChunk:
    if not isinstance(item, ShardedTensor):
        return StoredChunk(item.unique_key, file, start, length)
    shape, offsets = tuple(item.global_shape), tuple(item.global_offset)
    return StoredChunk(item.key, file, start, length, item.dtype, shape, offsets, _whole_rank(item))


def read_tensors(directory: Path, wanted: list[ShardedTensor], metadata: Metadata | None = None) -> None:
    """Fill the data of `wanted` in place, whatever layout wrote them; values are converted to the data's dtype.

    A tensor that may differ in size (a padded vocabulary) is filled as far as the checkpoint goes and zero beyond.
    Raises UserError for a tensor that is not there or has another shape, Damaged for one that cannot be read whole.
    """
    metadata = metadata or read_metadata(directory)
    reads: dict[str, list[tuple]] = defaultdict(list)
    chunks_at = {}
    for target in wanted:
        stored = metadata.state_dict_metadata.get(target.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(
                f"{directory} holds no {target.key}, which this run's flags ask for; give it as --load to take its weights alone"
            )
        if tuple(stored.size) != tuple(target.global_shape) and not target.allow_shape_mismatch:
            raise UserError(
                f"{directory}: {target.key} has shape {list(stored.size)}, this run's has {list(target.global_shape)}; "
                "use the architecture flags it was saved with"
            )
        if target.key not in chunks_at:
            chunks_at[target.key] = _by_first_axis(stored.chunks)
        data = _whole_rank_view(target)
        box = Box(tuple(target.global_offset), tuple(data.shape))
        filled = 0
        for chunk in chunks_at[target.key](box.offsets[0], box.sizes[0]) if box.offsets else stored.chunks:
            common = overlap(box, chunk)
            if common is None:
                continue
            source, place = common.within(chunk), data[common.within(box)]
            where = metadata.storage_data[MetadataIndex(target.key, chunk.offsets)]
            reads[where.relative_path].append((where.offset, where.length, source, place))
            filled += place.numel()
        if filled < data.numel():
            if not target.allow_shape_mismatch:
                raise Damaged(f"{directory}: {target.key} is stored only in part")
            data.zero_()
    for name in sorted(reads):
        _read_file(directory / name, reads[name])


def _read_file(path: Path, reads: list[tuple]) -> None:
    """Copy boxes of one file to their places, each stored tensor loaded once."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        loaded_at, tensor = -1, None
        for position, length, source, place in sorted(reads, key=lambda read: read[0]):
            if position != loaded_at:
                tensor = _load_tensor(path, position, content[position : position + length])
                loaded_at = position
            place.copy_(tensor[source])


def _load_tensor(path: Path, position: int, content: bytes) -> torch.Tensor:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)|function (\S+)", str(error))
        name = (wanted.group(1) or wanted.group(2)) if wanted else "more than a tensor"
        raise UserError(
            f"{path}: refused, a pickle in it (byte {position}) wants {name}; the file was tampered with"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise Damaged(f"{path} is damaged at byte {position} ({str(error).splitlines()[0][:100]})") from None


def _by_first_axis(chunks: list[ChunkStorageMetadata]):
    """Chunks of stacked layers by their layer, so that a layer is not compared with all others'."""
    if any(len(chunk.sizes) == 0 or chunk.sizes[0] != 1 for chunk in chunks):
        return lambda first, count: chunks
    layers = defaultdict(list)
    for chunk in chunks:
        layers[chunk.offsets[0]].append(chunk)
    return lambda first, count: [chunk for layer in range(first, first + count) for chunk in layers[layer]]


def _whole_rank(item: ShardedTensor) -> tuple[int, ...]:
    return (1,) * item.prepend_axis_num + tuple(item.local_shape)


def _whole_rank_view(item: ShardedTensor) -> torch.Tensor:
    return item.data.detach().view(_whole_rank(item))


def _own_copy(item: ShardedTensor) -> torch.Tensor:
    """A CPU copy with a storage of its own: torch.save would write all of a shared one."""
    tensor = _whole_rank_view(item)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _bytes_of(item: ShardedObject) -> bytes:
    content = io.BytesIO()
    torch.save([item.data], content)
    return content.getvalue()


class _Hashing(io.RawIOBase):
    """A stream that hashes what goes through, beside writing it, and keeps the first failure."""

    def __init__(self, file, beside: ThreadPoolExecutor) -> None:
        self._beside = beside
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        hashed = self._beside.submit(self._hash.update, data) if size >= 1 << 16 else self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        finally:
            if hashed is not None:
                hashed.result()  # the buffer is only lent
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()
