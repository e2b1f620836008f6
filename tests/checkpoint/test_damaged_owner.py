"""A damaged owner's file or tracker keeps no run from resuming."""

import json
import os
import socket
from pathlib import Path

import pytest

from megatron_ft.checkpoint import lease
from megatron_ft.checkpoint.lease import Owner, SaveDirectoryLease
from megatron_ft.checkpoint.resume import candidates
from megatron_ft.launcher.slurm_job import newest_iteration
from megatron_ft.weights.directory import BEST, OWNER, TRACKER, read_best

OWNER_NOW = json.loads(Owner.this_process("0123456789ab").to_json())
ODD = {
    "empty": b"",
    "binary": bytes(range(256)),
    "huge": b" " * (9 << 20) + b"{}",
    "null": b"null",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "no keys": b"{}",
    "truncated": json.dumps(OWNER_NOW).encode()[:-5],
    "superscript three": "\u00b3".encode(),
}
CHANGES: list[dict[str, object]] = [
    {"pid": "7"}, {"pid": -1}, {"pid": 0}, {"pid": 2**70}, {"pid": 1.5}, {"pid": None}, {"pid": True}, {"process_started": []},
    {"process_started": "1"}, {"process_started": None}, {"host": 5}, {"host": None}, {"namespace": []}, {"token": 5},
    {"token": None}, {"slurm_restarts": "1"}, {"slurm_job": []}, {"since": None}, {"since": 5},
]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [*ODD.values(), *(json.dumps({**OWNER_NOW, **change}).encode() for change in CHANGES)],
    ids=[*ODD, *map(str, CHANGES)],
)
def test_a_damaged_owner_is_no_owner(tmp_path, content):
    (tmp_path / OWNER).write_bytes(content)
    owned = SaveDirectoryLease(tmp_path)
    owned.claim()
    with owned.writing():
        assert json.loads((tmp_path / OWNER).read_bytes())["token"] == owned.token
    owned.release()


def test_a_process_of_this_host_that_has_ended_is_no_owner(tmp_path):
    gone = {**OWNER_NOW, "host": socket.gethostname(), "pid": 2**31 - 1, "slurm_job": None}
    (tmp_path / OWNER).write_text(json.dumps(gone))
    owned = SaveDirectoryLease(tmp_path)
    owned.claim()
    owned.release()


def test_an_owner_is_shown_without_control_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 0.05)
    monkeypatch.setattr(lease, "POLL", 0.02)
    (tmp_path / OWNER).write_text(json.dumps({**OWNER_NOW, "host": "another\x1b[2J\nhost"}))
    lines: list[str] = []
    owned = SaveDirectoryLease(tmp_path)
    owned.claim(lines.append)
    owned.release()
    assert len(lines) == 1 and lines[0].isprintable()


@pytest.mark.parametrize("restarts", ["", "\u00b3", "many", "-1", "9" * 5000])
def test_an_odd_restart_count_counts_as_none(monkeypatch, restarts):
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert Owner.this_process("0").slurm_restarts == 0


@pytest.mark.parametrize(
    "text", [*ODD.values(), b"-5", b"1e3", b"9" * 5000, b"\n2\n\n", b"\x1b[2J2"], ids=lambda text: ascii(text[:8])
)
def test_an_odd_tracker_keeps_no_run_from_resuming(tmp_path: Path, text: bytes):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002/manifest.json").touch()
    for name in (TRACKER, BEST):
        (tmp_path / name).write_bytes(text)
    found = candidates(tmp_path)
    assert found.iterations == [2] and newest_iteration(tmp_path) == 2
    assert all(note.isprintable() and len(note) < 500 for note in found.notes)
    assert read_best(tmp_path) in (None, 2)


def test_a_tracker_that_is_a_directory_keeps_no_run_from_resuming(tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002/manifest.json").touch()
    os.mkdir(tmp_path / TRACKER)
    assert candidates(tmp_path).iterations == [2]
