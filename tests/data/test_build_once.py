"""Builders that are suspended, killed or on other nodes: one result, and no work is lost."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ft.data import build_once as build_once_module
from megatron_ft.data.build_once import Builder, build_once
from megatron_ft.errors import UserError
from megatron_ft.files.lease import ProcessIdentity

context = multiprocessing.get_context("fork")
OURS = ProcessIdentity.of_this_process()


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(build_once_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(build_once_module, "STALE_SECONDS", 1.0)


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def build_when_told(directory: Path, name: str) -> None:
    """Build; the content is complete once `directory.parent / "go-NAME"` exists."""

    def build(scratch: Path) -> None:
        (scratch / "content").write_text("begun")
        (directory.parent / f"began-{name}").touch()
        wait_for(lambda: (directory.parent / f"go-{name}").exists())
        (scratch / "content").write_text("complete")

    build_once(directory, build)
    assert (directory / "content").read_text() == "complete"


def start(directory: Path, name: str) -> multiprocessing.Process:
    process = context.Process(target=build_when_told, args=(directory, name))
    process.start()
    return process


def remaining(directory: Path) -> list[str]:
    """Names next to the directory, without those of the tests."""
    return sorted(path.name for path in directory.parent.iterdir() if not path.name.startswith(("go-", "began-")))


@pytest.mark.parametrize("order", ["suspended first", "replacement first", "suspended after all"])
def test_a_suspended_builder_and_its_replacement_both_succeed(tmp_path, order):
    directory = tmp_path / "index"
    suspended = start(directory, "a")
    wait_for((tmp_path / "began-a").exists)
    os.kill(suspended.pid, signal.SIGSTOP)
    replacement = start(directory, "b")
    wait_for((tmp_path / "began-b").exists)
    if order == "suspended after all":
        (tmp_path / "go-b").touch()
        replacement.join(20)
        (tmp_path / "go-a").touch()
        os.kill(suspended.pid, signal.SIGCONT)
    else:
        os.kill(suspended.pid, signal.SIGCONT)
        for name in ("a", "b") if order == "suspended first" else ("b", "a"):
            (tmp_path / f"go-{name}").touch()
            (suspended if name == "a" else replacement).join(20)
    for process in (suspended, replacement):
        process.join(20)
        assert process.exitcode == 0
    assert remaining(directory) == ["index"]


def test_a_builder_whose_files_were_removed_waits_for_its_replacement(tmp_path):
    """Cleaned up by hand, or by an older version, while it was suspended."""
    directory, began = tmp_path / "index", tmp_path / "began-b"
    loser = start(directory, "a")
    wait_for((tmp_path / "began-a").exists)
    os.kill(loser.pid, signal.SIGSTOP)
    winner = start(directory, "b")
    wait_for(began.exists)
    token = Builder.read(tmp_path / "index.lock").token
    for path in tmp_path.glob(".index.*/content"):
        if token not in str(path):
            path.unlink()
            path.parent.rmdir()
    (tmp_path / "go-a").touch()
    os.kill(loser.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert loser.exitcode is None  # waits
    (tmp_path / "go-b").touch()
    for process in (loser, winner):
        process.join(20)
        assert process.exitcode == 0
    assert remaining(directory) == ["index"]


def test_a_dead_pid_of_another_kernel_is_not_a_dead_builder(tmp_path, monkeypatch):
    """Two nodes of one host name: a process table covers one node."""
    monkeypatch.setattr(build_once_module, "STALE_SECONDS", 60.0)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    namespace, _, _ = OURS.namespace.partition(" ")
    elsewhere = replace(OURS, namespace=f"{namespace} another-boot-id", pid=child.pid)
    (tmp_path / "index.lock").write_text(json.dumps({"token": "0123456789ab", **asdict(elsewhere)}))
    waiting = start(tmp_path / "index", "a")
    time.sleep(1)
    (tmp_path / "index").mkdir()  # the other node has finished
    (tmp_path / "index" / "content").write_text("complete")
    waiting.join(20)
    assert waiting.exitcode == 0 and not (tmp_path / "began-a").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"node 1\n", b'{"token": 5}', json.dumps({"token": "0" * 32, **asdict(OURS), "pid": -1}).encode(), b"\xff"],
    ids=["empty", "text", "a number as token", "a negative pid", "not UTF-8"],
)
def test_a_lock_that_names_nobody_is_taken_over_when_its_heartbeat_has_stopped(tmp_path, content):
    (tmp_path / "index.lock").write_bytes(content)
    began = time.monotonic()
    build_once(tmp_path / "index", lambda scratch: None)
    assert 0.9 < time.monotonic() - began < 15 and remaining(tmp_path / "index") == ["index"]


def test_only_ones_own_lock_is_touched_and_removed(tmp_path):
    lock = tmp_path / "index.lock"
    other = Builder("f" * 32, OURS)

    def build(scratch: Path) -> None:
        lock.write_text(other.to_json())  # taken over
        os.utime(lock, (1000, 1000))
        time.sleep(0.5)

    build_once(tmp_path / "index", build)
    assert Builder.read(lock) == other and lock.stat().st_mtime == 1000


def test_only_old_files_of_unknown_builders_are_removed(tmp_path):
    """A builder that was suspended for an hour still has its files."""
    now = time.time()
    for name, age in ((f".old.{'a' * 32}", 25 * 3600), (f".recent.{'b' * 32}", 3600), (".notes", 10**7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").touch()
        for path in (tmp_path / name / "content", tmp_path / name):
            os.utime(path, (now - age, now - age))
    build_once(tmp_path / "index", lambda scratch: None)
    assert remaining(tmp_path / "index") == [".notes", f".recent.{'b' * 32}", "index"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "No space left on device); free disk space or inodes, or give another directory with --data-cache-path DIR",
        ),
        (errno.EDQUOT, "); free disk space or inodes of your quota, or give another directory"),
        (errno.EACCES, "Permission denied); give a writable directory with --data-cache-path DIR"),
        (errno.EROFS, "Read-only file system); give a writable directory with --data-cache-path DIR"),
        (errno.EMFILE, "Too many open files); this process has too many open files: raise the limit"),
        (errno.EIO, "Input/output error); the disk or its server failed"),
    ],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("where", ["lock", "directory", "content"])
def test_the_remedy_is_that_of_the_failed_call(tmp_path, monkeypatch, where, number, message):
    def fail(*_) -> None:
        raise OSError(number, os.strerror(number))

    if where == "lock":
        monkeypatch.setattr(Builder, "to_json", fail)
    if where == "directory":
        monkeypatch.setattr(build_once_module, "_scratch", lambda directory, token: tmp_path / "missing" / "scratch")
        monkeypatch.setattr(
            build_once_module.Path, "mkdir", lambda path, **_: fail() if path.name == "scratch" else None
        )
    with pytest.raises(UserError) as error:
        build_once(tmp_path / "index", fail)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert remaining(tmp_path / "index") == []
