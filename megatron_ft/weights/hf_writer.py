"""Write a Hugging Face GPTBigCode directory from any source of weights, a block of rows at a time.

safetensors files are a JSON header and the tensors' bytes one after the other, so they are written as a stream: shards are
planned from the shapes alone, and a block of weights at a time is in memory.
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

from megatron_ft.model.boxes import whole
from megatron_ft.model.tensor_names import hf_shape
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks, nbytes, raw, read_ahead, total_bytes

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def plan_shards(source: WeightSource, dtype: torch.dtype, vocab_rows: int, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names of each file, in order; a file exceeds `max_shard_bytes` only when one tensor does."""
    shape = source.shape.with_vocab(vocab_rows)
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        size_here = nbytes(dtype, hf_shape(shape, name))
        if shards[-1] and size + size_here > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += size_here
    return shards


def write_safetensors(
    source: WeightSource,
    directory: Path,
    *,
    dtype: torch.dtype,
    vocab_rows: int,
    max_shard_bytes: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write model.safetensors, or shards with their index; `advance` hears of every block's bytes. Returns the files."""
    shards = plan_shards(source, dtype, vocab_rows, max_shard_bytes)
    shape = source.shape.with_vocab(vocab_rows)
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: hf_shape(shape, name) for name in names}
        write_tensors(
            directory / file,
            {name: (dtype, shape) for name, shape in shapes.items()},
            lambda name, shapes=shapes: box_blocks(source, name, dtype, whole(shapes[name])),
            advance,
        )
        files.append(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(source, dtype, vocab_rows)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files


def write_tensors(
    file: Path,
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks_of: Callable[[str], Iterator[torch.Tensor]],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file: dtype and shape of each tensor are known, its contiguous blocks come from `blocks_of(name)`."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for block in read_ahead(chain.from_iterable(map(blocks_of, tensors))):
            out.write(raw(block))
            advance(block.nbytes)
        if out.tell() != 8 + len(text) + offset:
            raise AssertionError(f"{file}: {out.tell() - 8 - len(text)} bytes of tensors written, {offset} announced")
        out.flush()
        os.fsync(out.fileno())
