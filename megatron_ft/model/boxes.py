"""Boxes of tensors: what two have in common, and which one a rank of a parallel layout holds.

Formats and layouts cut tensors differently. All of them describe a part of a tensor as a box: its
offset and its size on each axis.
"""

from typing import NamedTuple, Protocol

from megatron_ft.model.tensor_names import Weight


class HasBox(Protocol):
    """A box, or a checkpoint's description of a stored part: one offset and one size per axis."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


class Box(NamedTuple):
    """Part of a tensor: one offset and one size per axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def within(self, outer: HasBox) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds `outer`."""
        return tuple(slice(o - p, o - p + n) for o, n, p in zip(self.offsets, self.sizes, outer.offsets, strict=True))

    def stacked(self, layer: int) -> "Box":
        """The same box of one layer's tensor in the tensor with all layers stacked on axis 0."""
        return Box((layer, *self.offsets), (1, *self.sizes))


def overlap(a: HasBox, b: HasBox) -> Box | None:
    """The box that both hold, None when they share no element."""
    low = tuple(map(max, a.offsets, b.offsets))
    high = [min(o + n, p + m) for o, n, p, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    sizes = tuple(last - first for first, last in zip(low, high, strict=True))
    return Box(low, sizes) if all(size > 0 for size in sizes) else None


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def part(shape: tuple[int, ...], axis: int, first: int, size: int) -> Box:
    """Entries `first` to `first + size` of one axis of a tensor, and all of the other axes."""
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[axis], sizes[axis] = first, size
    return Box(tuple(offsets), tuple(sizes))


def shard(shape: tuple[int, ...], weight: Weight, rank: int, tensor_parallel: int) -> Box:
    """The box that one tensor-parallel rank holds of a tensor of `shape`.

    That is an equal part of the sharded axis, which `tensor_parallel` must divide, or the complete
    tensor where the weight is replicated.
    """
    if weight.tp_dim is None:
        return whole(shape)
    size = shape[weight.tp_dim] // tensor_parallel
    return part(shape, weight.tp_dim, rank * size, size)


def stage_of(weight: Weight, layer: int | None, num_layers: int, pipeline_parallel: int) -> int:
    """The pipeline stage that holds a tensor.

    Stages have equal numbers of layers. The first also has the embeddings, the last the final norm
    and the output layer.
    """
    if layer is not None:
        return layer // (num_layers // pipeline_parallel)
    return 0 if weight.module.endswith("embeddings") else pipeline_parallel - 1
