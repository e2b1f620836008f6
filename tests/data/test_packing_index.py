"""The packing index on disk: built by one process, never stale or incomplete, elsewhere if the data
directory is read-only."""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from token_files import numbered_documents, training_flags, write_documents

from megatron_ft.data import build_once as build_once_module
from megatron_ft.data.build_once import build_once
from megatron_ft.data.packed_dataset import build_datasets, sequences_per_epoch
from megatron_ft.data.packing import Packing, TokenizedDocuments, load_index, pack
from megatron_ft.errors import UserError

context = multiprocessing.get_context("fork")


def indices(prefix: str | Path) -> list[Path]:
    return sorted(Path(f"{prefix}_packing").iterdir())


@pytest.fixture
def prefix(tmp_path) -> str:
    return write_documents(tmp_path / "set", numbered_documents([(3, 4)] * 40))


@pytest.mark.parametrize("change", [
    {"start": 1}, {"stop": 39}, {"capacity": 21}, {"order": "greedy"}, {"lookahead": 5}, {"overlong": "truncate"}, {"seed": 2},
    {"epochs": 2}, {"keep_last": True},
], ids=str)  # fmt: skip
def test_every_setting_has_its_own_index(prefix, change):
    documents, first = TokenizedDocuments(prefix), Packing(0, 40, 20)
    other = Packing(**{**vars(first), **change})
    for packing in (first, other, first, other):
        index, fresh = load_index(documents, packing), pack(documents, packing)
        np.testing.assert_array_equal(index.documents, fresh.documents)
        np.testing.assert_array_equal(index.bounds, fresh.bounds)
        assert index.facts == fresh.facts
    assert len(indices(prefix)) == 2  # built twice, used four times


@pytest.mark.parametrize("lengths", [
    [(3, 4)] * 39 + [(4, 3)],
    [(3, 3)] * 40,  # tokenized again with --no-append-eod: only the targets are shorter
    [(4, 4)] * 40,
], ids=["a bound moved", "only targets", "only inputs"])  # fmt: skip
def test_changed_data_gets_a_new_index(prefix, lengths):
    packing = Packing(0, 40, 20)
    load_index(TokenizedDocuments(prefix), packing)
    write_documents(prefix, numbered_documents(lengths))
    documents = TokenizedDocuments(prefix)
    np.testing.assert_array_equal(load_index(documents, packing).bounds, pack(documents, packing).bounds)
    assert len(indices(prefix)) == 2


def test_a_damaged_index_is_reported(prefix):
    load_index(TokenizedDocuments(prefix), Packing(0, 40, 20))
    damaged = indices(prefix)[0] / "documents.npy"
    os.truncate(damaged, damaged.stat().st_size - 1)
    with pytest.raises(UserError, match="this packing index is damaged .* remove the directory"):
        load_index(TokenizedDocuments(prefix), Packing(0, 40, 20))


def test_unrelated_flags_share_an_index(prefix):
    for flags in (["--micro-batch-size", "2"], ["--norm-target-loss"], ["--lr", "1"]):
        sequences_per_epoch(training_flags("--data-prefix", prefix, *flags))
    assert len(indices(prefix)) == 1
    settings = json.loads((indices(prefix)[0] / "index.json").read_text())["settings"]
    assert settings["stop"] == 38 and settings["capacity"] == 33


def _build_slowly(directory: Path, log: Path, seconds: float, crash: bool = False) -> None:
    def build(partial: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        (partial / "content").write_text("partial")
        time.sleep(seconds)
        if crash:
            os.kill(os.getpid(), signal.SIGKILL)
        (partial / "content").write_text("complete")

    build_once(directory, build)
    assert (directory / "content").read_text() == "complete"


def _start(*args) -> multiprocessing.Process:
    process = context.Process(target=_build_slowly, args=args)
    process.start()
    return process


def test_one_process_builds_while_the_others_wait(tmp_path):
    directory, log = tmp_path / "packing" / "index", tmp_path / "log"
    processes = [_start(directory, log, 0.3) for _ in range(6)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 1
    assert [path.name for path in directory.parent.iterdir()] == ["index"]  # no lock, no temporary directory


def test_a_killed_builder_is_replaced(tmp_path):
    directory, log = tmp_path / "packing" / "index", tmp_path / "log"
    first = _start(directory, log, 0.2, True)
    first.join(20)
    assert first.exitcode == -signal.SIGKILL and not directory.exists()
    assert len(list(directory.parent.iterdir())) == 2  # its lock and its incomplete directory
    processes = [_start(directory, log, 0.1) for _ in range(3)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(log.read_text().split()) == 2
    assert [path.name for path in directory.parent.iterdir()] == ["index"]


def test_a_builder_on_another_node_is_waited_for_until_its_heartbeat_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(build_once_module, "STALE_SECONDS", 0.5)
    directory, log = tmp_path / "index", tmp_path / "log"
    lock = tmp_path / "index.lock"
    lock.write_text("another-node 1\n")
    waiting = _start(directory, log, 0)
    for _ in range(10):  # its heartbeat
        time.sleep(0.15)
        lock.touch()
    assert not log.exists()
    began = time.monotonic()  # the heartbeat stops
    waiting.join(20)
    assert waiting.exitcode == 0 and time.monotonic() - began < 5
    assert len(log.read_text().split()) == 1 and not lock.exists()


def test_a_failing_build_frees_the_lock(tmp_path):
    def build(partial: Path) -> None:
        (partial / "content").write_text("partial")
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError, match="^no$"):
            build_once(tmp_path / "index", build)
    assert list(tmp_path.iterdir()) == []


def _read_as_nobody(prefix: str, cache: str | None, answer) -> None:
    if os.geteuid() == 0:  # root can write everywhere
        os.setuid(65534)
    flags = ["--data-cache-path", cache] if cache else []
    try:
        args = training_flags("--data-prefix", prefix, *flags)
        answer.send(len(build_datasets(args, train_samples=3, pad=0).train))
    except UserError as error:
        answer.send(str(error))


def dataset_size_or_error(prefix: str, cache: Path | None) -> int | str:
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_as_nobody, args=(prefix, cache and str(cache), theirs))
    process.start()
    assert ours.poll(30)
    answer = ours.recv()
    process.join()
    return answer


def test_the_index_is_elsewhere_if_the_data_directory_is_read_only():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own directories are closed to other users
        data, cache = Path(folder) / "data", Path(folder) / "cache"
        data.mkdir()
        cache.mkdir()
        Path(folder).chmod(0o755)
        cache.chmod(0o777)
        prefix = write_documents(data / "set", numbered_documents([(3, 4)] * 40))
        data.chmod(0o555)
        for elsewhere, expected in (
            (None, "give a writable directory with --data-cache-path DIR"),
            (cache, 3),
        ):
            answer = dataset_size_or_error(prefix, elsewhere)
            assert answer == expected or (elsewhere is None and expected in answer and "\n" not in answer)
        data.chmod(0o755)
        assert [path.name for path in cache.iterdir()] == ["set_packing"]
        assert not Path(f"{prefix}_packing").exists()
        # Existing indices next to read-only data are used.
        build_datasets(training_flags("--data-prefix", prefix), train_samples=3, pad=0)
        data.chmod(0o555)
        assert len(indices(prefix)) == 2 and dataset_size_or_error(prefix, None) == 3


def test_a_cache_path_that_is_a_file_is_an_error(prefix, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a packing index cannot be written here|is a file"):
        sequences_per_epoch(training_flags("--data-prefix", prefix, "--data-cache-path", tmp_path / "file"))
