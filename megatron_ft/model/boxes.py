"""Boxes of tensors: what two have in common, and which one a rank of a parallel layout holds.

Formats and layouts differ in how they cut tensors. All of them say it as boxes: where one begins on each axis, and how long it is there.
"""

from typing import NamedTuple, Protocol

from megatron_ft.model.tensor_names import Weight


class HasBox(Protocol):
    """A box, or what a checkpoint says of a stored part: anything with offsets and sizes, one number an axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Box(NamedTuple):
    """Part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def within(self, outer: HasBox) -> tuple[slice, ...]:
        """Where this box is in a tensor that holds `outer`."""
        return tuple(slice(o - p, o - p + n) for o, n, p in zip(self.offsets, self.sizes, outer.offsets, strict=True))

    def stacked(self, layer: int) -> "Box":
        """The same box of one layer's tensor where layers are stacked on axis 0."""
        return Box((layer, *self.offsets), (1, *self.sizes))


def overlap(a: HasBox, b: HasBox) -> Box | None:
    """The box that both hold, None where they have nothing in common."""
    low = tuple(map(max, a.offsets, b.offsets))
    high = [min(o + n, p + m) for o, n, p, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    sizes = tuple(last - first for first, last in zip(low, high, strict=True))
    return Box(low, sizes) if all(size > 0 for size in sizes) else None


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def part(shape: tuple[int, ...], axis: int, first: int, size: int) -> Box:
    """`size` entries of one axis of a tensor from `first` on, and all of the others."""
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[axis], sizes[axis] = first, size
    return Box(tuple(offsets), tuple(sizes))


def shard(shape: tuple[int, ...], weight: Weight, rank: int, tp: int) -> Box:
    """What tensor-parallel rank `rank` of `tp` holds of a tensor of `shape`: an equal part of the axis that is cut, or all of it."""
    if weight.tp_dim is None:
        return whole(shape)
    size = shape[weight.tp_dim] // tp
    return part(shape, weight.tp_dim, rank * size, size)


def stage_of(weight: Weight, layer: int | None, num_layers: int, pp: int) -> int:
    """Pipeline stage that holds a tensor: stages have equal numbers of layers, the first the embeddings, the last the final norm."""
    if layer is not None:
        return layer // (num_layers // pp)
    return pp - 1 if weight.core.startswith("decoder.") else 0
