"""`.metadata` of a torch_dist checkpoint: which box of which tensor lies at which offset of which file; and what Megatron-Core expects next to it."""

import io
import math
import os
import pickle
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
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

from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.safe_pickle import load_dcp_metadata

METADATA = ".metadata"


def write_metadata(directory: Path, entries: list[tuple]) -> None:
    """`.metadata`, common.pt and metadata.json for what all ranks wrote. Raises ValueError when a tensor is not covered exactly once."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage = {}
    for key, dtype, shape, offset, size, file, position, length in entries:
        if dtype is None:
            tensors[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(file, position, length)
            continue
        if key not in tensors:
            tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
        storage[MetadataIndex(key, torch.Size(offset))] = _StorageInfo(file, position, length)
    for key, tensor in tensors.items():
        if isinstance(tensor, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if covered != math.prod(tensor.size):
                raise ValueError(f"{key}: ranks wrote {covered} elements of {math.prod(tensor.size)}")
    metadata = Metadata(
        state_dict_metadata=tensors, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
    )
    _write_durably(directory / METADATA, pickle.dumps(metadata))
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0}, common)
    _write_durably(directory / "common.pt", common.getvalue())
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    _write_durably(directory / "metadata.json", (directory / "metadata.json").read_bytes())


def read_metadata(directory: Path) -> Metadata:
    """`.metadata` through the allow-list. Raises UserError for a pickle that wants more, Damaged for one that is missing."""
    if not (directory / METADATA).is_file():
        raise Damaged(f"{directory / METADATA} is missing")
    return load_dcp_metadata(directory / METADATA)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
