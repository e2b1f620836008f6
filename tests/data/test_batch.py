"""Micro-batches: equal to the mtf branch's, and right where the branch is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data.batch import collate
from megatron_ft.data.packed_dataset import PackedSample


def packed(*documents: tuple[int, int], capacity: int) -> PackedSample:
    """A packed sequence of documents of (input, target) lengths; tokens count from 10."""
    segments, inputs = [], []
    for number, (a, b) in enumerate(documents, 1):
        segments += [number] * (a + b)
        inputs += [True] * a + [False] * b
    padding = capacity - len(segments)
    return PackedSample(
        np.arange(10, 10 + capacity),
        np.array(segments + [0] * padding, np.int32),
        np.array(inputs + [False] * padding),
    )


@pytest.mark.parametrize("name", ["eod_s257", "eod_s65", "short_s257"])
@pytest.mark.parametrize("size", [1, 4])
def test_batches_are_those_of_mtf(golden, name, size):
    stored = np.load(golden / "packed" / name / "packed_first20.npz")
    samples = [
        PackedSample(
            stored["decoder_token_ids"][i],
            stored["decoder_segment_ids"][i].astype(np.int32),
            stored["decoder_is_inputs"][i],
        )
        for i in range(size)
    ]
    expected = np.load(golden / "packed" / name / "get_batch.npz")
    for targets_only in (False, True):
        for norm in (False, True):
            batch = collate(samples, loss_on_targets_only=targets_only, norm_target_loss=norm)
            theirs = expected[f"b{size}_loss_mask_lot{targets_only:d}_norm{norm:d}"]
            np.testing.assert_array_equal(batch.loss_mask.numpy().reshape(theirs.shape), theirs)
    for field in ("tokens", "labels", "position_ids"):
        np.testing.assert_array_equal(getattr(batch, field).numpy(), expected[f"b{size}_{field}"])
    batch = collate(samples, eod_mask_loss=True, eod=0)
    np.testing.assert_array_equal(batch.loss_mask.numpy(), expected[f"b{size}_loss_mask_lot1_norm0_eodmask1"])
    # cu_seqlens means what the branch's mask does: a token attends to its segment up to itself.
    length = batch.tokens.shape[1]
    masked = np.unpackbits(expected[f"b{size}_attention_mask"], axis=-1)[..., :length].astype(bool)
    segment = np.repeat(np.arange(len(batch.cu_seqlens) - 1), np.diff(batch.cu_seqlens)).reshape(size, length)
    attends = (segment[:, :, None] == segment[:, None, :]) & np.tril(np.ones((length, length), bool))
    real = batch.segment_ids.numpy() != 0
    np.testing.assert_array_equal(attends[real], ~masked[:, 0][real])


def test_target_spans_have_equal_weight_and_end_with_their_sequence():
    full = packed((2, 3), (1, 4), capacity=10)  # ends with loss
    empty_input = packed((0, 4), (2, 2), capacity=10)  # starts with loss; the branch would join the two spans
    batch = collate([full, empty_input], norm_target_loss=True)
    third = np.float32(1) / np.float32(3)
    np.testing.assert_array_equal(
        batch.loss_mask.numpy(),
        [[0, third, third, third, 0, 0.25, 0.25, 0.25, 0.25], [third, third, third, 0, 0, 0.5, 0.5, 0, 0]],
    )
    # Adjacent target spans (the second document has no input) stay two spans of weight 1.
    batch = collate([packed((1, 2), (0, 3), capacity=8)], norm_target_loss=True)
    np.testing.assert_array_equal(batch.loss_mask.numpy(), [[0.5, 0.5, 0, 0.5, 0.5, 0, 0]])


def test_positions_segments_and_padding():
    batch = collate([packed((2, 1), (1, 1), capacity=8), packed((3, 5), capacity=8)])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [1] * 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7, 14] and batch.max_seqlen == 7
    assert batch.tokens.tolist()[0] == list(range(10, 17)) and batch.labels.tolist()[0] == list(range(11, 18))
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    through = collate([packed((2, 1), (1, 1), capacity=8)], reset_position_ids=False, reset_attention_mask=False)
    assert through.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert through.cu_seqlens.tolist() == [0, 5, 7]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(0, 4),
)
def test_segments_cover_sequences_and_loss_stays_in_documents(sequences, slack):
    sequences = [[d for d in documents if sum(d)] or [(1, 1)] for documents in sequences]
    capacity = max(2, max(sum(map(sum, documents)) for documents in sequences) + slack)
    batch = collate([packed(*documents, capacity=capacity) for documents in sequences], norm_target_loss=True)
    segments, bounds = batch.segment_ids.numpy().reshape(-1), batch.cu_seqlens.tolist()
    assert (
        bounds[0] == 0 and bounds[-1] == len(segments) and all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    )
    assert set(range(0, len(segments) + 1, capacity - 1)) <= set(bounds)
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert len(set(segments[a:b])) == 1
        assert batch.position_ids.view(-1)[a:b].tolist() == list(range(b - a))
    # Each document with a target to predict has a total weight of 1.
    spans = sum(b > 1 or (b == 1 and a > 0) for documents in sequences for a, b in documents)
    assert float(batch.loss_mask.sum()) == pytest.approx(spans, rel=1e-5)
