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

from megatron_ft.checkpoint.directory import TRACKER
from megatron_ft.checkpoint.manifest import Manifest, describe_file, git_revision, now, versions
from megatron_ft.checkpoint.names import WTE, hf_shape, hf_to_stacked, layer_of, weight_of
from megatron_ft.checkpoint.pt_stream import LazyTensor, write_pt
from megatron_ft.checkpoint.stream import box_blocks, nbytes
from megatron_ft.checkpoint.torch_dist import write_metadata
from megatron_ft.checkpoint.weights import WeightSource

# Megatron-Core's linear layers have an (empty) extra state each, which it wants to find.
EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def core_bytes(source: WeightSource, dtype: torch.dtype, padded_vocab: int) -> int:
    """Bytes of weights that `write_core` will write."""
    return sum(nbytes(dtype, _whole_shape(source, name, padded_vocab)) for name in source.names())


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
    entries: list[tuple] = []
    per_stage = source.shape.num_layers // pp
    for stage in range(pp):
        names = [name for name in source.names() if _stage_of(name, per_stage, pp) == stage]
        for rank in range(tp):
            with (place / f"__{stage * tp + rank}_0.distcp").open("wb") as file:
                for name in names:
                    if weight_of(name).tp_dim is not None or rank == 0:
                        entries.append(_write_tensor(file, source, name, dtype, rank, tp, padded_vocab, advance))
                if rank == 0:
                    entries += _write_extra_states(file, range(stage * per_stage, (stage + 1) * per_stage), source)
                file.flush()
                os.fsync(file.fileno())
    write_metadata(place, entries)
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


def _stage_of(name: str, per_stage: int, pp: int) -> int:
    layer = layer_of(name)
    if layer is not None:
        return layer // per_stage
    return pp - 1 if weight_of(name).core.startswith("decoder.") else 0


def _whole_shape(source: WeightSource, name: str, padded_vocab: int) -> tuple[int, ...]:
    shape = hf_shape(source.shape, name)
    return (padded_vocab, *shape[1:]) if name == WTE else shape


def _write_tensor(
    file, source: WeightSource, name: str, dtype: torch.dtype, rank: int, tp: int, padded_vocab: int, advance
) -> tuple:
    """Append one rank's part of one layer's tensor; the entry that `.metadata` needs of it."""
    whole = list(_whole_shape(source, name, padded_vocab))
    size, offset = whole.copy(), [0] * len(whole)
    rows = (0, whole[0])
    columns = None
    dim = weight_of(name).tp_dim
    if dim is not None:
        size[dim] = whole[dim] // tp
        offset[dim] = rank * size[dim]
        if dim == 0:
            rows = (offset[0], offset[0] + size[0])
        else:
            columns = (offset[1], offset[1] + size[1])
    key, layer = hf_to_stacked(name)
    if layer is not None:
        whole, size, offset = [source.shape.num_layers, *whole], [1, *size], [layer, *offset]
    position = file.tell()
    length = write_pt(
        file, LazyTensor(dtype, tuple(size), partial(box_blocks, source, name, dtype, rows, columns)), advance
    )
    return key, dtype, tuple(whole), tuple(offset), tuple(size), Path(file.name).name, position, length


def _write_extra_states(file, layers: range, source: WeightSource) -> list[tuple]:
    empty = io.BytesIO()
    torch.save([None], empty)
    entries = []
    for layer in layers:
        for module in EXTRA_STATES:
            key = f"decoder.layers.{module}._extra_state/shard_{layer}_{source.shape.num_layers}"
            entries.append((key, None, (), (), (), Path(file.name).name, file.tell(), file.write(empty.getvalue())))
    return entries
