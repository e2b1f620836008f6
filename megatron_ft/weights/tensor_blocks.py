"""Tensors as streams of blocks: any box of any source's tensor, converted on the way, never whole in memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box
from megatron_ft.model.tensor_names import hf_shape
from megatron_ft.weights.source import WeightSource, slice_of_pieces

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # what converters write, by --dtype
# Bytes of weights in memory at once: few enough to stay in the processor's cache between being put together and being
# written, and for the allocator to use the same pages again (larger blocks are new, zeroed pages each time).
BLOCK = 1 << 20


def dtype_to_write(source: WeightSource, asked: str, say: Callable[[str], None] = print) -> torch.dtype:
    """What --dtype asks for: a name of DTYPES, or "keep", the narrowest dtype that holds every value of `source`.

    `say` hears of it when the source's tensors differ. Raises UserError when "keep" is a dtype that is not written.
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
        say(
            f"{source.path}: tensors of several precisions ({stored}); all are written in {dtype_name(source.dtype)}, none is rounded"
        )
    return source.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as config.json and people say."""
    return str(dtype).removeprefix("torch.")


def box_blocks(source: WeightSource, name: str, dtype: torch.dtype, box: Box) -> Iterator[torch.Tensor]:
    """Contiguous blocks of rows, in order, of a box of a tensor, in `dtype`. Rows beyond the tensor are zeros, as padding of a vocabulary is."""
    shape = hf_shape(source.shape, name)
    first, last = box.offsets[0], box.offsets[0] + box.sizes[0]
    width = 1 if len(shape) == 1 else shape[1]
    step = max(1, BLOCK // (width * max(dtype.itemsize, source.dtype.itemsize)))
    cut_dim, pieces = source.pieces(name)  # once: it may compare replicas or reorder rows
    for row in range(first, last, step):
        stop = min(last, row + step)
        there = slice_of_pieces(cut_dim, pieces, 0, min(row, shape[0]), min(stop, shape[0]))
        if len(shape) > 1:
            there = there.narrow(1, box.offsets[1], box.sizes[1])
        there = converted(there, dtype, name)
        if stop > shape[0]:
            there = torch.cat([there, there.new_zeros(stop - max(row, shape[0]), *there.shape[1:])])
        yield there.contiguous()


def read_ahead(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same blocks, each made in a thread while the one before it is written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in another dtype. Raises UserError when fp16 cannot hold a value."""
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
        raise UserError(
            f"{name}: holds values up to {tensor.abs().max().item():.3g}, too large for fp16; use --dtype bf16"
        )
    return cast


def raw(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def total_bytes(source: WeightSource, dtype: torch.dtype, vocab_rows: int) -> int:
    """Bytes of all tensors in `dtype`, the embedding with `vocab_rows` rows."""
    shape = source.shape.with_vocab(vocab_rows)
    return sum(nbytes(dtype, hf_shape(shape, name)) for name in source.names())
