"""Rewrite a torch_dist checkpoint as another TP x PP would have saved it: weights and optimizer state, streaming.

Every tensor of the model's shape, the fp32 weights and moments of the optimizer among them, is cut anew and its
vocabulary padded anew; random states belong to the old ranks and are left out; everything else is copied.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box, shard, stage_of
from megatron_ft.model.tensor_names import LAYER, WHOLE, WTE, Weight
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.torch_dist_metadata import StoredChunk, write_metadata
from megatron_ft.weights.torch_dist_reader import TorchDistFiles

_WEIGHTS = {f"decoder.layers.{weight.core}": weight for weight in LAYER} | {weight.core: weight for weight in WHOLE}
BLOCK = 64 << 20  # bytes in memory at once; large, for each block is looked for in all stored parts of its tensor
# Megatron-Core's dp_reshardable optimizer state is the buckets of one layout, not tensors of parameters.
_TIED_TO_LAYOUT = ("gbuf_idx", "bucket_idx")


def model_weight(key: str) -> tuple[Weight, bool] | None:
    """The model's tensor that a key is, or is optimizer state of, and whether layers are stacked on its axis 0."""
    for name, weight in _WEIGHTS.items():
        if key == name or key.endswith(f".{name}"):
            return weight, name.startswith("decoder.layers.")
    return None


def resharded_bytes(files: TorchDistFiles, padded_vocab: int) -> int:
    """Bytes of tensors that `reshard_core` will write."""
    return sum(
        torch.Size(_new_shape(files, key, padded_vocab)).numel() * files.tensors[key].properties.dtype.itemsize
        for key in _kept(files)
    )


def reshard_core(
    files: TorchDistFiles,
    directory: Path,
    *,
    tp: int,
    pp: int,
    padded_vocab: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the tensors and `.metadata` into `directory` (which exists, empty)."""
    jobs: dict[int, list[tuple]] = {rank: [] for rank in range(tp * pp)}
    for key in _kept(files):
        for rank, shape, box in _cuts(files, key, tp, pp, padded_vocab):
            jobs[rank].append((key, shape, box))
    chunks: list[StoredChunk] = []
    for rank, boxes in jobs.items():
        file_name = f"__{rank}_0.distcp"
        with (directory / file_name).open("wb") as file:
            for key, shape, box in boxes:
                dtype = files.tensors[key].properties.dtype
                start = file.tell()
                length = write_pt(file, LazyTensor(dtype, box.sizes, partial(_blocks, files, key, box)), advance)
                chunks.append(StoredChunk(key, file_name, start, length, dtype, shape, *box))
            for key in files.objects if rank == 0 else ():
                if not key.startswith("rng"):
                    chunks.append(StoredChunk(key, file_name, file.tell(), file.write(files.bytes_of(key))))
            file.flush()
            os.fsync(file.fileno())
    write_metadata(directory, chunks)


def _kept(files: TorchDistFiles) -> list[str]:
    tied = [key for key in files.tensors if any(part in key for part in _TIED_TO_LAYOUT)]
    if tied:
        raise UserError(
            f"{files.path}: its optimizer state ({tied[0]}) is tied to the layout that saved it (dp_reshardable); "
            "save it as fully_reshardable, or convert the weights alone"
        )
    return [key for key in files.tensors if not key.startswith("rng")]


def _new_shape(files: TorchDistFiles, key: str, padded_vocab: int) -> tuple[int, ...]:
    shape, found = files.shape(key), model_weight(key)
    return (padded_vocab, *shape[1:]) if found and found[0].hf == WTE else shape


def _cuts(files: TorchDistFiles, key: str, tp: int, pp: int, padded_vocab: int) -> Iterator[tuple]:
    """(rank, whole shape, box) of every part of a tensor in the new layout."""
    shape, found = _new_shape(files, key, padded_vocab), model_weight(key)
    if found is None or len(shape) == 0:
        for chunk in files.chunks_of(key):
            yield 0, shape, Box(chunk.offsets, chunk.sizes)
        return
    weight, stacked = found
    for layer in range(shape[0]) if stacked else (None,):
        stage = stage_of(weight, layer, shape[0], pp)
        for rank in range(1 if weight.tp_dim is None else tp):
            box = shard(shape[1:], weight, rank, tp).stacked(layer) if stacked else shard(shape, weight, rank, tp)
            yield stage * tp + rank, shape, box


def _blocks(files: TorchDistFiles, key: str, box: Box) -> Iterator[torch.Tensor]:
    """A box in blocks of rows; rows beyond the stored tensor (padding) are zeros."""
    offset, size = box
    axis = next((a for a, n in enumerate(size) if n > 1), 0)  # the layer's axis has one entry
    stored = files.shape(key)
    row_bytes = torch.Size(size[axis + 1 :]).numel() * files.tensors[key].properties.dtype.itemsize
    step = max(1, BLOCK // max(1, row_bytes))
    if not size:
        yield files.read_box(key, box)
        return
    for first in range(offset[axis], offset[axis] + size[axis], step):
        last = min(first + step, offset[axis] + size[axis])
        there = max(0, min(last, stored[axis]) - first)
        begin = (*offset[:axis], min(first, stored[axis]), *offset[axis + 1 :])
        block = files.read_box(key, Box(begin, (*size[:axis], there, *size[axis + 1 :])))
        if there < last - first:
            padding = block.new_zeros((*size[:axis], last - first - there, *size[axis + 1 :]))
            block = torch.cat([block, padding], axis)
        yield block.contiguous()
