"""Stored tensors of a torch_dist directory: boxes across chunks, and errors that name the file."""

import pickle
from pathlib import Path

import pytest
import torch

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box, overlap, whole
from megatron_ft.weights.manifest import Damaged
from megatron_ft.weights.torch_dist_files import TorchDistFiles
from megatron_ft.weights.torch_dist_metadata import METADATA, StoredChunk, write_metadata

STACKED = torch.arange(4 * 6 * 2, dtype=torch.float32).view(4, 6, 2)  # layers, one chunk per half of each
WORDS = torch.arange(10 * 3, dtype=torch.bfloat16).view(10, 3)  # rows cut unevenly
SCALAR = torch.tensor(7, dtype=torch.int64)


@pytest.fixture
def directory(tmp_path) -> Path:
    """Three tensors in two files."""
    halves = [Box((layer, first, 0), (1, 3, 2)) for first in (0, 3) for layer in range(4)]
    parts = [("stacked", STACKED, box) for box in halves]
    parts += [("words", WORDS, Box((0, 0), (7, 3))), ("words", WORDS, Box((7, 0), (3, 3)))]
    parts += [("scalar", SCALAR, Box((), ()))]
    chunks = []
    for number, (key, tensor, box) in enumerate(parts):
        file = tmp_path / f"__{number % 2}_0.distcp"
        with file.open("ab") as stream:
            start = stream.tell()
            torch.save(tensor[box.within(whole(tensor.shape))].clone(), stream)
            chunks.append(
                StoredChunk(key, file.name, start, stream.tell() - start, tensor.dtype, tuple(tensor.shape), *box)
            )
    write_metadata(tmp_path, pickle.loads(pickle.dumps(chunks)))  # as rank 0 receives them
    return tmp_path


def test_tensors_and_boxes_read_as_they_were_saved(directory):
    files = TorchDistFiles(directory)
    files.check_sizes()
    for key, tensor in (("stacked", STACKED), ("words", WORDS), ("scalar", SCALAR)):
        assert torch.equal(files.read(key), tensor) and files.read(key).dtype == tensor.dtype
    assert torch.equal(files.read_box("stacked", Box((1, 2, 0), (2, 3, 1))), STACKED[1:3, 2:5, :1])
    assert torch.equal(files.read_box("words", Box((6, 1), (2, 2))), WORDS[6:8, 1:])
    files.close()
    assert torch.equal(files.read("words"), WORDS)


@pytest.mark.parametrize("key, shape", [("stacked", (4, 6, 2)), ("words", (10, 3))])
def test_lookup_by_axis_0_finds_every_overlapping_chunk(directory, key, shape):
    files = TorchDistFiles(directory)
    for first in range(shape[0]):
        for rows in range(1, shape[0] - first + 1):
            box = Box((first, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            expected = [chunk for chunk in files.chunks_of(key) if overlap(box, chunk)]
            assert [chunk for chunk, _ in files.overlapping(key, box)] == expected


def test_damage_is_reported_by_file(directory):
    file = directory / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(Damaged, match="__1_0.distcp: cut short"):
        TorchDistFiles(directory).check_sizes()
    file.write_bytes(bytes(len(content)))
    with pytest.raises(Damaged, match="__1_0.distcp: begins with NUL bytes"):
        TorchDistFiles(directory).read("stacked")
    file.unlink()
    with pytest.raises(Damaged, match="__1_0.distcp is missing"):
        TorchDistFiles(directory).read("stacked")
    with pytest.raises(Damaged, match="missing __1_0.distcp"):
        TorchDistFiles(directory).check_sizes()
    (directory / METADATA).unlink()
    with pytest.raises(Damaged, match="metadata is missing, so its save did not finish"):
        TorchDistFiles(directory)


def test_a_box_that_is_not_stored_is_damage_and_a_pickle_of_code_is_refused(directory):
    with pytest.raises(Damaged, match="words is stored only in part"):
        TorchDistFiles(directory).read_box("words", Box((5, 0), (9, 3)))
    file = directory / "__0_0.distcp"
    content = file.read_bytes()
    with (directory / "evil").open("wb") as stream:
        torch.save(print, stream)
    evil = (directory / "evil").read_bytes()
    files = TorchDistFiles(directory)
    chunk = next(chunk for chunk in files.chunks_of("stacked") if chunk.file == file.name and chunk.start == 0)
    file.write_bytes(evil + content)
    with pytest.raises(UserError, match="__0_0.distcp: refused, a pickle in it .byte 0. references .*print"):
        files.chunk(
            StoredChunk("stacked", chunk.file, 0, len(evil), chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)
        )


def test_metadata_of_an_incompletely_written_tensor_is_not_written(tmp_path):
    part = StoredChunk("w", "__0_0.distcp", 0, 8, torch.float32, (4,), (0,), (2,))
    with pytest.raises(ValueError, match="w: ranks wrote 2 elements of 4"):
        write_metadata(tmp_path, [part])
    assert not (tmp_path / METADATA).exists()
