"""The .bin/.idx files: read back by us and by Megatron-Core, identical to the mtf branch's, refused
if damaged."""

import filecmp
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.data import indexed
from megatron_ft.data.indexed import HEADER, IndexedReader, IndexedWriter, commit, field_paths, stored_counts
from megatron_ft.errors import UserError
from megatron_ft.tokenizer.kinds import token_dtype

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134217728\n"


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
        (
            lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes() + bytes(2)),
            "modes of a multimodal dataset",
        ),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-2]), "from its index"),
        (lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes() + b"xx"), "from its index"),
        (lambda p: Path(f"{p}.idx").write_bytes(LFS_POINTER), r"set\.idx: a Git LFS pointer"),
        (lambda p: Path(f"{p}.bin").write_bytes(LFS_POINTER), r"set\.bin: a Git LFS pointer"),
        (lambda p: (Path(f"{p}.idx").unlink(), Path(f"{p}.idx").mkdir()), r"set\.idx: a directory"),
        (lambda p: (Path(f"{p}.bin").unlink(), os.mkfifo(f"{p}.bin")), r"set\.bin: not a regular file"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage, message):
    write(tmp_path / "set", [[1, 2], [3]], np.uint16)
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=message) as error:
        IndexedReader(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".idx", None, r"set\.idx: No such file"),
        (".bin", None, r"set\.bin: No such file"),
        (".idx", LFS_POINTER, r"set\.idx: a Git LFS pointer, .* downloads it$"),
        (".idx", HEADER.pack(b"MMIDIDX\x00\x00", 1, 1, 2, 3), r"set\.idx: uint8 values \(dtype code 1\)"),
    ],
)
def test_a_quick_look_counts_or_names_the_file_that_is_wrong(tmp_path, suffix, content, message):
    path = tmp_path / "set"
    write(path, [[1, 2], [3]], np.dtype("<i4"))
    assert stored_counts(path) == (2, 3)
    Path(f"{path}{suffix}").unlink()
    if content is not None:
        Path(f"{path}{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        stored_counts(path)


COUNT = 200  # sequences of 1 to 5 tokens
LENGTHS, POINTERS, BOUNDS = HEADER.size, HEADER.size + 4 * COUNT, HEADER.size + 12 * COUNT


@pytest.mark.parametrize(
    ("offset", "form", "change", "message"),
    [
        (9, "<Q", lambda old: 2, "version 2 of the format, expected 1"),
        (
            17,
            "<B",
            lambda old: 1,
            r"uint8 values \(dtype code 1\), expected token ids of one of int16, int32, int64, uint16",
        ),
        (17, "<B", lambda old: 2, r"int8 values \(dtype code 2\)"),
        (17, "<B", lambda old: 6, r"float64 values \(dtype code 6\)"),
        (17, "<B", lambda old: 7, r"float32 values \(dtype code 7\)"),
        (17, "<B", lambda old: 200, r"values of an unknown type \(dtype code 200\)"),
        (17, "<B", lambda old: 4, "starts at byte"),
        (18, "<Q", lambda old: 2**64 - 1, "from its header"),
        (18, "<Q", lambda old: old + 2, "from its header"),
        (26, "<Q", lambda old: 2**63, "from its header"),
        (26, "<Q", lambda old: 0, "from its header"),
        (LENGTHS, "<i", lambda old: -1, "sequence 0 has a length of -1 tokens"),
        (LENGTHS + 4 * 70, "<i", lambda old: -(2**31), "sequence 70 has a length of -2147483648 tokens"),
        (LENGTHS + 4 * 70, "<i", lambda old: 2**31 - 1, "sequence 71 starts at byte"),
        (LENGTHS + 4 * 70, "<i", lambda old: old + 1, "sequence 71 starts at byte"),
        (LENGTHS + 4 * (COUNT - 1), "<i", lambda old: old + 1, r"set\.bin: .* bytes, expected"),
        (LENGTHS + 4 * (COUNT - 1), "<i", lambda old: 0, r"set\.bin: .* bytes, expected"),
        (POINTERS, "<q", lambda old: 2, "sequence 0 starts at byte 2 of the .bin, expected 0"),
        (POINTERS + 8 * 70, "<q", lambda old: -old, "sequence 70 starts at byte -"),
        (POINTERS + 8 * 70, "<q", lambda old: old + 1, "sequence 70 starts at byte"),
        (POINTERS + 8 * 70, "<q", lambda old: old - 2, "sequence 70 starts at byte"),
        (POINTERS + 8 * (COUNT - 1), "<q", lambda old: 2**63 - 1, "sequence 199 starts at byte 9223372036854775807"),
        (BOUNDS, "<q", lambda old: 1, "document bounds do not rise from 0 to 200"),
        (BOUNDS + 8 * 70, "<q", lambda old: -1, "document bounds do not rise from 0 to 200"),
        (BOUNDS + 8 * 70, "<q", lambda old: 201, "document bounds do not rise from 0 to 200"),
        (BOUNDS + 8 * COUNT, "<q", lambda old: 2**62, "document bounds end at 4611686018427387904, expected 200"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_every_value_of_an_index_is_checked(tmp_path, monkeypatch, chunk, offset, form, change, message):
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    write(tmp_path / "set", [[i] * (i % 5 + 1) for i in range(COUNT)], np.uint16)
    index = bytearray((tmp_path / "set.idx").read_bytes())
    (old,) = struct.unpack_from(form, index, offset)
    struct.pack_into(form, index, offset, change(old))
    (tmp_path / "set.idx").write_bytes(index)
    with pytest.raises(UserError, match=message) as error:
        IndexedReader(tmp_path / "set")
    assert "\n" not in str(error.value) and str(tmp_path / "set.") in str(error.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_index_with_the_right_totals_but_other_sequences_is_refused(tmp_path_factory, data):
    """Lengths moved from one sequence to another, and swapped pointers, keep every sum."""
    path = tmp_path_factory.mktemp("indexed") / "set"
    write(path, [[i] * 3 for i in range(9)], np.uint16)
    index = bytearray(Path(f"{path}.idx").read_bytes())
    i, j = data.draw(st.permutations(range(9)))[:2]
    if data.draw(st.booleans()):
        moved = data.draw(st.integers(1, 3))
        struct.pack_into("<i", index, HEADER.size + 4 * i, 3 - moved)
        struct.pack_into("<i", index, HEADER.size + 4 * j, 3 + moved)
    else:
        for k, start in ((i, 6 * j), (j, 6 * i)):
            struct.pack_into("<q", index, HEADER.size + 4 * 9 + 8 * k, start)
    Path(f"{path}.idx").write_bytes(index)
    with pytest.raises(UserError, match="starts at byte"):
        IndexedReader(path)


@pytest.mark.parametrize(
    "bounds", [[0, 2, 3], [0, 0, 3, 3], [0]], ids=["split into sentences", "empty documents", "old merge"]
)
def test_document_bounds_of_other_writers_are_accepted(tmp_path, bounds):
    """Megatron's merge_datasets of 2021 wrote only the first bound."""
    write(tmp_path / "set", [[1, 2], [3], [4]], np.uint16)
    index = bytearray((tmp_path / "set.idx").read_bytes()[: HEADER.size + 12 * 3])
    struct.pack_into("<Q", index, 26, len(bounds))
    (tmp_path / "set.idx").write_bytes(index + struct.pack(f"<{len(bounds)}q", *bounds))
    reader = IndexedReader(tmp_path / "set")
    assert [reader[i].tolist() for i in range(3)] == [[1, 2], [3], [4]]


def test_a_file_that_is_cut_while_it_is_merged_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "part", [[1] * 9] * 9, np.uint16)
    with IndexedWriter(tmp_path / "merged", np.uint16) as writer:
        opened = indexed.IndexedReader

        def open_and_cut(path, *dtypes):
            reader = opened(path, *dtypes)
            os.truncate(f"{path}.bin", 10)
            return reader

        monkeypatch.setattr(indexed, "IndexedReader", open_and_cut)
        with pytest.raises(UserError, match=r"part\.bin: 10 bytes when it was copied, 162 when it was opened"):
            writer.add_file(tmp_path / "part")
