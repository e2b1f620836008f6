"""Overlaps of boxes, and layouts whose ranks hold a complete model exactly once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.model.boxes import Box, overlap, shard, stage_of, whole
from megatron_ft.model.families import PRESETS
from megatron_ft.model.tensor_names import layer_of, tensor_names, tensor_shape, weight_of

spans = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=2)


def filled(box: Box) -> np.ndarray:
    place = np.zeros((10, 10), bool)
    place[box.within(whole(place.shape))] = True
    return place


@given(spans, spans)
def test_overlap_is_the_common_part(first, second):
    a, b = (Box(*zip(*spans_of, strict=True)) for spans_of in (first, second))
    common, expected = overlap(a, b), filled(a) & filled(b)
    assert (common is None) == (not expected.any())
    if common:
        assert (filled(common) == expected).all()
        values = np.arange(100).reshape(10, 10)
        held = [values[box.within(whole(values.shape))][common.within(box)] for box in (a, b)]
        assert (held[0] == held[1]).all() and (held[0] == values[expected].reshape(common.sizes)).all()


@pytest.mark.parametrize("tp, pp", [(1, 1), (4, 1), (2, 4), (1, 2)])
def test_the_ranks_of_a_layout_hold_every_tensor_once(tp, pp):
    shape = PRESETS["tiny"]
    stages = {}
    for name in tensor_names(shape):
        weight, size = weight_of(name), tensor_shape(shape, name)
        boxes = {shard(size, weight, rank, tp) for rank in range(tp)}
        assert sum(np.prod(box.sizes) for box in boxes) == np.prod(size)
        assert all(a == b or overlap(a, b) is None for a in boxes for b in boxes)
        stages.setdefault(stage_of(weight, layer_of(name), shape.num_layers, pp), set()).add(layer_of(name))
    layers = [sorted(layer for layer in stages[stage] if layer is not None) for stage in range(pp)]
    assert sum(layers, []) == list(range(shape.num_layers)) and set(map(len, layers)) == {4 // pp}
    assert {stage for stage, held in stages.items() if None in held} == {0, pp - 1}
