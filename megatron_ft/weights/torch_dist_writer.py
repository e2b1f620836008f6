"""Write a torch_dist checkpoint of weights alone from any source, streaming, without process groups.

    DIR/latest_checkpointed_iteration.txt    "release"
    DIR/release/.metadata, common.pt, metadata.json, manifest.json
                __R_0.distcp                 what rank R = stage x TP + tensor rank would have written

Megatron-Core's dist_checkpointing loads it into any layout, and so does this package's trainer (--load).
"""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_ft.files.checksum import describe_file
from megatron_ft.model.boxes import shard, stage_of
from megatron_ft.model.tensor_names import hf_shape, hf_to_stacked, layer_of, weight_of
from megatron_ft.weights.directory import TRACKER
from megatron_ft.weights.manifest import Manifest, git_revision, now, versions
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks
from megatron_ft.weights.torch_dist_metadata import StoredChunk, write_metadata

# Megatron-Core's linear layers have an (empty) extra state each, which it wants to find.
EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def write_core(
    source: WeightSource,
    directory: Path,
    *,
    dtype: torch.dtype,
    tp: int,
    pp: int,
    padded_vocab: int,
    vocab_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `directory` (which exists, empty), in the parts that `tp` x `pp` ranks would have; layouts must divide the shape.
    `vocab_size` is the tokenizer's, of the `padded_vocab` rows."""
    place = directory / "release"
    place.mkdir()
    chunks: list[StoredChunk] = []
    layers = source.shape.num_layers
    for stage in range(pp):
        names = [name for name in source.names() if stage_of(weight_of(name), layer_of(name), layers, pp) == stage]
        for rank in range(tp):
            with (place / f"__{stage * tp + rank}_0.distcp").open("wb") as file:
                for name in names:
                    if weight_of(name).tp_dim is not None or rank == 0:
                        chunks.append(_write_tensor(file, source, name, dtype, rank, tp, padded_vocab, advance))
                if rank == 0:
                    chunks += _write_extra_states(file, range(stage * layers // pp, (stage + 1) * layers // pp), source)
                file.flush()
                os.fsync(file.fileno())
    write_metadata(place, chunks)
    Manifest(
        iteration=0,
        shape=source.shape.with_vocab(vocab_size).as_dict(),
        args={},
        state={},
        layout={"tensor": tp, "pipeline": pp, "context": 1, "data": 1},
        files={path.name: describe_file(path) for path in sorted(place.iterdir())},
        versions=versions(),
        git_revision=git_revision(),
        saved_at=now(),
    ).write(place)
    (directory / TRACKER).write_text("release")


def _write_tensor(
    file, source: WeightSource, name: str, dtype: torch.dtype, rank: int, tp: int, padded_vocab: int, advance
) -> StoredChunk:
    """Append one rank's part of one tensor."""
    whole = hf_shape(source.shape.with_vocab(padded_vocab), name)
    box = shard(whole, weight_of(name), rank, tp)
    blocks = partial(box_blocks, source, name, dtype, box)
    key, layer = hf_to_stacked(name)
    if layer is not None:
        whole, box = (source.shape.num_layers, *whole), box.stacked(layer)
    start = file.tell()
    length = write_pt(file, LazyTensor(dtype, box.sizes, blocks), advance)
    return StoredChunk(key, Path(file.name).name, start, length, dtype, whole, *box)


def _write_extra_states(file, layers: range, source: WeightSource) -> list[StoredChunk]:
    empty = io.BytesIO()
    torch.save([None], empty)
    chunks = []
    for layer in layers:
        for module in EXTRA_STATES:
            key = f"decoder.layers.{module}._extra_state/shard_{layer}_{source.shape.num_layers}"
            chunks.append(StoredChunk(key, Path(file.name).name, file.tell(), file.write(empty.getvalue())))
    return chunks
