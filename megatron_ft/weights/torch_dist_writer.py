"""Write a torch_dist checkpoint of weights only from any source, streaming, without process groups.

    DIR/latest_checkpointed_iteration.txt    "release"
    DIR/release/.metadata, common.pt, metadata.json, manifest.json
                __R_0.distcp                 the part of rank R = stage x TP + tensor rank

Megatron-Core's dist_checkpointing loads it into any layout, and so does our trainer (--load).
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_ft.files.atomic import sync_file
from megatron_ft.files.checksum import describe_file
from megatron_ft.model.boxes import shard, stage_of
from megatron_ft.model.tensor_names import layer_of, stacked_key, tensor_shape, weight_of
from megatron_ft.weights.directory import TRACKER
from megatron_ft.weights.manifest import Manifest, git_revision, now, versions
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks
from megatron_ft.weights.torch_dist_metadata import StoredChunk, write_metadata

# Megatron-Core's linear layers each have an (empty) extra state, which its loader expects.
EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def write_torch_dist(
    source: WeightSource,
    directory: Path,
    *,
    dtype: torch.dtype,
    tensor_parallel: int,
    pipeline_parallel: int,
    padded_vocab: int,
    vocab_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `directory` (which exists, empty), in the parts that TP x PP ranks would have written.

    The layout must divide the shape (`ModelShape.check_layout`). `vocab_size` of the `padded_vocab`
    embedding rows are tokens. `advance(n)` is called after each block of n bytes. Raises UserError
    for a value that does not fit in `dtype`, and for a source that is damaged.
    """
    place = directory / "release"
    place.mkdir()
    chunks: list[StoredChunk] = []
    layers = source.shape.num_layers
    for stage in range(pipeline_parallel):
        names = [
            name
            for name in source.names()
            if stage_of(weight_of(name), layer_of(name), layers, pipeline_parallel) == stage
        ]
        own_layers = range(stage * layers // pipeline_parallel, (stage + 1) * layers // pipeline_parallel)
        for rank in range(tensor_parallel):
            with (place / f"__{stage * tensor_parallel + rank}_0.distcp").open("wb") as file:
                for name in names:
                    if weight_of(name).tp_dim is not None or rank == 0:
                        chunks.append(
                            _write_tensor(file, source, name, dtype, rank, tensor_parallel, padded_vocab, advance)
                        )
                if rank == 0:
                    chunks += _write_extra_states(file, own_layers, layers)
                sync_file(file)
    write_metadata(place, chunks)
    Manifest(
        iteration=0,
        shape=source.shape.with_vocab(vocab_size).as_dict(),
        special_ids=source.special_ids,
        args={},
        state={},
        layout={"tensor": tensor_parallel, "pipeline": pipeline_parallel, "context": 1, "data": 1},
        files={path.name: describe_file(path) for path in sorted(place.iterdir())},
        versions=versions(),
        git_revision=git_revision(),
        saved_at=now(),
    ).write(place)
    (directory / TRACKER).write_text("release", encoding="utf-8")


def _write_tensor(
    file: BinaryIO,
    source: WeightSource,
    name: str,
    dtype: torch.dtype,
    rank: int,
    tensor_parallel: int,
    padded_vocab: int,
    advance: Callable[[int], None],
) -> StoredChunk:
    """Append one tensor-parallel rank's part of the tensor `name`."""
    shape = tensor_shape(source.shape.with_vocab(padded_vocab), name)
    box = shard(shape, weight_of(name), rank, tensor_parallel)
    blocks = partial(box_blocks, source, name, dtype, box)
    key, layer = stacked_key(name)
    if layer is not None:
        shape, box = (source.shape.num_layers, *shape), box.stacked(layer)
    start = file.tell()
    length = write_pt(file, LazyTensor(dtype, box.sizes, blocks), advance)
    return StoredChunk(key, Path(file.name).name, start, length, dtype, shape, *box)


def _write_extra_states(file: BinaryIO, layers: range, num_layers: int) -> list[StoredChunk]:
    empty = io.BytesIO()
    torch.save([None], empty)
    chunks = []
    for layer in layers:
        for module in EXTRA_STATES:
            key = f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
            chunks.append(StoredChunk(key, Path(file.name).name, file.tell(), file.write(empty.getvalue())))
    return chunks
