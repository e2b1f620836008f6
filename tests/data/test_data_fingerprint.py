"""Digests that notice data edited in place."""

import os
from pathlib import Path

import pytest
from token_files import numbered_documents, write_documents

from megatron_ft.data.fingerprint import BLOCK_BYTES, BLOCKS, modified, sampled_digest, token_files
from megatron_ft.errors import UserError


def edit(path: Path, offset: int) -> None:
    """Change one byte; the size and the modification time stay."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        (old,) = file.read(1)
        file.seek(offset)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("size", [1, 1000, BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES + 1, 10**7])
def test_edits_of_sampled_bytes_are_noticed(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    digests = {sampled_digest([path])}
    offsets = {0, size - 1} if size > BLOCKS * BLOCK_BYTES else {0, size // 3, size // 2, size - 1}
    for offset in offsets:
        edit(path, offset)
        digests.add(sampled_digest([path]))
    assert len(digests) == len(offsets) + 1


def test_any_edit_of_a_small_dataset_is_noticed(tmp_path):
    files = token_files(write_documents(tmp_path / "set", numbered_documents([(3, 4)] * 500)))
    before = sampled_digest(files)
    assert sampled_digest(files) == before
    for file in files:
        edit(file, file.stat().st_size // 2)
        assert sampled_digest(files) != before
        edit(file, file.stat().st_size // 2)
    assert sampled_digest(files) == before
    os.utime(files[3], (2_000_000_000, 2_000_000_000))
    assert sampled_digest(files) == before and modified(files) == 2_000_000_000


def test_files_of_other_sizes_differ_even_if_empty_blocks_are_equal(tmp_path):
    digests = set()
    for size in (10**6, 10**6 + 1):
        (tmp_path / "file").write_bytes(bytes(size))
        digests.add(sampled_digest([tmp_path / "file"]))
    assert len(digests) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="set_inputs_document.bin: No such file"):
        sampled_digest(token_files(str(tmp_path / "set")))
