"""Rewrite a torch_dist checkpoint, optimizer state included, as another layout would have saved it.

Tensors of the model's shape (the weights, and the optimizer's fp32 weights and moments) are cut for
the new layout, with the vocabulary padded for it. Everything else is copied, except the random
states that Megatron-LM saves, which belong to the ranks of the old layout.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_file
from megatron_ft.model.boxes import Box, shard, stage_of
from megatron_ft.model.tensor_names import LAYER, VOCABULARY, WHOLE, Weight
from megatron_ft.weights.manifest import damage_as_user_error
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.torch_dist_files import TorchDistFiles
from megatron_ft.weights.torch_dist_metadata import StoredChunk, write_metadata

_WEIGHTS = {f"decoder.layers.{weight.core}": weight for weight in LAYER} | {weight.core: weight for weight in WHOLE}
BLOCK = 64 << 20  # bytes in memory at once
# Megatron-Core's dp_reshardable optimizer state is the buckets of one layout, not tensors.
_TIED_TO_LAYOUT = ("gbuf_idx", "bucket_idx")
_RANDOM_STATE = "rng"


class _Part(NamedTuple):
    """A box of a tensor of `shape` that one rank of the new layout holds."""

    key: str
    rank: int
    shape: tuple[int, ...]
    box: Box


def resharded_bytes(files: TorchDistFiles, padded_vocab: int) -> int:
    """Bytes of tensors that `write_resharded` will write. Raises UserError as it does."""
    return sum(
        torch.Size(_new_shape(files, key, padded_vocab)).numel() * files.tensors[key].properties.dtype.itemsize
        for key in _kept(files)
    )


def write_resharded(
    files: TorchDistFiles,
    directory: Path,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    padded_vocab: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the tensors and `.metadata` into `directory` (which exists, empty).

    `padded_vocab` is the number of embedding rows to write. `advance(n)` is called after each block
    of n bytes. Raises UserError for damaged files and for optimizer state tied to its layout.
    """
    parts: dict[int, list[_Part]] = {rank: [] for rank in range(tensor_parallel * pipeline_parallel)}
    for key in _kept(files):
        for part in _parts(files, key, tensor_parallel, pipeline_parallel, padded_vocab):
            parts[part.rank].append(part)
    chunks: list[StoredChunk] = []
    for rank in parts:
        name = f"__{rank}_0.distcp"
        with (directory / name).open("wb") as file, damage_as_user_error():
            for key, _, shape, box in parts[rank]:
                dtype = files.tensors[key].properties.dtype
                start = file.tell()
                length = write_pt(file, LazyTensor(dtype, box.sizes, partial(_blocks, files, key, box)), advance)
                chunks.append(StoredChunk(key, name, start, length, dtype, shape, *box))
            for key in files.objects if rank == 0 else ():
                if not key.startswith(_RANDOM_STATE):
                    chunks.append(StoredChunk(key, name, file.tell(), file.write(files.bytes_of(key))))
            sync_file(file)
    write_metadata(directory, chunks)


def _kept(files: TorchDistFiles) -> list[str]:
    tied = [key for key in files.tensors if any(part in key for part in _TIED_TO_LAYOUT)]
    if tied:
        raise UserError(
            f"{files.path}: its optimizer state ({tied[0]}) is tied to the layout that saved it (dp_reshardable); "
            "save it as fully_reshardable, or convert only the weights"
        )
    return [key for key in files.tensors if not key.startswith(_RANDOM_STATE)]


def _model_weight(key: str) -> tuple[Weight, bool] | None:
    """The weight that a key is, or is state of, and whether layers are stacked on axis 0."""
    for name, weight in _WEIGHTS.items():
        if key == name or key.endswith(f".{name}"):
            return weight, name.startswith("decoder.layers.")
    return None


def _new_shape(files: TorchDistFiles, key: str, padded_vocab: int) -> tuple[int, ...]:
    shape, found = files.shape(key), _model_weight(key)
    return (padded_vocab, *shape[1:]) if found and found[0].core in VOCABULARY else shape


def _parts(
    files: TorchDistFiles, key: str, tensor_parallel: int, pipeline_parallel: int, padded_vocab: int
) -> Iterator[_Part]:
    """Every part of a tensor in the new layout."""
    shape, found = _new_shape(files, key, padded_vocab), _model_weight(key)
    if found is None or len(shape) == 0:
        for chunk in files.chunks_of(key):
            yield _Part(key, 0, shape, Box(chunk.offsets, chunk.sizes))
        return
    weight, stacked = found
    ranks = 1 if weight.tp_dim is None else tensor_parallel
    if not stacked:
        first = stage_of(weight, None, 0, pipeline_parallel) * tensor_parallel
        for rank in range(ranks):
            yield _Part(key, first + rank, shape, shard(shape, weight, rank, tensor_parallel))
        return
    for layer in range(shape[0]):
        first = stage_of(weight, layer, shape[0], pipeline_parallel) * tensor_parallel
        for rank in range(ranks):
            box = shard(shape[1:], weight, rank, tensor_parallel).stacked(layer)
            yield _Part(key, first + rank, shape, box)


def _blocks(files: TorchDistFiles, key: str, box: Box) -> Iterator[torch.Tensor]:
    """A box in blocks of rows; rows beyond the stored tensor (padding) are zeros."""
    offset, size = box
    if not size:
        yield files.read_box(key, box)
        return
    axis = next((a for a, n in enumerate(size) if n > 1), 0)  # the layer's axis has one entry
    stored = files.shape(key)
    row_bytes = torch.Size(size[axis + 1 :]).numel() * files.tensors[key].properties.dtype.itemsize
    step = max(1, BLOCK // max(1, row_bytes))
    for first in range(offset[axis], offset[axis] + size[axis], step):
        last = min(first + step, offset[axis] + size[axis])
        rows = max(0, min(last, stored[axis]) - first)
        begin = (*offset[:axis], min(first, stored[axis]), *offset[axis + 1 :])
        block = files.read_box(key, Box(begin, (*size[:axis], rows, *size[axis + 1 :])))
        if rows < last - first:
            padding = block.new_zeros((*size[:axis], last - first - rows, *size[axis + 1 :]))
            block = torch.cat([block, padding], axis)
        yield block.contiguous()
