"""The two packing orders: their guarantees for any lengths, and that greedy is the mtf branch's."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import numbered_documents, training_flags, write_documents

from megatron_ft.data import _packing
from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.data.packing import Packing, TokenizedDocuments, pack, packed_lengths
from megatron_ft.errors import UserError

GOLDEN_SETS = [("eod", 257), ("eod", 65), ("short", 257)]
SETTINGS = settings(deadline=None, max_examples=60)
sides = st.tuples(st.integers(0, 30), st.integers(0, 30))


@pytest.mark.parametrize("name, capacity", GOLDEN_SETS)
def test_greedy_gives_the_index_of_mtf(golden, name, capacity):
    folder = golden / "packed" / f"{name}_s{capacity}"
    documents = TokenizedDocuments(str(folder / "data"))
    index = pack(documents, Packing(0, len(documents), capacity, order="greedy", seed=1234, epochs=5))
    for ours, theirs in ((index.documents, "shuffle_index"), (index.bounds, "sample_index")):
        expected = np.load(folder / f"{theirs}.npy")
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name, capacity", GOLDEN_SETS)
def test_greedy_gives_the_samples_of_mtf(golden, tmp_path, name, capacity):
    folder = golden / "packed" / f"{name}_s{capacity}"
    args = training_flags(
        "--data-prefix", folder / "data", "--validation-fraction", "0", "--packing", "greedy", "--data-cache-path", tmp_path,
        seq_length=capacity - 1,
    )  # fmt: skip
    dataset = build_datasets(args, train_samples=20, pad=4, vocab_size=1000).train
    expected = np.load(folder / "packed_first20.npz")
    for i, sample in enumerate(dataset[i] for i in range(20)):
        np.testing.assert_array_equal(sample.tokens, expected["decoder_token_ids"][i])
        np.testing.assert_array_equal(sample.segment_ids, expected["decoder_segment_ids"][i])
        np.testing.assert_array_equal(sample.is_inputs, expected["decoder_is_inputs"][i])


def greedy_reference(lengths, order, capacity):
    """Sequences as lists of documents, and the incomplete last one: the branch's algorithm."""
    sequences, current, filled = [], [], 0
    for document in order:
        if filled + lengths[document] > capacity:
            if current:
                sequences.append(current)
            current, filled = [], 0
        if lengths[document] <= capacity:
            current.append(int(document))
            filled += lengths[document]
    return sequences, current


@SETTINGS
@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.integers(1, 50), st.integers(1, 3), st.randoms())
def test_greedy_matches_the_reference(lengths, capacity, epochs, random):
    order = [i for _ in range(epochs) for i in random.sample(range(len(lengths)), len(lengths))]
    bounds, incomplete = _packing.greedy(np.array(lengths, np.int32), np.array(order), capacity)
    expected, last = greedy_reference(lengths, order, capacity)
    assert [order[a:b] for a, b in bounds] == expected
    assert order[incomplete:] == last


@SETTINGS
@given(
    lengths=st.lists(sides, min_size=1, max_size=120),
    capacity=st.integers(2, 70),
    lookahead=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 3),
    order=st.sampled_from(["best-fit", "greedy"]),
    overlong=st.sampled_from(["drop", "truncate"]),
    data=st.data(),
)
def test_every_document_occurs_once_per_epoch_and_is_not_split(
    lengths, capacity, lookahead, seed, epochs, order, overlong, data
):
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start + 1, len(lengths)))
    inputs, targets = np.array(lengths, np.int32).T
    taken = packed_lengths(inputs + targets, targets, capacity, overlong)
    packing = Packing(start, stop, capacity, order, lookahead, overlong, seed % 2**32, epochs, keep_last=True)
    with tempfile.TemporaryDirectory() as folder:
        documents = TokenizedDocuments(write_documents(Path(folder) / "set", numbered_documents(lengths)))
        fits = taken[start:stop] <= capacity
        if not fits.any() or not (inputs + targets)[start:stop][fits].any():
            with pytest.raises(UserError):
                pack(documents, packing)
            return
        index = pack(documents, packing)
        again = pack(documents, packing)
        more = pack(documents, Packing(**{**vars(packing), "epochs": epochs + 1}))
        full = pack(documents, Packing(**{**vars(packing), "keep_last": False}))
    sequences = [index.documents[a:b].tolist() for a, b in index.bounds]
    packed = np.concatenate(sequences)
    expected = np.arange(start, stop)[fits]
    assert all(taken[sequence].sum() <= capacity and sequence for sequence in sequences)
    assert sorted(packed.tolist()) == sorted(expected.tolist() * epochs)
    epoch_of = packed.reshape(epochs, len(expected))
    assert all(sorted(epoch.tolist()) == expected.tolist() for epoch in epoch_of)
    assert index.facts["packed_tokens"] == taken[packed].sum()
    np.testing.assert_array_equal(index.documents, again.documents)
    np.testing.assert_array_equal(index.bounds, again.bounds)
    assert full.facts["packed_tokens"] == sum(taken[full.documents[a:b]].sum() for a, b in full.bounds)
    complete = len(sequences) - (order == "greedy")
    np.testing.assert_array_equal(more.bounds[:complete], index.bounds[:complete])


@SETTINGS
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(50, 200), st.integers(0, 2**64 - 1))
def test_best_fit_leaves_at_most_one_sequence_half_empty(lengths, capacity, seed):
    lengths = np.array(lengths, np.int32)
    documents, ends = _packing.best_fit(lengths, capacity, len(lengths), seed)
    filled = np.add.reduceat(lengths[documents], np.concatenate([[0], ends[:-1]]))
    assert (filled <= capacity // 2).sum() <= 1
    assert filled[-1] == filled.min()


def test_best_fit_respects_the_lookahead_and_mixes_lengths():
    lengths = np.random.default_rng(3).integers(1, 400, 20_000).astype(np.int32)
    documents, ends = _packing.best_fit(lengths, 1024, 64, 7)
    narrow = lengths.sum() / (len(ends) * 1024)
    documents_wide, ends_wide = _packing.best_fit(lengths, 1024, 4096, 7)
    wide = lengths.sum() / (len(ends_wide) * 1024)
    assert 0.95 < narrow < wide and wide > 0.998
    # Long documents are not all first: the thirds of an epoch have about the same mean length.
    thirds = [lengths[third].mean() for third in np.array_split(documents_wide, 3)]
    assert max(thirds) - min(thirds) < 10


def test_epochs_and_seeds_differ(tmp_path):
    documents = TokenizedDocuments(write_documents(tmp_path / "set", numbered_documents([(2, 3)] * 60)))
    for order in ("best-fit", "greedy"):
        index = pack(documents, Packing(0, 60, 20, order, epochs=2))
        other = pack(documents, Packing(0, 60, 20, order, epochs=2, seed=9))
        assert not np.array_equal(index.documents[:60], index.documents[60:])
        assert not np.array_equal(index.documents, other.documents)


def test_best_fit_fills_sequences_of_real_instructions(golden):
    documents = TokenizedDocuments(str(golden / "packed" / "short_s257" / "data"))
    index = pack(documents, Packing(0, len(documents), 257))
    filled = [index.documents[a:b] for a, b in index.bounds[:-1]]
    sizes = documents.inputs.sizes + documents.targets.sizes
    assert sum(sizes[sequence].sum() for sequence in filled) / (257 * len(filled)) >= 0.995


@pytest.mark.parametrize("order", ["best-fit", "greedy"])
@pytest.mark.parametrize("overlong, lengths, message", [
    ("drop", [(20, 20), (30, 5)], "all 2 documents are longer than a packed sequence of 33 tokens (the shortest has 35); raise --seq-length or give --overlong truncate"),
    ("truncate", [(1, 40), (0, 33)], "raise --seq-length"),
    ("drop", [(0, 0), (0, 0)], "all 2 documents that fit a packed sequence are empty"),
])  # fmt: skip
def test_a_dataset_in_which_no_document_fits_is_an_error(tmp_path, order, overlong, lengths, message):
    if overlong == "truncate":
        lengths = [(a + 1, b) for a, b in lengths]
    documents = TokenizedDocuments(write_documents(tmp_path / "set", numbered_documents(lengths)))
    with pytest.raises(UserError) as error:
        pack(documents, Packing(0, 2, 33, order, overlong=overlong))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _packing.best_fit(np.array([3, -1], np.int32), 10, 4, 0), "document 1 has a negative length"),
        (lambda: _packing.best_fit(np.array([-(2**31)], np.int32), 10, 4, 0), "document 0 has a negative length"),
        (lambda: _packing.best_fit(np.array([3], np.int32), 0, 4, 0), "capacity must be positive"),
        (lambda: _packing.best_fit(np.array([3], np.int32), 2**31, 4, 0), "capacity must be positive and fit 31 bits"),
        (lambda: _packing.best_fit(np.array([3], np.int32), 10, 0, 0), "lookahead must be positive"),
        (
            lambda: _packing.greedy(np.array([3, -1], np.int32), np.array([0, 1]), 10),
            "document 1 has a negative length",
        ),
        (lambda: _packing.greedy(np.array([3], np.int32), np.array([0]), -5), "capacity must be positive"),
        (
            lambda: _packing.greedy(np.array([3], np.int32), np.array([0]), 2**62),
            "capacity must be positive and fit 31 bits",
        ),
        (lambda: _packing.greedy(np.array([3], np.int32), np.array([1]), 10), "a document without a length"),
        (lambda: _packing.greedy(np.array([3], np.int32), np.array([-1]), 10), "a document without a length"),
        (lambda: _packing.blend([1.0], [-1], -1), "size must not be negative"),
        (lambda: _packing.blend([1.0, 0.0], [-1, -1], 5), "weights must be positive"),
        (lambda: _packing.blend([1.0, float("nan")], [-1, -1], 5), "weights must be positive"),
        (lambda: _packing.blend([1e308, 1e308], [-1, -1], 5), "the sum of weights must be finite"),
        (lambda: _packing.blend([1.0], [2], 5), "the limits add up to less"),
    ],
)
def test_arguments_that_would_leave_an_array_are_refused(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()
