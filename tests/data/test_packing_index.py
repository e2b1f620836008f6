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


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["facts"] |= changes
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: os.truncate(index / "documents.npy", (index / "documents.npy").stat().st_size - 1),
        lambda index: os.truncate(index / "rows.npy", 50),
        lambda index: (index / "rows.npy").write_bytes(b"PK\x03\x04" * 99),
        lambda index: (index / "rows.npy").unlink(),
        lambda index: np.save(index / "rows.npy", np.zeros((5, 2), np.int32)),
        lambda index: np.save(index / "rows.npy", np.zeros((5, 3), np.int64)),
        lambda index: np.save(index / "rows.npy", np.zeros(5, np.int64)),
        lambda index: np.save(index / "documents.npy", np.arange(39)),
        lambda index: (index / "index.json").write_text("{"),
        lambda index: (index / "index.json").write_text("[" * 100_000),
        lambda index: (index / "index.json").write_text("{}"),
        lambda index: change_json(index / "index.json", tokens=0),
        lambda index: change_json(index / "index.json", tokens="40"),
        lambda index: change_json(index / "index.json", lost_tokens=-1),
        lambda index: change_json(index / "index.json", lost_tokens=10**6),
        lambda index: change_json(index / "index.json", capacity=21),
        lambda index: change_json(index / "index.json", documents=True),
    ],
)
def test_a_damaged_index_is_reported(prefix, damage):
    load_index(TokenizedDocuments(prefix), Packing(0, 40, 20))
    damage(indices(prefix)[0])
    with pytest.raises(UserError, match="epochs1_.*") as error:
        load_index(TokenizedDocuments(prefix), Packing(0, 40, 20))
    assert "\n" not in str(error.value) and str(indices(prefix)[0]) in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("documents", [-1], "sequence 0 has a document outside its range"),
        ("documents", [38], "sequence 0 has a document outside its range"),
        ("documents", [2**62], "sequence 0 has a document outside its range"),
        ("rows", [-1, 4], "sequence 0 has documents -1 to 4"),
        ("rows", [0, 2**40], "sequence 0 has documents 0 to 1099511627776"),
        ("rows", [3, 3], "sequence 0 has documents 3 to 3"),
        ("rows", [0, 30], "sequence 0 has more than 33 tokens"),
    ],
)
def test_a_damaged_sequence_is_reported_when_it_is_read(prefix, name, values, message):
    flags = training_flags("--data-prefix", prefix)
    build_datasets(flags, train_samples=3, pad=0)
    path = next(index for index in indices(prefix) if index.name.startswith("0-38")) / f"{name}.npy"
    damaged = np.load(path)
    damaged.reshape(-1)[: len(values)] = values
    np.save(path, damaged)
    dataset = build_datasets(flags, train_samples=3, pad=0).train
    with pytest.raises(UserError, match=f"this packing index is damaged .{message}.; remove the directory"):
        dataset[0]


def test_a_dataset_far_smaller_than_a_sequence_needs_few_indices(tmp_path):
    """One token per epoch: 40 sequences need 1,300 epochs, but few indices are built."""
    prefix = write_documents(tmp_path / "set", [([1], [])])
    for order in ("greedy", "best-fit"):
        flags = training_flags("--data-prefix", prefix, "--packing", order, "--validation-fraction", 0)
        dataset = build_datasets(flags, train_samples=40, pad=0).train
        assert len(dataset) == 40 and dataset[39].tokens[0] == 1
    assert len(indices(prefix)) <= 6


def test_epochs_that_do_not_fit_in_memory_are_an_error(tmp_path):
    prefix = write_documents(tmp_path / "set", [([1], [])] * 100)
    packing = Packing(0, 100, 20, "greedy", epochs=2**50)
    with pytest.raises(UserError, match="epochs of 100 documents does not fit in memory"):
        load_index(TokenizedDocuments(prefix), packing)
    assert indices(prefix) == []


def test_unrelated_flags_share_an_index(prefix):
    for flags in (["--micro-batch-size", "2"], ["--norm-target-loss"], ["--lr", "1"]):
        sequences_per_epoch(training_flags("--data-prefix", prefix, *flags))
    assert len(indices(prefix)) == 1
    settings = json.loads((indices(prefix)[0] / "index.json").read_text())["settings"]
    assert settings["stop"] == 38 and settings["capacity"] == 33


def _build_slowly(directory: Path, log: Path, seconds: float, crash: bool = False) -> None:
    def build(partial: Path) -> None:
        with open(log, "a", encoding="utf-8") as file:
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
    monkeypatch.setattr(build_once_module, "STALE_SECONDS", 2.0)
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
    assert waiting.exitcode == 0 and time.monotonic() - began < 15
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
