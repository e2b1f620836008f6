"""The .bin/.idx files: read back by us and by Megatron-Core, identical to the mtf branch's, refused
if damaged."""

import filecmp
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data import indexed
from megatron_ft.data.indexed import IndexedReader, IndexedWriter, commit, field_paths
from megatron_ft.errors import UserError
from megatron_ft.tokenizer.tokenizer import token_dtype


def write(path: Path, sequences, dtype) -> None:
    with IndexedWriter(path, dtype) as writer:
        for sequence in sequences:
            writer.add(sequence)
        commit([writer])


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([65499, 65500]),
    sequences=st.lists(st.lists(st.integers(0, 65498), max_size=20), max_size=30),
    chunk=st.sampled_from([1, 7, 1 << 20]),
)
def test_sequences_survive_a_round_trip(tmp_path_factory, vocab, sequences, chunk):
    path = tmp_path_factory.mktemp("indexed") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "CHUNK", chunk)
        write(path, sequences, token_dtype(vocab))
    reader = IndexedReader(path)
    assert reader.dtype == (np.uint16 if vocab < 65500 else np.int32)
    assert [reader[i].tolist() for i in range(len(reader))] == sequences
    assert reader.sizes.tolist() == [len(s) for s in sequences]
    assert reader.document_bounds.tolist() == list(range(len(sequences) + 1))
    assert reader.num_tokens == sum(map(len, sequences))


def test_rewriting_mtf_files_gives_the_same_bytes(golden, tmp_path):
    for name in ("eod", "short"):
        for field in field_paths(golden / "data" / name):
            reader = IndexedReader(field)
            write(tmp_path / "copy", [reader[i] for i in range(len(reader))], reader.dtype)
            for suffix in (".bin", ".idx"):
                assert filecmp.cmp(field + suffix, tmp_path / f"copy{suffix}", shallow=False)


def test_megatron_core_reads_the_files(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    sequences = [[1, 2, 3], [70000], [5] * 10]
    write(tmp_path / "set", sequences, np.dtype("<i4"))
    theirs = IndexedDataset(str(tmp_path / "set"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == sequences
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


def test_joined_parts_equal_one_file(tmp_path):
    sequences = [[i, i + 1] * (i % 3 + 1) for i in range(20)]
    write(tmp_path / "single", sequences, np.uint16)
    write(tmp_path / "a", sequences[:7], np.uint16)
    write(tmp_path / "b", sequences[7:], np.uint16)
    with IndexedWriter(tmp_path / "joined", np.uint16) as writer:
        writer.add_file(tmp_path / "a")
        writer.add_file(tmp_path / "b")
        commit([writer])
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(tmp_path / f"single{suffix}", tmp_path / f"joined{suffix}", shallow=False)


def test_an_id_that_does_not_fit_the_dtype_is_an_error(tmp_path):
    with IndexedWriter(tmp_path / "set", np.uint16) as writer, pytest.raises(OverflowError):
        writer.add([65536])


def test_without_a_commit_the_old_files_stay(tmp_path):
    write(tmp_path / "set", [[1]], np.uint16)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "set", np.uint16) as writer:
        writer.add([2])
        raise RuntimeError
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_kill_between_renames_leaves_no_index_with_other_tokens(tmp_path, monkeypatch):
    for path in field_paths(tmp_path / "set"):
        write(path, [[1]], np.uint16)
    real, renames = indexed.os.replace, []

    def replace(source, target):
        renames.append(target)
        if len(renames) == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(indexed.os, "replace", replace)
    writers = [IndexedWriter(path, np.uint16) for path in field_paths(tmp_path / "set")]
    for writer in writers:
        writer.add([2, 3])
    with pytest.raises(KeyboardInterrupt):
        commit(writers)
    for path in field_paths(tmp_path / "set"):
        with pytest.raises(UserError, match="idx"):
            IndexedReader(path)


def test_a_second_writer_is_refused(tmp_path):
    with IndexedWriter(tmp_path / "set", np.uint16) as first:
        first.add([1, 2])
        with pytest.raises(UserError, match="another process is writing"):
            IndexedWriter(tmp_path / "set", np.uint16)
        commit([first])
    assert IndexedReader(tmp_path / "set")[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: Path(f"{p}.idx").unlink(), r"set\.idx: No such file"),
        (lambda p: Path(f"{p}.bin").unlink(), r"set\.bin: No such file"),
        (lambda p: Path(f"{p}.idx").write_bytes(b""), "not a Megatron MMIDIDX index"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"x" * 99), "not a Megatron MMIDIDX index"),
        (lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:-1]), "from its header"),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-2]), "from its index"),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes() + b"xx"), "from its index"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage, message):
    write(tmp_path / "set", [[1, 2], [3]], np.uint16)
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=message) as error:
        IndexedReader(tmp_path / "set")
    assert "\n" not in str(error.value)
