"""Extract the commits of a local git repository that modified exactly one text file, as JSONL rows.

    python dataset/git_commits.py --repo ~/src/project --output commits.jsonl

Rows have CommitPack's schema (commit, old_file, new_file, old_contents, new_contents, subject,
message, lang, license, repos), oldest commit first. Merges, renames, binary files, symbolic links
and commits that touch a second file are skipped. dataset/commits_to_jsonl.py turns the rows into
training rows.

A repository without usable history (a tarball, a shallow clone, fewer rows than --min-rows) is an
error. With --fallback FILE the rows of FILE are written instead and the reason is printed.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from megatron_ft.commits.languages import language_of
from megatron_ft.commits.licenses import UNKNOWN, license_of
from megatron_ft.commits.row import CommitRow
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.printable import printable
from megatron_ft.progress import Progress

REGULAR_FILES = ("100644", "100755")  # git's file modes; others are symbolic links and submodules
LICENSE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)", re.IGNORECASE)
# NUL-terminated id, subject and message, each commit's raw diff after them.
LOG_FORMAT = "--format=%x00%H%x00%s%x00%B%x00"


@dataclass(frozen=True)
class Commit:
    """A commit that modified one regular file, with the file's blob ids before and after."""

    id: str
    subject: str
    message: str
    path: str
    old_blob: str
    new_blob: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--repo", type=Path, default=".", metavar="DIR", help="working tree or bare repository; it is only read")
    add("--output", required=True, metavar="FILE", help="JSONL file to write, .gz and .zst compressed; - for stdout")
    add("--rev", default="HEAD", help="branch, tag or range of commits such as v1.0..main, as for git log")
    add("--max-rows", type=int, metavar="N", help="stop after N rows (default: no limit)")
    add("--max-file-bytes", type=int, default=1 << 20, metavar="N", help="skip files larger than N bytes")
    add("--license", help="license to write in every row (default: detected from the repository's license file)")
    add("--min-rows", type=int, default=1, metavar="N", help="treat fewer than N rows as no history")
    add("--fallback", type=Path, metavar="FILE", help="rows to write if there is no history (default: an error)")
    args = parser.parse_args(argv)
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max-rows {args.max_rows}: must be at least 1; omit it for no limit")
    if args.fallback and args.fallback.resolve() == Path(args.output).resolve():
        raise UserError(f"--output {args.output}: would overwrite the --fallback file; choose another name")
    if not args.repo.is_dir():
        raise UserError(f"--repo {args.repo}: directory not found; give a local git repository")
    return args


def main() -> None:
    args = parse_args()
    reason = why_no_history(args.repo)
    if reason is None:
        with OutputFile(args.output) as output, writing(args.output):
            count = write_rows(args, output)
            if count >= args.min_rows:
                output.commit()
                print(f"{count:,} single-file commits of {args.repo} -> {args.output}", file=sys.stderr)
                return
        reason = f"{args.repo} has {count} single-file commits, fewer than --min-rows {args.min_rows}"
    if args.fallback is None:
        raise UserError(
            f"{reason}; give a complete clone (git fetch --unshallow completes a shallow one), a lower --min-rows, "
            "or --fallback FILE with rows to use instead"
        )
    write_fallback(args, reason)


def why_no_history(repo: Path) -> str | None:
    """Why the repository has no commits to walk; None if it has some."""
    if shutil.which("git") is None:
        raise UserError("git is not installed, or not in PATH; install it, or load its module")
    done = subprocess.run(git(repo, "rev-parse", "--is-shallow-repository"), capture_output=True)
    if done.returncode:
        return f"{repo} is not a readable git repository ({first_line(done.stderr)})"
    if done.stdout.strip() == b"true":
        return f"{repo} is a shallow clone"
    if subprocess.run(git(repo, "rev-parse", "--verify", "--quiet", "HEAD"), capture_output=True).returncode:
        return f"{repo} has no commits yet"
    return None


def write_fallback(args: argparse.Namespace, reason: str) -> None:
    """Copy the --fallback rows to the output and print why."""
    try:
        rows = args.fallback.read_bytes()
    except OSError as error:
        raise UserError(f"{reason}, and --fallback {args.fallback} cannot be read ({error.strerror})") from error
    with OutputFile(args.output) as output, writing(args.output):
        output.write(rows)
        output.commit()
    count = rows.count(b"\n")
    print(printable(f"{reason}: using the {count} rows of {args.fallback} instead -> {args.output}"), file=sys.stderr)


def write_rows(args: argparse.Namespace, output: OutputFile) -> int:
    """Write one row per usable commit; returns the number of rows."""
    count = 0
    repos = name_of(args.repo)
    with BlobReader(args.repo) as blobs, Progress("commits", None, " commits") as progress:
        license = args.license or find_license(args.repo, blobs)
        for commit in single_file_commits(args.repo, args.rev):
            progress.update(1)
            old, new = (blobs.text(blob, args.max_file_bytes) for blob in (commit.old_blob, commit.new_blob))
            if old is None or new is None:
                continue
            row = CommitRow(
                commit=commit.id,
                old_file=commit.path,
                new_file=commit.path,
                old_contents=old,
                new_contents=new,
                subject=commit.subject,
                message=commit.message,
                lang=language_of(commit.path),
                license=license,
                repos=repos,
            )
            output.write(row.to_json())
            count += 1
            if count == args.max_rows:
                break
    return count


def git(repo: Path, *command: str) -> list[str]:
    """Command line of a git command in `repo`, its log messages in UTF-8."""
    return ["git", "-C", str(repo), "-c", "i18n.logOutputEncoding=UTF-8", *command]


def single_file_commits(repo: Path, rev: str) -> Iterator[Commit]:
    """Commits of `rev`, oldest first, that modified one regular file and nothing else.

    Raises UserError if git log fails, such as for an unknown revision.
    """
    options = ("--reverse", "--no-merges", "--raw", "-z", "--no-abbrev", "--no-renames", LOG_FORMAT)
    log = git(repo, "log", rev, *options, "--")
    # Warnings go to a file: a pipe that nobody reads would stop git.
    with tempfile.TemporaryFile() as errors, subprocess.Popen(log, stdout=subprocess.PIPE, stderr=errors) as process:
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
                    yield from single_change(header, changes)
                    header, changes = (field, next(fields, ""), next(fields, "")), []
            if process.wait():  # the last commit may be truncated
                errors.seek(0)
                raise UserError(f"--rev {rev}: git log failed ({first_line(errors.read())})")
            yield from single_change(header, changes)
        finally:
            process.kill()


def single_change(header: tuple[str, str, str] | None, changes: list[tuple[str, str]]) -> Iterator[Commit]:
    """The commit, if its raw diff has one entry and that entry modifies a regular file.

    `header` is (id, subject, message). A raw diff entry is (":oldmode newmode oldblob newblob
    status", path).
    """
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

    def __init__(self, repo: Path):
        self._repo, pipe = repo, subprocess.PIPE
        self._process = subprocess.Popen(
            git(repo, "cat-file", "--batch"), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def text(self, id: str, max_bytes: int) -> str | None:
        """Text of a blob; None if it is larger than `max_bytes`, or binary: contains a NUL byte or
        is not UTF-8. UserError if git cannot read it."""
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
        data = self._replies.read(size + 1)[:-1]
        if b"\0" in data:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

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
    listed = subprocess.run(git(repo, "ls-tree", "-z", "HEAD"), capture_output=True).stdout
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
    """OWNER/NAME from the URL of the remote `origin`, or the directory's name without one."""
    config = subprocess.run(git(repo, "config", "--get", "remote.origin.url"), capture_output=True)
    url = config.stdout.decode("utf-8", "replace").strip()
    match = re.search(r"([^/:@]+/[^/:@]+?)(?:\.git)?/?$", url) if "://" in url or "@" in url else None
    return match[1] if match else repo.resolve().name


if __name__ == "__main__":
    run_program(main)
