"""The scraper's parts that need no server: journal, pace, Retry-After, and a full disk."""

import os
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from served_history import make_repository, metadata, numbered, write_rows

from megatron_ft.commits.scraper import pace as pace_module
from megatron_ft.commits.scraper.journal import Batch, Journal
from megatron_ft.commits.scraper.metadata import Metadata
from megatron_ft.commits.scraper.pace import Pace, ServerUnavailable, Stopped
from megatron_ft.commits.scraper.protocol import Result
from megatron_ft.commits.scraper.server import _seconds
from megatron_ft.commits.scraper.status import Status

SCRAPE = "dataset/commitpack/scrape_github.py"


@pytest.fixture
def journal(tmp_path) -> Path:
    """A journal of two repositories."""
    path = tmp_path / "part.journal"
    with Journal(path) as journal:
        add(journal, tmp_path, "o/a", Result(0, Status.OK, "old \u2028 λ\n", "new\n"), Result(1, Status.COMMIT_GONE))
        add(journal, tmp_path, "o/b", Result(1, Status.BINARY))
    return path


def add(journal: Journal, tmp_path: Path, repo: str, *results: Result) -> None:
    batch = Batch(tmp_path / "batch", repo)
    for result in results:
        batch.add(result)
    batch.close()
    journal.append(batch)


def known(path: Path) -> dict:
    with Journal(path) as journal:
        return journal.tried


def test_journal_is_read_back_with_contents(journal):
    with Journal(journal) as again:
        assert again.tried == {0: {"o/a": Status.OK}, 1: {"o/a": Status.COMMIT_GONE, "o/b": Status.BINARY}}
        assert again.contents(0) == ("old \u2028 λ\n", "new\n")
        assert (again.final(0), again.final(1), again.final(2)) == (Status.OK, Status.BINARY, None)


def test_journal_cut_at_any_byte_keeps_what_was_complete(journal, tmp_path):
    content = journal.read_bytes()
    first = content.index(b'{"complete": true}\n') + len(b'{"complete": true}\n')
    known_first = {0: {"o/a": Status.OK}, 1: {"o/a": Status.COMMIT_GONE}}
    for cut in range(len(content)):
        journal.write_bytes(content[:cut])
        assert known(journal) == (known_first if cut >= first else {})
        assert journal.read_bytes() == content[: first if cut >= first else 0]
    journal.write_bytes(content[: first + 3])
    with Journal(journal) as again:
        add(again, tmp_path, "o/b", Result(1, Status.BINARY))
    assert journal.read_bytes() == content


@pytest.mark.parametrize(
    "garbage", [b"\0\0\0\0\n", b"[]\n", b'{"row": 1}\n', b'{"row": 1, "repo": "x", "status": "?"}\n']
)
def test_journal_ends_where_the_disk_lost_something(journal, garbage):
    before = known(journal)
    with open(journal, "ab") as file:
        file.write(garbage + b'{"complete": true}\n')
    assert known(journal) == before


def test_pauses_double_with_jitter_up_to_a_quarter_of_an_hour():
    pace, pauses = Pace(1000, threading.Event(), seed=1), []
    for _ in range(pace_module.MAX_FAILURES - 1):
        pauses.append(pace.failed(time.monotonic(), "x", None))
    bounds = [min(900, 2**i) for i in range(len(pauses))]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) == len(pauses)
    with pytest.raises(ServerUnavailable, match="x"):
        pace.failed(time.monotonic(), "x", None)


def test_success_starts_the_back_off_again():
    pace = Pace(1000, threading.Event(), seed=1)
    for _ in range(6):
        pace.failed(time.monotonic(), "x", None)
    pace.succeeded()
    assert pace.failed(time.monotonic(), "x", None) <= 1


def test_requests_that_were_already_running_count_as_one_failure():
    pace, started = Pace(1000, threading.Event(), seed=1), time.monotonic()
    assert all(pace.failed(started, "x", None) <= 1 for _ in range(4))


def test_retry_after_takes_precedence_within_a_day():
    pace = Pace(1000, threading.Event())
    assert pace.failed(time.monotonic(), "x", 120) == 120
    assert pace.failed(time.monotonic(), "x", 1e12) == 86400


def test_retry_after_may_be_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 < _seconds(later) <= 90
    assert _seconds("Sat, 01 Jan 2000 00:00:00 GMT") == 0


def test_waiting_ends_when_the_run_stops():
    stop = threading.Event()
    pace = Pace(1000, stop)
    pace.failed(time.monotonic(), "x", 3600)
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        pace.wait()


@pytest.mark.parametrize(
    "repos, expected",
    [
        ("a/b", ["a/b"]),
        ("b/x,a/x, b/x", ["b/x", "a/x"]),
        ("a/.github,group/sub/name,c_d/e.f-g", ["a/.github", "group/sub/name", "c_d/e.f-g"]),
        ("a/../b,/a,a/,-a/b,a/-b,a b/c,a/b?c,a/b#c,a/b@{1},https://x/y,é/a", []),
    ],
)
def test_names_of_repositories_are_checked_and_keep_their_order(repos, expected):
    assert Metadata("", repos, "", "", "", "", "", "", "").repositories == expected


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("full", ["--output", "--temporary-directory"])
def test_a_full_disk_is_one_line_and_no_status(small_disk, tmp_path, full):
    changes = numbered(4)
    for change in changes:
        change.files["a.py"] = ("100644", os.urandom(50_000).hex().encode())
    ids = make_repository(tmp_path / "served/o/n", changes)[1:]
    source = write_rows(tmp_path / "rows.jsonl", [metadata(id, "o/n") for id in ids])
    directories = {"--output": tmp_path / "out", "--temporary-directory": tmp_path} | {full: small_disk / "x"}
    command = [SCRAPE, "--input", source, "--base-url", f"file://{tmp_path}/served", "--rate", 1000]
    command += [part for flag in directories.items() for part in flag]
    line = one_error_line(run_program(*command, ok=False))
    assert str(small_disk) in line and "free disk space" in line
    assert not list(directories["--output"].glob("part-*")) and not list(directories["--output"].glob("status/*"))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    run_program(*command)
    assert len((directories["--output"] / "part-00000.jsonl").read_bytes().splitlines()) == 4
