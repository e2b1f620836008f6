"""`.metadata` of a torch_dist checkpoint: which box of which tensor is where in which file.

Written with it are the two small files that Megatron-Core expects next to it.
"""

import io
import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ft.files.atomic import sync_file
from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.safe_pickle import load_dcp_metadata

METADATA = ".metadata"
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
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        place = _StorageInfo(chunk.file, chunk.start, chunk.length)
        if chunk.dtype is None:
            stored[chunk.key] = BytesStorageMetadata()
            places[MetadataIndex(chunk.key)] = place
            continue
        if chunk.key not in tensors:
            properties = TensorProperties(dtype=chunk.dtype)
            tensors[chunk.key] = TensorStorageMetadata(properties, torch.Size(chunk.shape), [])
            stored[chunk.key] = tensors[chunk.key]
        box = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        tensors[chunk.key].chunks.append(box)
        places[MetadataIndex(chunk.key, torch.Size(chunk.offsets))] = place
    for key, tensor in tensors.items():
        covered = sum(math.prod(box.sizes) for box in tensor.chunks)
        if covered != math.prod(tensor.size):
            raise ValueError(f"{key}: ranks wrote {covered} elements of {math.prod(tensor.size)}")
    metadata = Metadata(
        state_dict_metadata=stored,
        storage_data=places,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    _write_durably(directory / METADATA, pickle.dumps(metadata))
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0}, common)
    _write_durably(directory / "common.pt", common.getvalue())
    _write_durably(directory / "metadata.json", json.dumps(_FORMAT).encode())


def read_metadata(directory: Path) -> Metadata:
    """Read `.metadata` through the allow-list.

    Raises Damaged when it is missing, UserError when its pickle references anything else.
    """
    if not (directory / METADATA).is_file():
        raise Damaged(f"{directory / METADATA} is missing, so its save did not finish")
    return load_dcp_metadata(directory / METADATA)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        sync_file(file)
