"""Git repositories, read by git's own commands: their commits, files, license and name.

Every command is a list of arguments, never a shell's line, and runs in `git_environment()`: no
configuration of the user or the system, no question on the terminal, messages in English.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_ft.commits.licenses import UNKNOWN, license_of
from megatron_ft.errors import UserError

REGULAR_FILES = ("100644", "100755")  # git's file modes; others are symbolic links and submodules
LICENSE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)", re.IGNORECASE)
# NUL-terminated id, subject and message, each commit's raw diff after them.
LOG_FORMAT = "--format=%x00%H%x00%s%x00%B%x00"
# Variables that find git's programs and certificates, or bound where it looks for a repository.
KEPT = re.compile(r"GIT_(CEILING_DIRECTORIES|DISCOVERY_ACROSS_FILESYSTEM|EXEC_PATH|(PROXY_)?SSL_\w+)")
NO_HOME = "/dev/null"  # holds no .gitconfig and no .netrc


def git(repo: Path, *command: str) -> list[str]:
    """Command line of a git command in `repo`, its log messages in UTF-8."""
    return ["git", "-C", str(repo), "-c", "i18n.logOutputEncoding=UTF-8", *command]


def run_git(repo: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a short git command in `repo` and capture its output."""
    return subprocess.run(git(repo, *command), capture_output=True, env=git_environment())


def git_environment(settings: Sequence[tuple[str, str]] = (), **variables: str) -> dict[str, str]:
    """The environment of every git command: this process's, without what changes git's behavior.

    The user's list of safe directories stays in effect: without it, git refuses to read a mirror
    that somebody else owns. `settings` are names and values of git's configuration; `variables` are
    added to the environment.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or KEPT.fullmatch(name)}
    for name in ("LANGUAGE", "SSH_ASKPASS", "XDG_CONFIG_HOME"):
        kept.pop(name, None)
    return {
        **kept,
        "HOME": NO_HOME,
        "LC_ALL": "C",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        **config_variables([*(("safe.directory", directory) for directory in _safe_directories()), *settings]),
        **variables,
    }


def config_variables(settings: list[tuple[str, str]]) -> dict[str, str]:
    """Environment variables that set git's configuration (names and values), without an argument.

    >>> config_variables([("gc.auto", "0")])
    {'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': 'gc.auto', 'GIT_CONFIG_VALUE_0': '0'}
    """
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for i, (name, value) in enumerate(settings):
        variables |= {f"GIT_CONFIG_KEY_{i}": name, f"GIT_CONFIG_VALUE_{i}": value}
    return variables


@functools.cache
def _safe_directories() -> tuple[str, ...]:
    """Directories that the user or the system declared safe although somebody else owns them."""
    command = ["git", "config", "--path", "-z", "--get-all", "safe.directory"]
    listed = subprocess.run(command, capture_output=True, cwd="/").stdout
    return tuple(map(os.fsdecode, listed.split(b"\0")[:-1]))


@dataclass(frozen=True)
class Commit:
    """A commit that modified one regular file, with the file's blob ids before and after."""

    id: str
    subject: str
    message: str
    path: str
    old_blob: str
    new_blob: str


def single_file_commits(repo: Path, rev: str, *, modified_only: bool = False) -> Iterator[Commit]:
    """Commits of `rev`, oldest first, that modified one regular file and nothing else.

    With `modified_only`, files that a commit added, deleted or renamed are not counted: it modified
    one regular file and no other, as in CommitPack. Raises UserError if git log fails, such as for
    an unknown revision.
    """
    options = ("--reverse", "--no-merges", "--raw", "-z", "--no-abbrev", "--no-renames", LOG_FORMAT)
    log = git(repo, "log", rev, *options, "--")
    # Warnings go to a file: a pipe that nobody reads would stop git.
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(log, stdout=subprocess.PIPE, stderr=errors, env=git_environment()) as process,
    ):
        assert process.stdout is not None  # a pipe
        try:
            fields = split_at_nul(process.stdout)
            header: tuple[str, str, str] | None = None
            changes: list[tuple[str, str]] = []
            for field in fields:
                field = field.strip("\n")
                if field.startswith(":"):
                    changes.append((field, next(fields, "")))
                elif field:  # the id of the next commit, followed by its subject and message
                    yield from single_change(header, changes, modified_only)
                    header, changes = (field, next(fields, ""), next(fields, "")), []
            if process.wait():  # the last commit may be truncated
                errors.seek(0)
                raise UserError(f"--rev {rev}: git log failed ({first_line(errors.read())})")
            yield from single_change(header, changes, modified_only)
        finally:
            process.kill()


def single_change(
    header: tuple[str, str, str] | None, changes: list[tuple[str, str]], modified_only: bool = False
) -> Iterator[Commit]:
    """The commit, if its raw diff has one entry and that entry modifies a regular file.

    `header` is (id, subject, message). A raw diff entry is (":oldmode newmode oldblob newblob
    status", path). With `modified_only`, entries that add or delete a file are ignored.
    """
    if modified_only:
        changes = [change for change in changes if change[0][-1] not in "AD"]
    if header is None or len(changes) != 1:
        return
    (id, subject, message), (entry, path) = header, changes[0]
    old_mode, new_mode, old_blob, new_blob, status = entry[1:].split()
    if status == "M" and old_mode in REGULAR_FILES and new_mode in REGULAR_FILES and old_blob != new_blob:
        yield Commit(id, subject.strip(), message.strip(), path, old_blob, new_blob)


def first_line(stderr: bytes) -> str:
    """The first line of what git printed, without its hints."""
    return (stderr.decode("utf-8", "replace").splitlines() or ["git failed"])[0]


def split_at_nul(stream: IO[bytes]) -> Iterator[str]:
    """The NUL-terminated fields of a stream; bytes that are not UTF-8 become U+FFFD."""
    rest = b""
    while chunk := stream.read(1 << 16):
        *fields, rest = (rest + chunk).split(b"\0")
        for field in fields:
            yield field.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


class BlobReader:
    """Reads files of a repository through one long-running `git cat-file --batch` process."""

    def __init__(self, repo: Path, environment: Mapping[str, str] | None = None):
        self._repo, pipe = repo, subprocess.PIPE
        self._process = subprocess.Popen(
            git(repo, "cat-file", "--batch"),
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            env=environment or git_environment(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def text(self, id: str, max_bytes: int) -> str | None:
        """Text of a blob; None if it is larger than `max_bytes`, or binary: contains a NUL byte or
        is not UTF-8. UserError if git cannot read it."""
        data = self.read(id, max_bytes)
        if data is None or b"\0" in data:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    def read(self, id: str, max_bytes: int) -> bytes | None:
        """Content of a blob; None if it is larger than `max_bytes`. UserError if git cannot read
        it."""
        try:
            self._requests.write(id.encode() + b"\n")
            self._requests.flush()
            reply = self._replies.readline()
        except BrokenPipeError:
            reply = b""
        header = reply.split()
        if len(header) != 3:  # "<id> missing" instead of "<id> blob <size>"
            raise UserError(
                f"{self._repo}: git cannot read {id}; check the repository with git fsck, and complete a partial clone "
                "with git fetch --refetch --no-filter"
            )
        size = int(header[2])
        if size > max_bytes:
            self._skip(size + 1)
            return None
        return self._replies.read(size + 1)[:-1]

    def _skip(self, size: int) -> None:
        while size and (skipped := self._replies.read(min(size, 1 << 20))):
            size -= len(skipped)

    def __enter__(self) -> "BlobReader":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        self._process.wait()


def find_license(repo: Path, blobs: BlobReader) -> str:
    """License of the repository by its license files at HEAD; "unknown" if none is recognized."""
    listed = run_git(repo, "ls-tree", "-z", "HEAD").stdout
    blobs_by_name = {}  # by id, since a name may hold a line break
    for entry in filter(None, listed.decode("utf-8", "replace").split("\0")):
        (_, kind, id), name = entry[: entry.index("\t")].split(), entry[entry.index("\t") + 1 :]
        if kind == "blob" and LICENSE_FILE.match(name):
            blobs_by_name[name] = id
    for _, id in sorted(blobs_by_name.items()):
        license = license_of(blobs.text(id, 1 << 20) or "")
        if license != UNKNOWN:
            return license
    return UNKNOWN


def name_of(repo: Path) -> str:
    """OWNER/NAME from the URL of the remote `origin`, or the directory's name without one. A comma,
    which separates names in a row, is written as an underscore."""
    config = run_git(repo, "config", "--get", "remote.origin.url")
    url = config.stdout.decode("utf-8", "replace").strip()
    match = re.search(r"([^/:@]+/[^/:@]+?)(?:\.git)?/?$", url) if "://" in url or "@" in url else None
    return (match[1] if match else repo.resolve().name).replace(",", "_")
