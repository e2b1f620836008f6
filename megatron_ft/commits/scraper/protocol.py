"""Many commits of one repository in four requests, or in two if the ids of the blobs are known.

    fetch of the commits and trees, without blobs     2 requests
    which file changed from what to what              none: `git diff-tree` on what came
    fetch of the blobs                                2 requests
    their contents                                    none: `git cat-file` on what came

`git fetch --depth 2` for every commit takes two or three requests each.
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from megatron_ft.commits.git import REGULAR_FILES, BlobReader, first_line, git, git_environment, split_at_nul
from megatron_ft.commits.scraper.server import FetchFailed, NotOurRef, Server
from megatron_ft.commits.scraper.status import Status
from megatron_ft.errors import UserError

MAX_IDS = 1000  # per fetch
LFS = b"version https://git-lfs.github.com/spec/"


def offline() -> dict[str, str]:
    """The environment of commands that read what was fetched: git must not fetch the rest, one by
    one."""
    return git_environment(GIT_ALLOW_PROTOCOL="none", GIT_NO_LAZY_FETCH="1")


@dataclass(frozen=True)
class Wanted:
    """One row of metadata to scrape. The ids of the blobs are "" if they are not known."""

    index: int  # of the row in its part
    commit: str
    old_file: str
    new_file: str
    old_blob: str = ""
    new_blob: str = ""


class Result(NamedTuple):
    """What became of a row, by its index; the contents if it is OK."""

    row: int
    status: Status
    old_contents: str = ""
    new_contents: str = ""


class Blobs(NamedTuple):
    """The ids of a file's content before and after a commit."""

    old: str
    new: str


def scrape(
    server: Server, directory: Path, repo: str, rows: Sequence[Wanted], max_file_bytes: int, pause: Callable[[], None]
) -> Iterator[Result]:
    """Fetch at most MAX_IDS rows of one repository; their results in any order.

    `directory` is for a scratch repository. `pause` is called before a fetch is repeated. Raises
    what Server.fetch raises, except NotOurRef.
    """
    init = ["git", "init", "--quiet", "--bare", "--template=", str(directory)]
    done = subprocess.run(init, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=git_environment())
    if done.returncode:
        raise UserError(
            f"{directory}: git init failed ({first_line(done.stderr)}); free disk space, or choose another "
            "--temporary-directory"
        )
    blobs: dict[int, Blobs] = {}
    if all(row.old_blob and row.new_blob for row in rows):
        for row in rows:
            if row.old_blob == row.new_blob:
                yield Result(row.index, Status.NOT_MODIFIED)
            else:
                blobs[row.index] = Blobs(row.old_blob, row.new_blob)
    else:
        commits = _unique(row.commit for row in rows)
        _fetch_existing(server, directory, repo, commits, pause, "--filter=blob:none", "--depth", "2")
        changes = Changes(directory, rows)
        for row in rows:
            change = changes.of(row)
            if isinstance(change, Status):
                yield Result(row.index, change)
            else:
                blobs[row.index] = change
    ids = _unique(id for pair in blobs.values() for id in pair)
    for start in range(0, len(ids), MAX_IDS):
        _fetch_existing(server, directory, repo, ids[start : start + MAX_IDS], pause)
    wanted = set(ids)
    sizes = {id: size for id, size in _listed(directory, "blob") if id in wanted}
    with BlobReader(directory, offline()) as reader:
        for index, pair in blobs.items():
            yield _contents(index, pair, sizes, reader, max_file_bytes)


def _contents(index: int, pair: Blobs, sizes: dict[str, int], reader: BlobReader, max_file_bytes: int) -> Result:
    if not sizes.keys() >= set(pair):
        return Result(index, Status.MISSING_BLOB)
    if max(sizes[id] for id in pair) > max_file_bytes:
        return Result(index, Status.TOO_LARGE)
    texts = []
    for id in pair:
        data = reader.read(id, max_file_bytes)
        assert data is not None  # not too large
        if data.startswith(LFS):
            return Result(index, Status.LFS_POINTER)
        if b"\0" in data:
            return Result(index, Status.BINARY)
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            return Result(index, Status.NOT_UTF8)
    return Result(index, Status.OK, *texts)


def _fetch_existing(
    server: Server, directory: Path, repo: str, ids: list[str], pause: Callable[[], None], *options: str
) -> None:
    """Fetch the objects that the server has. A fetch with some that it does not have fails as a
    whole and names one of them, so that one is taken out and the fetch repeated: as often as there
    are unknown objects."""
    # An id of zeros stands for a file that does not exist, and git does not ask for it.
    left = [id for id in ids if id.strip("0")]
    while left:
        try:
            server.fetch(directory, repo, left, *options)
        except NotOurRef as unknown:
            if unknown.id not in left:
                reason = f"the server does not have {unknown.id}, which was not asked for"
                raise FetchFailed(Status.SERVER_ERROR, reason) from None
            left.remove(unknown.id)
            if left:
                pause()
        else:
            # The commits at the border of a shallow fetch have no parents in git's view, which is
            # wrong for those among them that another fetch brings with their parents.
            (directory / "shallow").unlink(missing_ok=True)
            return


def _unique(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(ids))


def _listed(directory: Path, kind: str) -> Iterator[tuple[str, int]]:
    """The objects of one type in the repository: id and size in bytes."""
    batch = git(directory, "cat-file", "--batch-all-objects", "--batch-check", "--unordered")
    with _reading(batch) as lines:
        for line in lines:
            id, found, size = line.decode("ascii").split()
            if found == kind:
                yield id, int(size)


class Changes:
    """What commits did to files, by one `git diff-tree` with the first parent of each."""

    def __init__(self, directory: Path, rows: Sequence[Wanted]):
        self._entries: dict[tuple[str, str], str] = {}  # of the raw diff, by commit and path
        self._present = {id for id, _ in _listed(directory, "commit")}
        wanted = _unique(row.commit for row in rows if row.commit in self._present)
        self._parents = _first_parents(directory, wanted) if wanted else {}
        pairs = [f"{id} {parent}" for id, parent in self._parents.items() if parent in self._present]
        if pairs:
            self._read(directory, rows, pairs)

    def _read(self, directory: Path, rows: Sequence[Wanted], pairs: list[str]) -> None:
        paths = {(row.commit, path) for row in rows for path in (row.old_file, row.new_file)}
        options = ("--stdin", "-r", "--raw", "--no-renames", "-z", "--no-abbrev", "--format=%x00%H%x00")
        with _reading(git(directory, "diff-tree", *options), pairs) as stream:
            fields, commit = split_at_nul(stream), ""
            for field in fields:
                field = field.strip("\n")
                if field.startswith(":"):
                    path = next(fields, "")
                    if (commit, path) in paths:
                        self._entries[commit, path] = field
                elif field:
                    commit = field

    def of(self, row: Wanted) -> Blobs | Status:
        """The blobs of the row's file; a status if its commit did not modify a regular file."""
        if row.commit not in self._present:
            return Status.COMMIT_GONE
        parent = self._parents[row.commit]
        if parent is None:
            return Status.NO_PARENT
        if parent not in self._present:
            return Status.COMMIT_GONE
        before, after = (self._entries.get((row.commit, path)) for path in (row.old_file, row.new_file))
        if before is None or after is None:
            return Status.NOT_MODIFIED
        old_mode, _, old_blob, _, old_status = before[1:].split()
        _, new_mode, _, new_blob, new_status = after[1:].split()
        if old_status == "A" or new_status == "D" or old_blob == new_blob:
            return Status.NOT_MODIFIED
        if old_mode not in REGULAR_FILES or new_mode not in REGULAR_FILES:
            return Status.SYMLINK_OR_SUBMODULE
        return Blobs(old_blob, new_blob)


def _first_parents(directory: Path, commits: list[str]) -> dict[str, str | None]:
    """The first parent of each commit; None of the first commit of a history."""
    with _reading(git(directory, "rev-list", "--no-walk=unsorted", "--parents", "--stdin"), commits) as lines:
        ids = [line.decode("ascii").split() for line in lines]
    return {id: next(iter(parents), None) for id, *parents in ids}


@contextmanager
def _reading(command: list[str], lines: Sequence[str] = ()) -> Iterator[IO[bytes]]:
    """The output of a git command that reads a scratch repository, with lines as its input.
    FetchFailed if it fails: what the server sent is then incomplete."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write("".join(f"{line}\n" for line in lines).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=offline()
        )
    assert process.stdout is not None  # a pipe
    try:
        yield process.stdout
    finally:
        process.stdout.close()
        status = process.wait()
    if status:
        raise FetchFailed(Status.SERVER_ERROR, "the objects that the server sent are incomplete")
