"""dataset/commitpack/scrape_github.py when the server refuses, lies or hangs, and when it is killed
itself: what fails is never recorded as done, and nothing is fetched twice."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from git_server import GitServer, serve
from served_history import make_repository, metadata, numbered, read_rows, write_rows

from megatron_ft.commits.scraper import protocol
from megatron_ft.errors import UserError

SCRAPE = "dataset/commitpack/scrape_github.py"
EXIT_RESUME = 75
REPOS = ["o/a", "o/b", "o/c", "o/d"]
TOKEN = "ghp_0123456789abcdefSECRET"
# TOKEN as a login of x-access-token, in base 64
ENCODED = "eC1hY2Nlc3MtdG9rZW46Z2hwXzAxMjM0NTY3ODlhYmNkZWZTRUNSRVQ="


@pytest.fixture
def root(tmp_path) -> Path:
    """The directory of the repositories that are served."""
    return tmp_path / "served"


@pytest.fixture
def rows(root) -> list[dict]:
    """Rows of REPOS, two of each, in turn."""
    ids = {repo: make_repository(root / repo, numbered(2, salt=repo))[1:] for repo in REPOS}
    return [metadata(ids[repo][i], repo) for i in range(2) for repo in REPOS]


@pytest.fixture
def server(root):
    with serve(root) as server:
        yield server


def command(server: GitServer, tmp_path: Path, rows: list[dict], *flags, output: str = "out") -> list:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    source = write_rows(tmp_path / "metadata.jsonl", rows)
    flags = ("--temporary-directory", scratch, "--rate", 1000, "--part-rows", 5, *flags)
    return [SCRAPE, "--input", source, "--output", tmp_path / output, "--base-url", server.url, *flags]


def scrape(*args, **kwargs) -> subprocess.CompletedProcess:
    names = ("ok", "env")
    return run_program(
        *command(*args, **{k: v for k, v in kwargs.items() if k not in names}),
        **{k: kwargs[k] for k in names if k in kwargs},
    )


def statuses(output: Path) -> dict[str, set[str]]:
    """The statuses of the rows of each repository."""
    found: dict[str, set[str]] = {}
    for path in (output / "status").iterdir():
        for row in read_rows(path):
            found.setdefault(row["repo"], set()).add(row["status"])
    return found


def files_of(output: Path) -> dict[str, bytes]:
    """Everything that a user reads of an output, its report included."""
    found = [path for path in output.rglob("*") if path.is_file() and ".scrape" not in path.parts]
    report = output.with_name(output.name + "_report.json").read_bytes()
    return {str(path.relative_to(output)): path.read_bytes() for path in found} | {"report": report}


FAILURES = [
    ("429", "refused"),
    ("403", "refused"),
    ("500", "server_error"),
    ("503 Retry-After: 1", "server_error"),
    ("302 Location: /login", "server_error"),
    ("page", "server_error"),
    ("half", "server_error"),
    ("hang", "timeout"),
]


@pytest.mark.parametrize("answer, status", FAILURES)
def test_a_failure_is_retried_and_never_recorded_as_done(server, rows, tmp_path, answer, status):
    flags = ("--timeout", 2, "--attempts", 1)
    server.always |= {"o/b": answer, "login": "page"}
    rows = rows[:6]  # o/b in both parts
    failed = scrape(server, tmp_path, rows, *flags, ok=False)
    assert failed.returncode == EXIT_RESUME, failed.stderr
    assert f"2 rows are left ({status} 2; o/b: " in failed.stderr and "run the command again" in failed.stderr
    output = tmp_path / "out"
    assert not [path for path in output.rglob("*.jsonl") if b'"o/b"' in path.read_bytes()]

    recorded = scrape(server, tmp_path, rows, *flags, "--record-failures", output="recorded")
    assert recorded.returncode == 0
    assert statuses(tmp_path / "recorded") == {repo: {"ok" if repo != "o/b" else status} for repo in REPOS}

    del server.always["o/b"]
    before = len(server.log)
    scrape(server, tmp_path, rows, *flags)
    assert {request.repo for request in server.log[before:]} == {"o/b"}
    scrape(server, tmp_path, rows, output="undisturbed")
    assert files_of(output) == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("truthful", [0, 1, 2, 3])
@pytest.mark.parametrize("answer", ["429", "page", "half"])
def test_one_failure_is_overcome_within_the_run(server, rows, tmp_path, answer, truthful):
    server.answers["o/b"] += ["" for _ in range(truthful)] + [answer]
    scrape(server, tmp_path, rows)
    assert statuses(tmp_path / "out") == {repo: {"ok"} for repo in REPOS}


@pytest.mark.parametrize("answer", ["404", "410", "451"])
def test_a_repository_that_is_gone_is_asked_for_once(server, rows, tmp_path, answer):
    server.always["o/b"] = answer
    scrape(server, tmp_path, rows, "--part-rows", 100)
    assert statuses(tmp_path / "out")["o/b"] == {"repo_gone"}
    assert server.requests_for("o/b") == 1


def test_401_means_gone_where_others_need_no_login(server, rows, tmp_path):
    server.always["o/b"] = "401"
    scrape(server, tmp_path, rows)
    assert statuses(tmp_path / "out") == {repo: {"ok" if repo != "o/b" else "repo_gone"} for repo in REPOS}


def test_401_everywhere_is_no_repository_that_is_gone(server, rows, tmp_path):
    server.token = "needed"
    done = scrape(server, tmp_path, rows, ok=False)
    assert done.returncode == EXIT_RESUME
    assert "8 rows are left (refused 8; " in done.stderr and "asks for a login; set an access token" in done.stderr


def test_retry_after_pauses_all_workers(server, rows, tmp_path):
    server.answers["o/a"].append("429 Retry-After: 3")
    server.delay = 0.2
    scrape(server, tmp_path, rows, "--repositories-at-once", 2)
    refused = next(request.time for request in server.log if request.repo == "o/a")
    # What was running when the refusal came may end: two repositories, four requests each.
    during = [request for request in server.log if refused + 0.2 + 2 * 0.4 < request.time < refused + 2.9]
    assert not during and max(request.time for request in server.log) > refused + 3
    assert statuses(tmp_path / "out")["o/a"] == {"ok"}


def test_workers_and_rate_are_bounded(server, rows, tmp_path):
    server.delay = 0.3  # so that a repository takes longer than the half second until the next starts
    scrape(server, tmp_path, rows, "--part-rows", 100, "--repositories-at-once", 2, "--rate", 2)
    assert server.most_at_once == 2
    firsts: dict[str, float] = {}
    for request in server.log:
        firsts.setdefault(request.repo, request.time)
    starts = sorted(firsts.values())
    assert len(starts) == 4 and starts[-1] - starts[0] > 3 / 2 - 0.3


def test_server_that_keeps_failing_ends_the_run(server, rows, tmp_path):
    shorter = (
        "import runpy, sys; sys.argv = sys.argv[1:]; import megatron_ft.commits.scraper.pace as pace; "
        "pace.SHORTEST_PAUSE = pace.LONGEST_PAUSE = 0.01; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    server.always = dict.fromkeys(REPOS, "429")
    flags = ("--attempts", 100, "--repositories-at-once", 1)
    program, *args = map(str, command(server, tmp_path, rows, *flags))
    run = [sys.executable, "-c", shorter, str(ROOT / program), *args]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == EXIT_RESUME and "the server keeps failing (o/" in done.stderr, done.stderr
    assert 14 <= len(server.log) <= 16 and not list((tmp_path / "out").glob("part-*"))


def test_scratch_repository_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="git init failed .*; free disk space, or choose another --temp"):
        next(protocol.scrape(None, tmp_path / "file/0", "a/b", [], 1, lambda: None))


def test_a_finished_scrape_asks_for_nothing(server, rows, tmp_path):
    scrape(server, tmp_path, rows)
    files, asked = files_of(tmp_path / "out"), len(server.log)
    again = scrape(server, tmp_path, rows)
    assert len(server.log) == asked and files_of(tmp_path / "out") == files
    assert "8 rows of metadata, 8 scraped" in again.stderr and "0 requests in this run" in again.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: (rows[1:], []), "was begun with another input (metadata.jsonl); choose another directory"),
        (lambda rows: (rows, ["--format", "parquet"]), "was begun with --format jsonl, not parquet"),
    ],
)
def test_another_scrape_is_not_continued(server, rows, tmp_path, change, message):
    scrape(server, tmp_path, rows)
    other, flags = change(rows)
    assert message in one_error_line(scrape(server, tmp_path, other, *flags, ok=False))


def start(*args, **kwargs) -> subprocess.Popen:
    env = kwargs.pop("env", None)
    program, *flags = map(str, command(*args, **kwargs))
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
    )


def test_two_processes_never_write_one_output(server, rows, tmp_path):
    server.always["o/b"] = "hang"
    first = start(server, tmp_path, rows)
    try:
        wait_for(lambda: server.requests_for("o/b"))
        line = one_error_line(scrape(server, tmp_path, rows, ok=False))
        assert "another process is writing this file" in line
    finally:
        first.kill()
        first.communicate()


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number, text", [(signal.SIGINT, b"interrupted"), (signal.SIGTERM, b"terminated")])
def test_a_signal_ends_running_fetches_and_removes_their_repositories(server, rows, tmp_path, number, text):
    server.always["o/b"] = "hang"
    process = start(server, tmp_path, rows)
    wait_for(lambda: server.requests_for("o/b"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number and text in output and b"Traceback" not in output
    assert not list((tmp_path / "scratch").iterdir())
    assert not commands_with(str(tmp_path / "scratch"))


def commands_with(text: str) -> list[str]:
    """Command lines of running processes that contain the text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.slow
def test_twenty_kills_change_no_byte_and_fetch_nothing_twice(root, tmp_path):
    repos = [f"o/{i}" for i in range(20)]
    ids = {repo: make_repository(root / repo, numbered(2, salt=repo))[1:] for repo in repos}
    rows = [metadata(ids[repo][i], repo) for i in range(2) for repo in repos]
    flags = ("--part-rows", 15, "--repositories-at-once", 2)
    with serve(root) as server:
        scrape(server, tmp_path, rows, *flags, output="undisturbed")
        total = len(server.log)
    randomly = random.Random(7)
    complete: dict[tuple[str, str], int] = {}  # how much was asked when a kill found it complete
    with serve(root, delay=0.1) as server:
        for kill in range(20):
            process, asked = start(server, tmp_path, rows, *flags), len(server.log)
            if kill % 5:  # else while it starts
                until = asked + randomly.randint(1, 12)
                wait_for(lambda until=until: len(server.log) >= until)
            time.sleep(randomly.uniform(0, 0.3))
            assert process.poll() is None, "it finished too early to be killed twenty times"
            process.kill()
            process.communicate()
            for found in complete_on_disk(tmp_path / "out"):
                complete.setdefault(found, len(server.log))
        assert 5 < len(complete) < 40
        scrape(server, tmp_path, rows, *flags)
        for repo in repos:
            parts = {part for part, found in complete_on_disk(tmp_path / "out") if found == repo}
            if all((part, repo) in complete for part in parts):
                last = max(complete[part, repo] for part in parts)
                assert not [request for request in server.log[last:] if request.repo == repo], repo
        assert len(server.log) <= total + 20 * 2 * 4  # what was running when it was killed
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def complete_on_disk(output: Path) -> set[tuple[str, str]]:
    """Parts and repositories whose results are on disk: complete in a journal, or in a status."""
    found = set()
    for path in [*output.glob(".scrape/*.journal"), *output.glob("status/*.jsonl")]:
        pending = set()
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            if path.suffix == ".jsonl" or "complete" in row:
                found |= pending
                pending = set()
            if "repo" in row:
                pending.add((path.stem, row["repo"]))
        if path.suffix == ".jsonl":
            found |= pending
    return found


def test_the_token_reaches_the_server_and_nothing_else(server, rows, tmp_path):
    server.token = f"Basic {ENCODED}"
    server.delay = 0.1
    env = {**os.environ, "MIRROR_TOKEN": TOKEN, "GIT_TRACE_CURL": str(tmp_path / "trace"), "GIT_CURL_VERBOSE": "1"}
    lines: set[str] = set()
    files: set[bytes] = set()
    process = start(server, tmp_path, rows, "--token-variable", "MIRROR_TOKEN", env=env)
    watcher = threading.Thread(target=watch, args=(process, tmp_path, lines, files))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    assert process.returncode == 0, output
    assert {request.authorization for request in server.log} == {server.token}
    assert any("git" in line and "fetch" in line for line in lines)
    files |= {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for secret in (TOKEN, ENCODED):
        assert secret not in " ".join(lines) and secret.encode() not in output
        assert not [file for file in files if secret.encode() in file]


def watch(process: subprocess.Popen, tmp_path: Path, lines: set[str], files: set[bytes]) -> None:
    """Collect command lines, and the files of scratch repositories, while a process runs."""
    while process.poll() is None:
        lines |= set(commands_with(""))
        for directory, _, names in os.walk(tmp_path / "scratch"):
            for name in names:
                with suppress(OSError):  # it is already removed
                    files.add(Path(directory, name).read_bytes())


def test_the_token_of_github_is_not_sent_elsewhere(server, rows, tmp_path):
    scrape(server, tmp_path, rows, env={**os.environ, "GITHUB_TOKEN": TOKEN})
    assert {request.authorization for request in server.log} == {""}


def test_a_renamed_repository_is_found_where_it_went(server, rows, tmp_path):
    server.always["was/a"] = f"301 Location: {server.url}/o/a/info/refs?service=git-upload-pack"
    scrape(server, tmp_path, [row | {"repos": "was/a"} for row in rows if row["repos"] == "o/a"])
    assert statuses(tmp_path / "out") == {"was/a": {"ok"}}


def test_a_redirect_takes_the_token_nowhere_else(server, rows, root, tmp_path):
    with serve(root) as elsewhere:
        server.always["o/a"] = f"301 Location: {elsewhere.url}/o/a/info/refs?service=git-upload-pack"
        env = {**os.environ, "MIRROR_TOKEN": TOKEN}
        scrape(server, tmp_path, rows, "--token-variable", "MIRROR_TOKEN", env=env)
        assert not [request for request in elsewhere.log if request.authorization]
    assert statuses(tmp_path / "out") == {repo: {"ok" if repo != "o/a" else "repo_gone"} for repo in REPOS}


def test_a_rejected_token_ends_the_run(server, rows, tmp_path):
    server.token = "another"
    env = {**os.environ, "MIRROR_TOKEN": TOKEN}
    done = scrape(server, tmp_path, rows, "--token-variable", "MIRROR_TOKEN", ok=False, env=env)
    assert "the server rejects the token (HTTP 401)" in one_error_line(done) and TOKEN not in done.stderr
    assert not list((tmp_path / "out").glob("part-*"))
