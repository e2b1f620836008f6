"""Write a Hugging Face directory from any source of weights, a block of rows at a time.

A safetensors file is a JSON header and the tensors' bytes one after the other, so it is written as
a stream: shards are planned from the shapes, and a block of weights at a time is in memory.
"""

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

from megatron_ft.files.atomic import sync_file
from megatron_ft.model.boxes import part
from megatron_ft.model.hf_names import HFTensor, hf_tensors
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import tensor_names, tensor_shape
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks, nbytes, raw, read_ahead, total_bytes

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def plan_shards(shape: ModelShape, dtype: torch.dtype, max_shard_bytes: int) -> list[dict[str, tuple[str, HFTensor]]]:
    """The tensors of each file, in order: Hugging Face's name: (ours, what it has of ours).

    A file exceeds `max_shard_bytes` only if one tensor does.
    """
    shards: list[dict[str, tuple[str, HFTensor]]] = [{}]
    size = 0
    for name in tensor_names(shape):
        for tensor in hf_tensors(shape, name):
            added = nbytes(dtype, tensor.shape)
            if shards[-1] and size + added > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][tensor.name] = name, tensor
            size += added
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
    """Write model.safetensors, or shards with their index; returns the files of weights.

    `advance(n)` is called after each block of n bytes. Raises UserError for a value that does not
    fit in `dtype`, and for a source that is damaged.
    """
    shape = source.shape.with_vocab(vocab_rows)
    shards = plan_shards(shape, dtype, max_shard_bytes)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"

        def blocks_of(hf_name: str, tensors: dict[str, tuple[str, HFTensor]] = tensors) -> Iterator[torch.Tensor]:
            name, tensor = tensors[hf_name]
            full = tensor_shape(shape, name)
            for rows in tensor.rows:
                yield from box_blocks(source, name, dtype, part(full, 0, rows.start, len(rows)))

        described = {name: (dtype, tensor.shape) for name, (_, tensor) in tensors.items()}
        write_tensors(directory / file, described, blocks_of, advance)
        files.append(directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(source, dtype, vocab_rows)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return files


def write_tensors(
    file: Path,
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks_of: Callable[[str], Iterator[torch.Tensor]],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file.

    `tensors` has the dtype and shape of each, `blocks_of(name)` yields its contiguous blocks in
    order. `advance(n)` is called after each block of n bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, (dtype, shape) in tensors.items():
        end = size + nbytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for block in read_ahead(chain.from_iterable(map(blocks_of, tensors))):
            out.write(raw(block))
            advance(block.nbytes)
        written = out.tell() - 8 - len(text)
        if written != size:
            raise AssertionError(f"{file}: wrote {written} bytes of tensors, its header announces {size}")
        sync_file(out)
