"""`.metadata` of a torch_dist checkpoint: which box of which tensor is where in which file.

Written with it are the two small files that Megatron-Core expects next to it. Functions import
torch.distributed.checkpoint, which a new run does not need before its first save.
"""

import io
import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.weights.directory import METADATA, check_file_name
from megatron_ft.weights.manifest import Damaged

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

MOST_BYTES = 1 << 60  # no tensor and no file is larger
T = TypeVar("T")
# CheckpointingConfig in megatron/core/dist_checkpointing/core.py
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class StoredChunk:
    """One stored box of a tensor, or one byte object (`dtype` None): what it is and where it is.

    Ranks send theirs to rank 0, so a chunk must stay picklable.
    """

    key: str
    file: str  # name in the checkpoint's directory
    start: int  # bytes
    length: int  # bytes
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()  # of the complete tensor
    offsets: tuple[int, ...] = ()  # of the box
    sizes: tuple[int, ...] = ()


def write_metadata(directory: Path, chunks: Iterable[StoredChunk]) -> None:
    """Write `.metadata`, common.pt and metadata.json for the chunks of all ranks.

    Raises ValueError when the chunks of a tensor do not have as many elements as the tensor.
    """
    from torch.distributed.checkpoint import filesystem, metadata

    stored: dict[str, metadata.STORAGE_TYPES] = {}
    tensors: dict[str, TensorStorageMetadata] = {}
    locations: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    for chunk in chunks:
        place = filesystem._StorageInfo(chunk.file, chunk.start, chunk.length)
        if chunk.dtype is None:
            stored[chunk.key] = metadata.BytesStorageMetadata()
            locations[metadata.MetadataIndex(chunk.key)] = place
            continue
        if chunk.key not in tensors:
            properties = metadata.TensorProperties(dtype=chunk.dtype)
            tensors[chunk.key] = metadata.TensorStorageMetadata(properties, torch.Size(chunk.shape), [])
            stored[chunk.key] = tensors[chunk.key]
        box = metadata.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        tensors[chunk.key].chunks.append(box)
        locations[metadata.MetadataIndex(chunk.key, torch.Size(chunk.offsets))] = place
    for key, tensor in tensors.items():
        covered = sum(math.prod(box.sizes) for box in tensor.chunks)
        if covered != math.prod(tensor.size):
            raise ValueError(f"{key}: ranks wrote {covered} elements of {math.prod(tensor.size)}")
    content = metadata.Metadata(
        state_dict_metadata=stored,
        storage_data=locations,
        storage_meta=metadata.StorageMeta(),
        version=filesystem.CURRENT_DCP_VERSION,
    )
    _write_durably(directory / METADATA, pickle.dumps(content))
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0}, common)
    _write_durably(directory / "common.pt", common.getvalue())
    _write_durably(directory / "metadata.json", json.dumps(_FORMAT).encode())


def read_metadata(directory: Path) -> "Metadata":
    """Read `.metadata` through the allow-list.

    Raises Damaged when it is missing, UserError when its pickle references anything else.
    """
    if not (directory / METADATA).is_file():
        raise Damaged(f"{directory / METADATA} is missing, so its save did not finish")
    from megatron_ft.weights.torch_dist_pickle import load_dcp_metadata

    return load_dcp_metadata(directory / METADATA)


class StoredParts(NamedTuple):
    """What `.metadata` lists: tensors by key, the chunks of each by offset, byte objects by key."""

    tensors: "dict[str, TensorStorageMetadata]"
    chunks: dict[str, list[StoredChunk]]
    objects: dict[str, StoredChunk]


def stored_parts(directory: Path, metadata: "Metadata") -> StoredParts:
    """The content of `.metadata`, checked: types, boxes within their tensors, no box larger than
    the bytes that should contain it, files of this directory.

    Raises Damaged for the first contradiction, UserError when files are compressed.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorProperties, TensorStorageMetadata

    where = directory / METADATA
    parts = StoredParts({}, {}, {})
    sizes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    described = _field(metadata, "state_dict_metadata", dict, where)
    for key, stored in described.items():
        if isinstance(stored, TensorStorageMetadata):
            parts.tensors[key] = stored
            _field(_field(stored, "properties", TensorProperties, where), "dtype", torch.dtype, where)
            shape = _extent(stored, "size", where)
            for box in _field(stored, "chunks", list, where):
                offsets, size = _extent(box, "offsets", where), _extent(box, "sizes", where)
                if (
                    len(offsets) != len(shape)
                    or len(size) != len(shape)
                    or any(first + count > end for first, count, end in zip(offsets, size, shape, strict=True))
                ):
                    raise Damaged(f"{where} contradicts itself: part of {key} outside of its shape {list(shape)}")
                sizes[key, offsets] = size
    for index, place in _field(metadata, "storage_data", dict, where).items():
        key, file = _field(index, "fqn", str, where), _field(place, "relative_path", str, where)
        start, length = _field(place, "offset", int, where), _field(place, "length", int, where)
        try:
            check_file_name(file, f"{where}: {key!r}")
        except UserError as error:
            raise Damaged(str(error)) from None
        if found := getattr(place, "transform_descriptors", None):
            raise UserError(f"{directory / file}: stored compressed ({found!r:.80}), which is not supported")
        if not (0 <= start <= MOST_BYTES and 0 <= length <= MOST_BYTES):
            raise Damaged(f"{where} contradicts itself: {key} at byte {start} of {file}, {length} bytes")
        if isinstance(described.get(key), BytesStorageMetadata):
            parts.objects[key] = StoredChunk(key, file, start, length)
            continue
        offsets = () if getattr(index, "offset", None) is None else _extent(index, "offset", where)
        if (key, offsets) not in sizes:
            raise Damaged(f"{where} contradicts itself: no tensor {key} with a part at {offsets}")
        size, dtype = sizes[key, offsets], parts.tensors[key].properties.dtype
        if math.prod(size) * dtype.itemsize > length:
            raise Damaged(f"{where} contradicts itself: {key} of {list(size)} in {dtype} in {length} bytes")
        chunk = StoredChunk(key, file, start, length, dtype, tuple(parts.tensors[key].size), offsets, size)
        parts.chunks.setdefault(key, []).append(chunk)
    for chunks in parts.chunks.values():
        chunks.sort(key=attrgetter("offsets"))
    return parts


def _field(value: object, name: str, kind: type[T], where: Path) -> T:
    """An attribute of what was unpickled. Raises Damaged unless it is of this type."""
    found = getattr(value, name, None)
    if not isinstance(found, kind) or isinstance(found, bool):
        what = f"{name} of {type(value).__name__} is {found!r:.80}"
        raise Damaged(f"{where} contradicts itself: {what}, expected {kind.__name__}")
    return found


def _extent(value: object, name: str, where: Path) -> tuple[int, ...]:
    """A shape, or offsets: one size per axis."""
    sizes = tuple(_field(value, name, tuple, where))
    if not all(type(size) is int and 0 <= size <= MOST_BYTES for size in sizes) or math.prod(sizes) > MOST_BYTES:
        raise Damaged(f"{where} contradicts itself: {name} of {type(value).__name__} is {sizes!r:.80}")
    return sizes


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync_file(file)
