"""Hugging Face's tensors of a model, by its family's names, and which of our rows each has.

A family may have queries, keys and values as three tensors. Ours is one, whose rows are grouped by
key/value head (tensor_names.py); so each of the three has some of its rows, in order.
"""

from itertools import accumulate
from os.path import commonprefix
from typing import NamedTuple

from megatron_ft.model.families import family_of
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import layer_of, tensor_shape, weight_of


class HFTensor(NamedTuple):
    """A tensor in a Hugging Face model, and the rows of our tensor that it consists of."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[range, ...]


def hf_tensors(shape: ModelShape, name: str) -> list[HFTensor]:
    """The Hugging Face tensors that one of ours is, each in its place in the file's order."""
    weight, (rows, *rest) = weight_of(name), tensor_shape(shape, name)
    modules = [module.format(layer_of(name)) for module in family_of(shape).modules[weight.module]]
    parts = [(range(rows),)] if len(modules) == 1 else _query_key_value(shape)
    return [
        HFTensor(f"{module}.{weight.part}", (sum(map(len, ranges)), *rest), ranges)
        for module, ranges in zip(modules, parts, strict=True)
    ]


def hf_name(shape: ModelShape, name: str) -> str:
    """The name of the first of `hf_tensors`."""
    return hf_tensors(shape, name)[0].name


def label(shape: ModelShape, name: str) -> str:
    """The names of `hf_tensors` as one text: model.layers.3.self_attn.{q,k,v}_proj.weight."""
    names = [tensor.name for tensor in hf_tensors(shape, name)]
    if len(names) == 1:
        return names[0]
    before = len(commonprefix(names))
    after = len(commonprefix([name[::-1] for name in names]))
    middles = ",".join(name[before : len(name) - after] for name in names)
    return f"{names[0][:before]}{{{middles}}}{names[0][-after:]}"


def _query_key_value(shape: ModelShape) -> list[tuple[range, ...]]:
    """Rows of queries, of keys and of values in the fused tensor.

    >>> _query_key_value(ModelShape(num_layers=1, hidden_size=8, num_attention_heads=4,
    ...                             num_query_groups=2, max_position_embeddings=4))
    [(range(0, 4), range(8, 12)), (range(4, 6), range(12, 14)), (range(6, 8), range(14, 16))]
    """
    d, groups = shape.kv_channels, shape.num_query_groups
    queries = shape.num_attention_heads // groups * d
    bounds = [*accumulate([queries, d, d] * groups, initial=0)]
    ranges = [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]
    return [tuple(ranges[part::3]) for part in range(3)]
