"""Checkpoint files: who may write them, who can read them, failed saves, and pickles."""

import dataclasses
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_runs import (
    DROPOUT,
    FLAGS,
    Ranks,
    state_and_checkpointer,
    tensor_bytes,
    wait_for_a_slow_rank,
    wait_for_iteration,
    write_inputs,
)
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from megatron_ft.checkpoint import lease as save_lease
from megatron_ft.checkpoint.lease import SaveDirectoryLease
from megatron_ft.checkpoint.optimizer_state import boxes
from megatron_ft.checkpoint.retention import Retention, most_at_once, superseded
from megatron_ft.errors import UserError
from megatron_ft.files.checksum import describe_file
from megatron_ft.weights.directory import read_tracker
from megatron_ft.weights.manifest import check_files, read_manifest
from megatron_ft.weights.torch_dist_metadata import read_metadata


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# ---- pieces of tensors ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_the_boxes_of_a_range_contain_it_in_order(shape, data):
    full = np.arange(np.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, full.size))
    end = data.draw(st.integers(start, full.size))
    read = []
    for offsets, sizes, flat in boxes(tuple(shape), start, end):
        box = full[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
        assert box[0] == flat
        read += box.tolist()
    assert read == list(range(start, end))
    assert len(boxes(tuple(shape), start, end)) <= 2 * len(shape) - 1


def test_ranks_wait_for_the_slowest_as_long_as_the_flag_allows():
    assert run_ranks(wait_for_a_slow_rank, 2, 0.5, 3) == ["met"] * 2
    assert run_ranks(wait_for_a_slow_rank, 2, 0.02, 3)[0] == "gave up"


# ---- who may write -------------------------------------------------------------------------------


def test_a_live_owner_keeps_the_directory_and_a_dead_one_loses_it(tmp_path, monkeypatch):
    first = SaveDirectoryLease(tmp_path)
    first.claim()
    with pytest.raises(UserError, match="is in use by a running job"):
        SaveDirectoryLease(tmp_path).claim()
    claim = json.loads((tmp_path / save_lease.OWNER).read_text())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / save_lease.OWNER).write_text(json.dumps(claim | {"pid": gone.pid}))
    second = SaveDirectoryLease(tmp_path)
    second.claim()
    with pytest.raises(UserError, match="has been taken over"), first.writing():
        raise AssertionError("a stale owner may write")
    with second.writing():
        pass
    first.release()  # must not release the lease of the second
    with second.writing():
        pass
    # a requeued SLURM job takes over, whatever still runs on its old nodes
    (tmp_path / save_lease.OWNER).write_text(json.dumps(claim | {"slurm_job": "17", "slurm_restarts": 0}))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    SaveDirectoryLease(tmp_path).claim()


def test_the_heartbeat_of_an_owner_on_another_host_is_watched(tmp_path, monkeypatch):
    first = SaveDirectoryLease(tmp_path)
    first.claim()
    elsewhere = json.loads((tmp_path / save_lease.OWNER).read_text()) | {"host": "node17"}
    (tmp_path / save_lease.OWNER).write_text(json.dumps(elsewhere))
    monkeypatch.setattr(save_lease, "STALE", 0.5)
    monkeypatch.setattr(save_lease.time, "sleep", lambda seconds: os.utime(tmp_path / save_lease.OWNER))
    with pytest.raises(UserError, match="node17.*its heartbeat is advancing"):
        SaveDirectoryLease(tmp_path).claim(log=lambda line: None)
    monkeypatch.setattr(save_lease.time, "sleep", lambda seconds: threading_wait(0.6))
    log: list[str] = []
    SaveDirectoryLease(tmp_path).claim(log=log.append)
    assert "waiting" in log[0]


def threading_wait(seconds: float) -> None:
    import threading

    threading.Event().wait(seconds)


def test_two_runs_never_share_a_save_directory(inputs, tmp_path):
    from checkpoint_runs import train

    words = f"{FLAGS} {inputs} {DROPOUT} --train-iters 3000 --save {tmp_path}".split()
    with Ranks(train, 1, words) as ranks:
        wait_for_iteration(ranks, tmp_path, 3)
        ((second, _),) = run_ranks(train, 1, words)
        assert "is in use by a running job" in second
        assert ranks.running
        ranks.signal(signal.SIGTERM)
        ((status, _),) = ranks.results()
    assert status == 75


# ---- who else can read ---------------------------------------------------------------------------


def save_and_read_with_megatron(words, save):
    """Save, load with Megatron-Core's own function into zeroed weights; the largest difference."""
    from megatron.core import dist_checkpointing

    from megatron_ft.checkpoint.load_weights import unwrap

    _, state, checkpointer = state_and_checkpointer(words)
    checkpointer.start(state)
    state.iteration = 1
    assert checkpointer.save(state)
    model = unwrap(state.model[0])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    template = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    for value in model.parameters():
        value.data.zero_()
    loaded = dist_checkpointing.load(template, str(Path(save) / "iter_0000001"))
    model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()}, strict=False)
    return max((before[name] - value).abs().max().item() for name, value in model.named_parameters())


@pytest.mark.parametrize("flags", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2 --bf16"])
def test_megatron_core_reads_the_checkpoint(inputs, tmp_path, flags):
    words = f"{FLAGS} {flags} {inputs} --train-iters 5 --save {tmp_path}".split()
    assert run_ranks(save_and_read_with_megatron, 2, words, tmp_path) == [0.0, 0.0]


# ---- saves that fail -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, None if mounting is not permitted."""
    point = tmp_path / "disk"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", point], capture_output=True)
    yield point if done.returncode == 0 else None
    if done.returncode == 0:
        subprocess.run(["umount", "-l", point], check=True)


class Full:
    """Nothing more can be written: the disk is full, or files may not grow, as under a quota."""

    def __init__(self, disk: str | None, rank: int) -> None:
        self.filler = Path(disk) / "filler" if disk and rank == 0 else None
        self.quota = not disk and rank == 1

    def __enter__(self):
        if self.filler:
            with open(self.filler, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
        elif self.quota:
            self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, self.limit[1]))

    def __exit__(self, *_):
        if self.filler:
            self.filler.unlink()
        elif self.quota:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)


def save_on_a_full_disk(words, disk):
    """Outcome of each save on this rank, and what was logged."""
    import torch.distributed as dist

    log: list[str] = []
    _, state, checkpointer = state_and_checkpointer(words)
    checkpointer.log = log.append
    checkpointer.start(state)
    full = Full(disk, dist.get_rank())
    outcomes = []

    def save():
        state.iteration += 1
        outcomes.append(checkpointer.save(state))
        checkpointer.wait()
        dist.barrier()

    save()
    with full:
        dist.barrier()
        save()
        dist.barrier()
    saved = sorted(p.name for p in checkpointer.save_directory.path.glob("iter_*"))
    save()
    try:
        with full:
            dist.barrier()
            save()
            save()
    except UserError as error:
        outcomes.append(str(error))
    try:
        checkpointer.finish()
    except UserError as error:
        outcomes.append(str(error))
    return outcomes, log, saved, checkpointer.failures


@pytest.mark.parametrize("layer", ["full disk", "quota of one rank", "full disk, async"])
def test_one_failed_save_is_logged_and_two_in_a_row_end_the_run(inputs, tmp_path, small_disk, layer):
    if layer.startswith("full disk") and small_disk is None:
        pytest.skip("mounting a small tmpfs is not permitted; the quota layer is tested instead")
    disk = None if layer.startswith("quota") else str(small_disk)
    save = Path(disk or tmp_path) / "save"
    words = f"{FLAGS} {inputs} --train-iters 5 --keep-last 1 --save {save} {'--async-save' if 'async' in layer else ''}".split()
    results = run_ranks(save_on_a_full_disk, 2, words, disk)
    for outcomes, _, saved, failures in results:
        if "async" not in layer:
            assert outcomes[:4] == [True, False, True, False]
        assert "2 saves in a row failed" in outcomes[-2] and "the last save failed" in outcomes[-1]
        assert saved == ["iter_0000001"] and failures == 3
    reason = "File too large" if disk is None else "No space left on device"
    assert any(reason in line and "failed saves so far: 1" in line for line in results[0][1])
    assert sorted(p.name for p in save.glob("iter_*")) == ["iter_0000003"]
    assert check_files(save / "iter_0000003", read_manifest(save / "iter_0000003"), checksums=True) == []


def start_only(words):
    _, state, checkpointer = state_and_checkpointer(words)
    log: list[str] = []
    checkpointer.log = log.append
    try:
        return " ".join([checkpointer.start(state).kind, *log])
    except UserError as error:
        return str(error)


def test_too_little_disk_space_is_an_error_before_the_first_step(inputs, small_disk):
    if small_disk is None:
        pytest.skip("mounting a small tmpfs is not permitted")
    (small_disk / "filler").write_bytes(bytes(int(2.8 * 2**20)))
    words = f"{FLAGS} {inputs} --train-iters 5 --save {small_disk / 'save'}".split()
    (line,) = run_ranks(start_only, 1, words)
    assert "a checkpoint takes 0.00" in line and "are free" in line


def test_too_little_disk_space_for_later_checkpoints_is_a_warning(inputs, small_disk):
    if small_disk is None:
        pytest.skip("mounting a small tmpfs is not permitted")
    (small_disk / "filler").write_bytes(bytes(2**20))

    def start(*flags):
        words = f"{FLAGS} {inputs} --save {small_disk / 'save'} --train-iters 9".split()
        return run_ranks(start_only, 1, [*words, *flags])[0]

    assert start("--keep-last", "1") == "scratch"
    assert "warning" in (line := start("--keep-last", "6")) and "up to 5 checkpoints of 0.00" in line
    assert "up to 6 checkpoints" in start("--keep-last", "4", "--save-interval", "1", "--eval-interval", "3")
    assert start("--keep-last", "6", "--save-interval", "9") == "scratch"


@pytest.mark.parametrize(
    "existing, until, flags, most",
    [
        ([], 100, {}, 4),  # two kept, the best, and the one being written
        ([], 100, {"tracks_best": False}, 3),
        ([], 20, {}, 2),
        ([], None, {}, 4),
        ([], None, {"save_interval": None}, 4),
        ([80, 90], 100, {"tracks_best": False}, 3),
        ([90, 100], 100, {}, 2),
        ([], 100, {"keep_last": 0}, 10),
        ([], 100, {"keep_every": 30, "tracks_best": False}, 5),  # 30, 60, 80, 90 and 100
        ([], 95, {"save_interval": None}, 1),
    ],
)
def test_most_checkpoints_on_disk_at_once(existing, until, flags, most):
    usual = {"save_interval": 10, "keep_last": 2, "keep_every": None, "tracks_best": True}
    assert most_at_once(existing, until, Retention(**{**usual, **flags})) == most


# ---- pickles -------------------------------------------------------------------------------------


class Evil:
    """Unpickling it creates a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_pickles_in_a_checkpoint_are_never_executed(inputs, tmp_path):
    save, trace = tmp_path / "save", tmp_path / "ran"
    words = f"{FLAGS} {inputs} --train-iters 5 --save {save}".split()
    run_ranks(save_once, 1, words)
    where = save / "iter_0000001"

    def forge(name: str, content: bytes, base: Path) -> str:
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(base, save)
        manifest = read_manifest(where)
        (where / name).write_bytes(content)
        manifest.files[name] = describe_file(where / name)  # an attacker would forge the checksum too
        manifest.write(where)
        (answer,) = run_ranks(start_only, 1, words)
        assert not trace.exists()
        return answer

    base = tmp_path / "base"
    shutil.copytree(save, base)
    pickles = pickle.dumps(Evil(trace))
    pickle.loads(pickles)
    assert trace.is_dir()  # unpickling it is harmful
    trace.rmdir()
    assert "refused" in forge(".metadata", pickles, base) and "mkdir" in forge(".metadata", pickles, base)
    assert forge("common.pt", pickles, base) == "resume"  # written for Megatron-Core, never read
    torch.save(Evil(trace), tmp_path / "evil.pt")
    evil, shard = (tmp_path / "evil.pt").read_bytes(), (base / "iter_0000001/__0_0.distcp").read_bytes()
    (base / "iter_0000001/__0_0.distcp").write_bytes(shard + evil)
    metadata = read_metadata(base / "iter_0000001")
    index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
    metadata.storage_data[index] = dataclasses.replace(
        metadata.storage_data[index], offset=len(shard), length=len(evil)
    )
    manifest = read_manifest(base / "iter_0000001")
    manifest.files["__0_0.distcp"] = describe_file(base / "iter_0000001/__0_0.distcp")
    manifest.write(base / "iter_0000001")
    answer = forge(".metadata", pickle.dumps(metadata), base)
    assert "__0_0.distcp: refused" in answer and "mkdir" in answer


def save_once(words):
    _, state, checkpointer = state_and_checkpointer(words)
    checkpointer.start(state)
    state.iteration = 1
    saved = checkpointer.save(state)
    checkpointer.finish()
    return saved


# ---- LoRA ----------------------------------------------------------------------------------------


def test_only_adapters_are_saved_and_resumed_on_their_base(inputs, tmp_path):
    from checkpoint_runs import train

    base, save = tmp_path / "base", tmp_path / "lora"
    run_ranks(train, 1, f"{FLAGS} {inputs} --train-iters 2 --save {base}".split())
    words = (
        f"{FLAGS.replace('--from-scratch', '')} {inputs} {DROPOUT} --lora-rank 2 --load {base} --train-iters 4 "
        "--tensor-model-parallel-size 2 --bf16 --save"
    ).split()
    assert [status for status, _ in run_ranks(train, 2, [*words, str(tmp_path / "uninterrupted")])] == [0, 0]
    run_ranks(train, 2, [*words, str(save), "--exit-interval", "1"])
    # The base run continues; the adapters still need the weights they were trained on.
    [(status, _)] = run_ranks(train, 1, f"{FLAGS} {inputs} --train-iters 4 --save {base}".split())
    assert status == 0
    assert read_tracker(base) == "4"
    run_ranks(train, 2, [*words, str(save), "--exit-interval", "2"])
    base.rename(tmp_path / "moved")
    words[words.index("--load") + 1] = str(tmp_path / "moved")
    results = run_ranks(train, 2, [*words, str(save), "--load-iteration", "2"])
    assert [status for status, _ in results] == [0, 0]
    tensors = tensor_bytes(save / "iter_0000004")
    assert tensors == tensor_bytes(tmp_path / "uninterrupted/iter_0000004")
    assert all("lora" in name for name in tensors) and any(
        name.startswith("optimizer.state.exp_avg.") for name in tensors
    )
    manifest = read_manifest(save / "iter_0000004")
    assert (manifest.base["path"], manifest.base["iteration"]) == (str(tmp_path / "moved"), 2)


# ---- intervals -----------------------------------------------------------------------------------


def saves_by_the_clock(words):
    _, state, checkpointer = state_and_checkpointer(words)
    checkpointer.start(state)
    saved = []
    for _ in range(4):
        state.iteration += 1
        if state.iteration == 3:
            time.sleep(0.7)
        saved.append(checkpointer.due(state) and checkpointer.save(state))
    checkpointer.finish()
    return saved


def test_save_interval_mins_is_measured_by_one_clock(inputs, tmp_path):
    words = f"{FLAGS} {inputs} --train-iters 5 --save-interval 1000 --save-interval-mins 0.01 --save {tmp_path}".split()
    assert run_ranks(saves_by_the_clock, 2, words) == [[False, False, True, False]] * 2


def test_the_newest_the_best_and_every_nth_checkpoint_are_never_superseded():
    def old(iterations: list[int], keep_last: int, keep_every: int | None = None, best: int | None = None) -> list[int]:
        retention = Retention(save_interval=10, keep_last=keep_last, keep_every=keep_every, tracks_best=True)
        return superseded(iterations, retention, best=best)

    iterations = [60, 50, 40, 30, 20, 10]
    assert old(iterations, 2, keep_every=30, best=10) == [40, 20]
    assert old(iterations, 0) == []
    assert old(iterations, 1) == [50, 40, 30, 20, 10]
    assert old([60], -1) == []
