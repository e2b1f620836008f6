"""A git server, asked by `git fetch`, and its failures as statuses.

One fetch is two HTTP requests, however many objects it asks for. The token reaches git through the
environment, as configuration: it is in no argument, URL, file or message. Git reports HTTP statuses
in words and Retry-After not at all, so its trace of headers is read; it never leaves this process,
and git removes credentials from it.
"""

import base64
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from megatron_ft.commits.git import git, git_environment
from megatron_ft.commits.scraper.pace import Stopped
from megatron_ft.commits.scraper.status import Status
from megatron_ft.errors import UserError

GITHUB = "https://github.com"
SETTINGS = (
    ("core.fsync", "none"),  # of scratch repositories, which do not survive a crash anyway
    ("credential.helper", ""),
    ("fetch.negotiationAlgorithm", "noop"),  # there is nothing to negotiate
    ("fetch.unpackLimit", "1"),
    ("gc.auto", "0"),  # it would still run while the directory is removed
    ("maintenance.auto", "false"),
    ("pack.threads", "1"),
    ("protocol.version", "2"),
)
OPTIONS = ("--quiet", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no", "--stdin")
MOVED = (301, 308)  # permanently, to where it is not followed; 302 may lead to a login page
POLL_SECONDS = 0.5
KEPT_LINES, KEPT_CHARACTERS = 40, 1000  # of git's messages
TRACE_LINE = re.compile(rb"\d\d:\d\d:\d\d\.\d+ ")
HEADER = re.compile(rb"<= Recv header:\s*(?:HTTP/[\d.]+ (\d{3})|retry-after:\s*(.*))", re.IGNORECASE)
NOT_OUR_REF = re.compile(r"not our ref ([0-9a-f]{40,64})")
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large")
GONE = re.compile(r"does not appear to be a git repository|repository '.*' (?:does not exist|not found)")
BLOCKED = re.compile(r"access to this repository has been disabled|repository (?:access blocked|unavailable)", re.I)
TOO_SLOW = re.compile(r"Operation too slow", re.IGNORECASE)


class FetchFailed(Exception):
    """A fetch that failed as a whole; `status` is that of every object it asked for.

    `login` is whether the server asked for a login; `retry_after` is in seconds.
    """

    def __init__(self, status: Status, reason: str, *, retry_after: float | None = None, login: bool = False):
        super().__init__(reason)
        self.status, self.retry_after, self.login = status, retry_after, login


class NotOurRef(Exception):
    """The server does not have the object `id`, and sent none of the others."""

    def __init__(self, id: str):
        super().__init__(id)
        self.id = id


class Server:
    """Where repositories are fetched from.

    `base_url` is followed by OWNER/NAME, which replaces {repo} if it contains that. A fetch may
    take `timeout` seconds and `max_bytes` of disk. Setting `stop` ends those that are running.
    """

    def __init__(self, base_url: str, token: str | None, timeout: float, max_bytes: int, stop: threading.Event):
        self.base_url, self.timeout, self.max_bytes, self.stop = base_url, timeout, max_bytes, stop
        self.requests, self._lock = 0, threading.Lock()
        scheme = urlsplit(base_url).scheme
        # Curl ends a transfer that stalls, even if this process was killed.
        settings = [*SETTINGS, ("http.lowSpeedLimit", "1"), ("http.lowSpeedTime", str(max(1, int(timeout))))]
        if token:
            # Not by GIT_ASKPASS: GitHub never asks where a repository is public, so the token, and
            # the limits that it raises, would not be used.
            root = base_url.split("{repo}")[0]
            login = base64.b64encode(f"x-access-token:{token}".encode()).decode()
            settings.append((f"http.{root}.extraHeader", f"Authorization: Basic {login}"))
            if urlsplit(base_url).hostname != urlsplit(GITHUB).hostname:
                # Git would send the header wherever a redirect leads. GitHub redirects renamed
                # repositories, and only to itself.
                settings.append(("http.followRedirects", "false"))
        trace = {"GIT_TRACE_CURL": "1", "GIT_TRACE_CURL_NO_DATA": "1", "GIT_TRACE_REDACT": "1"}
        self._environment = git_environment(settings, GIT_ALLOW_PROTOCOL=scheme, **trace)
        self.has_token = bool(token)

    def url(self, repo: str) -> str:
        """URL of OWNER/NAME."""
        if "{repo}" in self.base_url:
            return self.base_url.replace("{repo}", repo)
        return f"{self.base_url.rstrip('/')}/{repo}"

    def fetch(self, directory: Path, repo: str, ids: Sequence[str], *options: str) -> None:
        """Fetch objects into the bare repository `directory`.

        Raises NotOurRef if the server does not have one of them, FetchFailed for any other failure,
        Stopped if the run is stopping, and UserError if the disk is full.
        """
        wanted = directory / "wanted"
        wanted.write_text("".join(f"{id}\n" for id in ids), encoding="ascii")
        with open(wanted, "rb") as stdin:
            process = subprocess.Popen(
                git(directory, "fetch", *OPTIONS, *options, self.url(repo)),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        assert process.stderr is not None  # a pipe
        messages = _Messages(process.stderr)
        try:
            overrun = self._wait(messages, directory)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # git fetch has children of its own
            process.wait()
            messages.thread.join()
            process.stderr.close()
        with self._lock:
            self.requests += messages.responses
        if overrun:
            raise overrun
        if process.returncode:
            raise _failure(messages, directory)

    def _wait(self, messages: "_Messages", directory: Path) -> FetchFailed | None:
        """Wait for the end of git's messages; the reason if the fetch must be ended before."""
        deadline = time.monotonic() + self.timeout
        ended = False
        while not ended:
            ended = messages.ended(POLL_SECONDS)
            if self.stop.is_set():
                raise Stopped
            if (size := _size(directory)) > self.max_bytes:
                return FetchFailed(Status.TOO_LARGE, f"{size:,} bytes, more than {self.max_bytes:,}")
            if not ended and time.monotonic() > deadline:
                return FetchFailed(Status.TIMEOUT, f"no end after {self.timeout:g} s")
        return None


class _Messages:
    """What git prints on stderr, read by a thread: its messages, and facts from its trace."""

    def __init__(self, stream: IO[bytes]):
        self.lines: list[str] = []
        self.http_status: int | None = None  # of the last response
        self.retry_after: float | None = None
        self.responses = 0
        self._stream = stream
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def ended(self, seconds: float) -> bool:
        """Whether git and its children have closed stderr, after waiting for up to `seconds`."""
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _read(self) -> None:
        while line := self._stream.readline(1 << 13):
            if not TRACE_LINE.match(line):
                self.lines = [*self.lines[1 - KEPT_LINES :], line.decode("utf-8", "replace").strip()[:KEPT_CHARACTERS]]
            elif found := HEADER.search(line):
                if found[1] is None:
                    self.retry_after = _seconds(found[2].decode("ascii", "replace").strip())
                elif not found[1].startswith(b"1"):
                    self.http_status, self.retry_after = int(found[1]), None
                    self.responses += 1


def _failure(messages: _Messages, directory: Path) -> Exception:
    """What a failed fetch means. Whatever is not known for certain is a SERVER_ERROR, which is
    retried."""
    local = "\n".join(line for line in messages.lines if not line.startswith("remote:"))
    text = "\n".join(messages.lines)
    reason = next((line for line in messages.lines if line.startswith(("fatal:", "error:"))), "git fetch failed")
    status = messages.http_status
    if DISK_FULL.search(local):
        return UserError(
            f"{directory.parent}: the disk is full; free disk space, or choose another --temporary-directory"
        )
    if found := NOT_OUR_REF.search(local):
        return NotOurRef(found[1])
    if status == 401:
        return FetchFailed(Status.REPO_GONE, reason, login=True)
    if (
        status in (*MOVED, 404, 410, 451)
        or (status == 403 and BLOCKED.search(text))
        or (status is None and GONE.search(local))
    ):
        return FetchFailed(Status.REPO_GONE, reason)
    if status in (403, 429):
        return FetchFailed(Status.REFUSED, f"HTTP {status}", retry_after=messages.retry_after)
    if TOO_SLOW.search(local):
        return FetchFailed(Status.TIMEOUT, reason)
    return FetchFailed(Status.SERVER_ERROR, reason, retry_after=messages.retry_after)


def _seconds(retry_after: str) -> float | None:
    """Seconds from now that a Retry-After header asks for; None if it is neither form of it.

    >>> _seconds("120"), _seconds("soon")
    (120.0, None)
    """
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _size(directory: Path) -> int:
    """Bytes of the packs of a bare repository, the one being received included."""
    size = 0
    for folder in (directory / "objects", directory / "objects/pack"):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # git renames them
                    size += entry.stat().st_size
    return size
