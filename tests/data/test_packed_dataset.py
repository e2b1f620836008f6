"""Datasets of packed sequences: ranges, blends, documents that are too long, numbering, errors."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import numbered_documents, training_flags, write_documents

from megatron_ft.data.batch import collate
from megatron_ft.data.packed_dataset import build_datasets, sequences_per_epoch
from megatron_ft.errors import UserError

PAD = 9999


def documents_read(dataset) -> Counter:
    """How often each document is read, as (its token, input tokens, target tokens)."""
    seen = Counter()
    for i in range(len(dataset)):
        sample = dataset[i]
        for segment in range(1, sample.segment_ids.max() + 1):
            positions = sample.segment_ids == segment
            (token,) = set(sample.tokens[positions].tolist())
            inputs = int(sample.is_inputs[positions].sum())
            seen[token, inputs, int(positions.sum()) - inputs] += 1
        padding = sample.segment_ids == 0
        assert (sample.tokens[padding] == PAD).all() and not sample.is_inputs[padding].any()
    return seen


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(2, 90), fraction=st.floats(0.01, 0.9), order=st.sampled_from(["best-fit", "greedy"]), seed=st.integers(0, 99)
)  # fmt: skip
def test_validation_shares_no_document_with_training(count, fraction, order, seed):
    lengths = [tuple(pair) for pair in np.random.default_rng(seed).integers(1, 9, (count, 2)).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_documents(Path(folder) / "set", numbered_documents(lengths))
        config = training_flags(
            "--data-prefix", prefix, "--validation-fraction", fraction, "--packing", order, "--seed", seed
        )
        boundary = round((1 - fraction) * count)
        if boundary in (0, count):
            with pytest.raises(UserError, match="is empty; raise --validation-fraction or set it to 0"):
                build_datasets(config, train_samples=1, pad=PAD)
            return
        datasets = build_datasets(config, train_samples=2 * sequences_per_epoch(config) + 5, pad=PAD)
        trained, validated = documents_read(datasets.train), documents_read(datasets.valid["valid"])
    everything = [(i, a, b) for i, (a, b) in enumerate(lengths)]
    assert set(trained) == set(everything[:boundary])
    assert validated == Counter(everything[boundary:])  # the entire range once
    assert datasets.notices == []


@pytest.mark.parametrize("order", ["best-fit", "greedy"])
def test_golden_training_batches(golden, tmp_path, order):
    """Greedy gives the micro-batches that the mtf branch trained on; best-fit the same documents in
    another order."""
    split = f"train: 1.0 0:0.95 {golden}/train/data/short"
    config = training_flags(
        "--train-weighted-split-paths", split, "--packing", order, "--data-cache-path", tmp_path, seq_length=256
    )
    dataset = build_datasets(config, train_samples=32, pad=4).train
    if order == "best-fit":
        read = [document for i in range(sequences_per_epoch(config)) for document in dataset.provenance(i)["documents"]]
        assert sorted(read) == list(range(285))
        return
    expected = np.load(golden / "train" / "tp1pp1_batches.npz")
    for m in range(16):
        batch = collate([dataset[2 * m], dataset[2 * m + 1]], norm_target_loss=True, eod=0)
        for field in ("tokens", "labels", "position_ids", "loss_mask"):
            theirs = expected[f"{m:03d}_{field}"]
            np.testing.assert_array_equal(getattr(batch, field).numpy().reshape(theirs.shape), theirs)


def test_documents_that_are_too_long_are_dropped_or_cut_at_the_start_of_the_input(tmp_path):
    documents = [
        ([1, 2, 3, 4, 5], [6, 7]),
        (list(range(100, 140)), list(range(200, 210))),
        ([11], list(range(300, 340))),
    ]
    prefix = write_documents(tmp_path / "set", documents)
    flags = ("--data-prefix", prefix, "--validation-fraction", "0")
    dropped = build_datasets(training_flags(*flags, seq_length=32), train_samples=1, pad=PAD)
    assert dropped.train.provenance(0)["documents"] == [0]
    summary = f"train: 2 of 3 documents of {prefix} are over 33 tokens:"
    remedy = "raise --seq-length, or cut them with --overlong truncate"
    assert dropped.notices == [f"warning: {summary} 2 left out, 92.86% of the tokens (--overlong drop); {remedy}"]
    cut_flags = training_flags(*flags, "--overlong", "truncate", seq_length=32)
    datasets = build_datasets(cut_flags, train_samples=2, pad=PAD)
    cut = "1 left out, 1 cut, 59.18% of the tokens (--overlong truncate); raise --seq-length"
    assert datasets.notices == [f"warning: {summary} {cut}"]
    cut = datasets.train
    (sample,) = [cut[i] for i in range(2) if cut.provenance(i)["documents"] == [1]]
    assert sample.tokens.tolist() == list(range(117, 140)) + list(range(200, 210))
    assert sample.is_inputs.tolist() == [True] * 23 + [False] * 10


def test_blend_follows_weights_and_validation_reads_groups_once(tmp_path):
    first = write_documents(tmp_path / "a", numbered_documents([(5, 5)] * 60))
    second = write_documents(tmp_path / "b", numbered_documents([(8, 8)] * 40, first=1000), np.int32)
    split_file = tmp_path / "valid.txt"
    split_file.write_text(
        f'"both: 3 0.5:1 {first}, 1 0.5:1 {second}" "second: 1 0.9:1 {second}"\n\n# a comment\nall: 1 0:1 {first}\n'
    )
    config = training_flags(
        "--train-weighted-split-paths", f"train: 0.75 0:0.5 {first}, 0.25 0:0.5 {second}",
        "--valid-weighted-split-paths-path", split_file, "--test-weighted-split-paths", f"later: 1 0:0.1 {second}",
    )  # fmt: skip
    datasets = build_datasets(config, train_samples=400, pad=PAD)
    train = datasets.train
    assert len(train) == 400
    sources = [train.provenance(i)["prefix"] for i in range(400)]
    for shown in (4, 40, 400):  # weights apply from the start
        assert sources[:shown].count(first) == 0.75 * shown
    documents_of_first = [tuple(train.provenance(i)["documents"]) for i in range(400) if sources[i] == first]
    assert set(sum(documents_of_first, ())) == set(range(30))
    assert train.sequences_per_epoch == sequences_per_epoch(config) == 10 + 10
    assert list(datasets.valid) == ["both", "second", "all"] and list(datasets.test) == ["later"]
    both = documents_read(datasets.valid["both"])
    assert both == Counter([(i, 5, 5) for i in range(30, 60)] + [(1000 + i, 8, 8) for i in range(20, 40)])
    assert datasets.notices == [
        f"all: 30 documents of {first} are in the training data, too", f"later: 4 documents of {second} are in the training data, too"
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["best-fit", "greedy"])
def test_longer_run_begins_with_the_same_sequences(tmp_path, order):
    lengths = np.random.default_rng(1).integers(1, 12, (50, 2)).tolist()
    prefix = write_documents(tmp_path / "set", numbered_documents(lengths))
    config = training_flags("--data-prefix", prefix, "--validation-fraction", "0", "--packing", order)
    short = build_datasets(config, train_samples=10, pad=PAD).train
    long = build_datasets(config, train_samples=200, pad=PAD).train
    assert len(long) == 200 and sequences_per_epoch(config) * 3 < 200
    for i in range(10):
        for ours, theirs in zip(short[i], long[i], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_less_than_a_sequence_of_data_is_repeated(tmp_path):
    prefix = write_documents(tmp_path / "set", numbered_documents([(3, 4)]))
    for order in ("best-fit", "greedy"):
        config = training_flags("--data-prefix", prefix, "--validation-fraction", "0", "--packing", order)
        assert sequences_per_epoch(config) == 1
        assert len(build_datasets(config, train_samples=7, pad=PAD).train) == 7


def test_errors_in_the_data_are_one_line(tmp_path):
    good = write_documents(tmp_path / "good", numbered_documents([(3, 4)] * 9))
    uneven = write_documents(tmp_path / "uneven", numbered_documents([(3, 4)] * 9))
    for suffix in ("bin", "idx"):
        source = write_documents(tmp_path / "fewer", numbered_documents([(3, 4)] * 8))
        Path(f"{source}_targets_document.{suffix}").replace(f"{uneven}_targets_document.{suffix}")

    def message(*flags, **kwargs) -> str:
        with pytest.raises(UserError) as error:
            build_datasets(training_flags(*flags), train_samples=1, pad=PAD, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "9 inputs but 8 targets" in message("--data-prefix", uneven)
    missing = message("--train-weighted-split-paths", f"train: 1 0:1 {good}, 1 0:1 {tmp_path}/absent")
    assert f"group 1, column {len(f'train: 1 0:1 {good}, 1 0:1 x')}: {tmp_path}/absent_inputs_document.idx" in missing
    assert "the train range 0:0.01 of" in message("--train-weighted-split-paths", f"train: 1 0:0.01 {good}")
    assert "document 5 has token id 5, the tokenizer has 5 entries" in message("--data-prefix", good, vocab_size=5)
    for field, document in (("inputs", ([7, 1], [1])), ("targets", ([1], [1, 7]))):
        bad = write_documents(tmp_path / "bad", [([1], [2])] * 3 + [document])
        assert f"bad_{field}_document: document 3 has token id 7" in message("--data-prefix", bad, vocab_size=7)


@pytest.mark.parametrize("flags, message", [
    (["--packing-lookahead", "0"], "--packing-lookahead 0: must be at least 1"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
])  # fmt: skip
def test_impossible_packing_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        training_flags("--data-prefix", "x", *flags)
