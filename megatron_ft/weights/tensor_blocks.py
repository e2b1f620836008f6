"""Tensors as streams of blocks: any box of any source's tensor, converted block by block."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box
from megatron_ft.model.tensor_names import tensor_shape
from megatron_ft.weights.precision import PRECISIONS
from megatron_ft.weights.source import WeightSource, slice_of_pieces

# What converters write, by --dtype.
DTYPES = dict(zip(PRECISIONS, (torch.bfloat16, torch.float16, torch.float32), strict=True))
# Bytes of weights in memory at once: few enough that they are still in the CPU's cache when they
# are written, and that the allocator reuses their pages (larger blocks are new, zeroed pages).
BLOCK = 1 << 20


def dtype_to_write(source: WeightSource, asked: str, log: Callable[[str], None] = print) -> torch.dtype:
    """The dtype of --dtype: a name in DTYPES, or "keep", the narrowest that holds every value.

    `log` is called with a line when "keep" finds tensors of different dtypes. Raises UserError when
    "keep" finds a dtype that converters do not write.
    """
    if asked != "keep":
        return DTYPES[asked]
    if source.dtype not in DTYPES.values():
        raise UserError(
            f"{source.path}: weights in {dtype_name(source.dtype)}; choose one of --dtype {', '.join(DTYPES)}"
        )
    counts = Counter(map(source.dtype_of, source.names()))
    if len(counts) > 1:
        stored = ", ".join(f"{count} in {dtype_name(dtype)}" for dtype, count in counts.items())
        log(
            f"{source.path}: tensors of several precisions ({stored}); "
            f"all are written in {dtype_name(source.dtype)}, none is rounded"
        )
    return source.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as in config.json."""
    return str(dtype).removeprefix("torch.")


def box_blocks(source: WeightSource, name: str, dtype: torch.dtype, box: Box) -> Iterator[torch.Tensor]:
    """A box of a tensor as contiguous blocks of rows, in order, in `dtype`.

    Rows beyond the tensor (padding of the vocabulary) are zeros. Raises UserError as `converted`
    and the source do.
    """
    shape = tensor_shape(source.shape, name)
    first, last = box.offsets[0], box.offsets[0] + box.sizes[0]
    width = 1 if len(shape) == 1 else shape[1]
    step = max(1, BLOCK // (width * max(dtype.itemsize, source.dtype.itemsize)))
    cut_dim, pieces = source.pieces(name)  # once: it may compare replicas or reorder rows
    for row in range(first, last, step):
        stop = min(last, row + step)
        block = slice_of_pieces(cut_dim, pieces, 0, min(row, shape[0]), min(stop, shape[0]))
        if len(shape) > 1:
            block = block.narrow(1, box.offsets[1], box.sizes[1])
        block = converted(block, dtype, name)
        if stop > shape[0]:
            block = torch.cat([block, block.new_zeros(stop - max(row, shape[0]), *block.shape[1:])])
        yield block.contiguous()


def read_ahead(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same blocks, each computed in a thread while the previous one is written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in another dtype. Raises UserError when a value is too large for fp16."""
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
        raise UserError(
            f"{name}: holds values up to {tensor.abs().max().item():.3g}, too large for fp16; use --dtype bf16"
        )
    return cast


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def total_bytes(source: WeightSource, dtype: torch.dtype, vocab_rows: int) -> int:
    """Bytes of all tensors in `dtype`, the embedding with `vocab_rows` rows."""
    shape = source.shape.with_vocab(vocab_rows)
    return sum(nbytes(dtype, tensor_shape(shape, name)) for name in source.names())
