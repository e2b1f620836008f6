"""Arrays in files: what np.load reads, errors instead of SIGBUS, and few descriptors."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from token_files import numbered_documents, training_flags, write_documents

from megatron_ft.data import file_array
from megatron_ft.data.file_array import FileArray, file_version
from megatron_ft.data.indexed import IndexedReader
from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.errors import UserError


@pytest.fixture
def pairs(tmp_path) -> tuple[FileArray, np.ndarray]:
    """An array [9, 2] in a file after 10 other bytes, and the same in memory."""
    values = np.arange(18).reshape(9, 2)
    (tmp_path / "pairs").write_bytes(b"x" * 10 + values.tobytes())
    return FileArray(file_version(str(tmp_path / "pairs"), ""), np.dtype(np.int64), (9, 2), 10), values


def test_items_and_slices_are_those_of_the_array(pairs):
    array, values = pairs
    assert len(array) == 9
    np.testing.assert_array_equal(array, values)
    for i in (0, 3, -1, np.int64(2)):
        np.testing.assert_array_equal(array[i], values[i])
    for part in (slice(2, 5), slice(None), slice(7, 99), slice(5, 2), slice(-2, None)):
        np.testing.assert_array_equal(array[part], values[part])
    for outside in (9, -10):
        with pytest.raises(IndexError):
            array[outside]


def test_a_file_that_is_cut_while_in_use_is_an_error(pairs):
    array, values = pairs
    np.testing.assert_array_equal(array[8], values[8])
    os.truncate(array._file.path, 100)
    np.testing.assert_array_equal(array[0], values[0])
    with pytest.raises(UserError, match="pairs: 100 bytes, but 154 when it was opened"):
        array[8]


@pytest.mark.parametrize("size", [20, 10, 0])
def test_training_data_that_is_cut_is_a_user_error(tmp_path, size):
    prefix = write_documents(tmp_path / "set", numbered_documents([(3, 4)] * 40))
    dataset = build_datasets(training_flags("--data-prefix", prefix), train_samples=9, pad=0).train
    assert len(dataset[0].tokens) == 33
    os.truncate(f"{prefix}_targets_document.bin", size)
    with pytest.raises(UserError, match=f"set_targets_document.bin: {size} bytes, but 320 when it was opened"):
        [dataset[i] for i in range(9)]


def test_another_file_of_the_same_name_is_not_read_on(pairs):
    """The pool may close a file and open it again later."""
    array, values = pairs
    path = Path(array._file.path)
    path.rename(path.with_name("old"))
    path.write_bytes(b"y" * 154)
    with pytest.raises(UserError, match="pairs: replaced by another file while it was in use"):
        array[0]
    path.with_name("old").rename(path)
    os.utime(path)  # touched, such as against the purge of a scratch file system
    np.testing.assert_array_equal(array[0], values[0])


def test_a_replaced_dataset_is_read_again_when_opened_again(tmp_path):
    for token in (1, 2):
        write_documents(tmp_path / "set", [([token], [token])])
        assert IndexedReader(tmp_path / "set_inputs_document")[0].tolist() == [token]


def test_threads_read_files_that_the_pool_closes(tmp_path):
    """More files than the pool holds, read by several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = []
    for i in range(file_array.POOL_SIZE + 40):
        (tmp_path / f"{i}").write_bytes(np.full(4, i).tobytes())
        arrays.append(FileArray(file_version(str(tmp_path / f"{i}"), ""), np.dtype(np.int64), (4,)))
    with ThreadPoolExecutor(4) as pool:
        for i, item in enumerate(pool.map(lambda i: arrays[i % len(arrays)][3], range(3 * len(arrays)))):
            assert item == i % len(arrays)


MANY = """
import sys
from token_files import training_flags
from megatron_ft.data.packed_dataset import build_datasets
parts = ", ".join(f"1 0:1 {sys.argv[1]}/set{i}" for i in range(170))
dataset = build_datasets(training_flags("--train-weighted-split-paths", f"train: {parts}"), train_samples=700, pad=0).train
print(sorted({dataset.provenance(i)["prefix"] for i in range(700) if len(dataset[i].tokens) == 33})[-1], len(dataset))
"""


def run_with_descriptors(limit: int, *command: str) -> subprocess.CompletedProcess:
    def before() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-c", *command], env=env, preexec_fn=before, capture_output=True, text=True)


def test_170_datasets_fit_in_256_descriptors(tmp_path):
    for i in range(170):
        write_documents(tmp_path / f"set{i}", numbered_documents([(3, 4)] * 5, first=i))
    done = run_with_descriptors(256, MANY, str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "set99"), "700"], done.stderr


def test_too_many_open_files_are_not_called_damage(tmp_path):
    prefix = write_documents(tmp_path / "set", numbered_documents([(3, 4)] * 9))
    use_up = (
        "import sys, os; from megatron_ft.data.packing import Packing, TokenizedDocuments, load_index\n"
        "from megatron_ft.errors import UserError\n"
        "documents = TokenizedDocuments(sys.argv[1]); load_index(documents, Packing(0, 9, 20))\n"
        "try:\n    while True: os.open('/dev/null', os.O_RDONLY)\nexcept OSError: pass\n"
        "for attempt in (lambda: documents.inputs[0], lambda: load_index(documents, Packing(0, 9, 20)), lambda: TokenizedDocuments(sys.argv[1])):\n"
        "    try: attempt()\n    except UserError as error: print(error)\n"
    )
    done = run_with_descriptors(64, use_up, prefix)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("Too many open files" in line and not re.search("damage|remove|again", line) for line in lines), lines
