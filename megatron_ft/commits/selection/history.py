"""The history and the files of one repository as records of github_repos' tables.

Only trees are read, and one license file: no file is compared, so renames are not looked for. A
renamed file is one deleted and one added file, which the stages leave out just as well.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.commits.git import (
    REGULAR_FILES,
    BlobReader,
    find_license,
    first_line,
    git,
    git_environment,
    name_of,
    run_git,
    split_at_nul,
)
from megatron_ft.commits.languages import listed_language
from megatron_ft.errors import UserError

# Of a commit, in this order; its raw diff follows. Dates are "seconds +hhmm".
FIELDS = ("%H", "%T", "%P", "%an", "%ad", "%cn", "%cd", "%s", "%B")
LOG_FORMAT = "--format=%x00" + "%x00".join(FIELDS) + "%x00"
MAX_DIFFERENCE = 5000  # files per commit; what changed more is marked as truncated
NO_MODE = "000000"
MAX_SECONDS = 253402300799  # the end of the year 9999
# As github/linguist: files of others, and languages that are data or prose, do not count.
VENDORED = re.compile(
    r"(^|/)(node_modules|bower_components|vendor|vendors|third[-_]?party|external|extern|deps|dist|\.yarn|Godeps|Pods)/"
    r"|(^|/)(docs?|documentation)/|\.min\.(js|css)$",
    re.IGNORECASE,
)
DATA_AND_PROSE = frozenset(
    ("AsciiDoc", "CSV", "Diff", "Gettext Catalog", "INI", "JSON", "JSON5", "JSONLD", "Markdown", "Org", "Pod", "RDoc",
     "reStructuredText", "RMarkdown", "SVG", "Text", "Textile", "TOML", "Unity3D Asset", "XML", "YAML")
)  # fmt: skip


@dataclass(frozen=True)
class Repository:
    """A repository and what the walk found: `status` is ok, empty, shallow or unreadable."""

    path: Path
    status: str
    name: str = ""
    license: str = ""
    languages: list[dict[str, Any]] = field(default_factory=list)  # name and bytes, most bytes first
    reason: str = ""  # why it is not ok


def inspect(path: Path) -> Repository:
    """The status of a repository, and if it is ok, its name, license and languages."""
    done = run_git(path, "rev-parse", "--is-shallow-repository", "--show-prefix")
    if done.returncode:
        return Repository(path, "unreadable", reason=first_line(done.stderr))
    shallow, *prefix = done.stdout.split()
    if prefix:
        return Repository(path, "unreadable", reason="a directory inside a repository, not its root")
    if shallow == b"true":
        return Repository(path, "shallow", reason="a shallow clone; git fetch --unshallow completes it")
    if run_git(path, "rev-parse", "--verify", "--quiet", "HEAD").returncode:
        if not run_git(path, "for-each-ref", "--count=1").stdout:
            return Repository(path, "empty", reason="no commits yet")
        missing = first_line(run_git(path, "symbolic-ref", "HEAD").stdout) or "a commit that is missing"
        reason = f"HEAD is {missing}, which does not exist; git symbolic-ref HEAD refs/heads/BRANCH selects another"
        return Repository(path, "empty", reason=reason)
    if run_git(path, "config", "--get-regexp", r"^remote\..*\.partialclonefilter$").returncode == 0:
        reason = "a partial clone; git fetch --refetch --no-filter completes it"
        return Repository(path, "unreadable", reason=reason)
    try:
        with BlobReader(path) as blobs:
            license = find_license(path, blobs)
        return Repository(path, "ok", full_name(path), license, languages(path))
    except UserError as error:
        return Repository(path, "unreadable", reason=str(error))


def full_name(repo: Path) -> str:
    """OWNER/NAME from the remote's URL, else from the last two parts of the path."""
    name = name_of(repo)
    path = repo.resolve()
    return name if "/" in name else f"{path.parent.name}/{path.name.removesuffix('.git')}".replace(",", "_")


def languages(repo: Path) -> list[dict[str, Any]]:
    """Languages of the files at HEAD with the bytes of each, most first, roughly as GitHub counts:
    without files of others, documentation, data and prose. UserError if git cannot list them."""
    done = run_git(repo, "ls-tree", "-r", "-l", "-z", "HEAD")
    if done.returncode:
        raise UserError(f"{repo}: git cannot list the files of HEAD ({first_line(done.stderr)})")
    total: Counter[str] = Counter()
    for entry in filter(None, done.stdout.decode("utf-8", "replace").split("\0")):
        header, path = entry.split("\t", 1)
        mode, _, _, size = header.split()
        language = listed_language(path)
        if mode in REGULAR_FILES and language and language not in DATA_AND_PROSE and not VENDORED.search(path):
            total[language] += int(size)
    return [{"name": name, "bytes": size} for name, size in sorted(total.items(), key=lambda item: (-item[1], item[0]))]


def commits(repo: Path, name: str) -> Iterator[dict[str, Any]]:
    """The commits that HEAD reaches, as records of the table `commits` with `name` as their only
    repository. Merges have no difference. Raises UserError if git log fails."""
    options = ("--raw", "-z", "--no-abbrev", "--no-renames", "--date=raw", "--no-show-signature", LOG_FORMAT)
    log = git(repo, "-c", "log.showRoot=true", "log", "HEAD", *options, "--")
    # Warnings go to a file: a pipe that nobody reads would stop git.
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(log, stdout=subprocess.PIPE, stderr=errors, env=git_environment()) as process,
    ):
        assert process.stdout is not None  # a pipe
        try:
            fields = split_at_nul(process.stdout)
            record: dict[str, Any] | None = None
            for found in fields:
                found = found.strip("\n")
                if found.startswith(":"):
                    assert record is not None  # a diff follows its commit
                    _add_change(record, found, next(fields, ""))
                elif found:  # the id of the next commit
                    if record is not None:
                        yield record
                    record = _record(name, [found, *(next(fields, "") for _ in FIELDS[1:])])
            if process.wait():  # the last commit may be truncated
                errors.seek(0)
                raise UserError(f"{repo}: git log failed ({first_line(errors.read())})")
            if record is not None:
                yield record
        finally:
            process.kill()


def _record(name: str, fields: list[str]) -> dict[str, Any]:
    id, tree, parents, author, authored, committer, committed, subject, message = fields
    return {
        "commit": id,
        "tree": tree,
        "parent": parents.split(),
        "author": _person(author, authored),
        "committer": _person(committer, committed),
        "subject": subject,
        "message": message,
        "repo_name": [name],
        "difference": [],
        "difference_truncated": False,
    }


def _person(name: str, date: str) -> dict[str, Any]:
    """Name and time of an author or committer; no e-mail address, which no stage reads."""
    seconds, _, zone = date.partition(" ")
    known = seconds.isdecimal() and int(seconds) <= MAX_SECONDS
    minutes = int(zone[1:3]) * 60 + int(zone[3:5]) if re.fullmatch(r"[+-]\d{4}", zone, re.ASCII) else 0
    return {
        "name": name,
        "time_sec": int(seconds) if known else None,
        "tz_offset": -minutes if zone.startswith("-") else minutes,
    }


def _add_change(record: dict[str, Any], entry: str, path: str) -> None:
    """Append an entry of a raw diff, ":oldmode newmode oldblob newblob status", to the record."""
    if len(record["difference"]) == MAX_DIFFERENCE:
        record["difference_truncated"] = True
        return
    old_mode, new_mode, old_blob, new_blob, _ = entry[1:].split()
    old, new = old_mode != NO_MODE, new_mode != NO_MODE
    record["difference"].append(
        {
            "old_mode": int(old_mode, 8) if old else None,
            "new_mode": int(new_mode, 8) if new else None,
            "old_path": path if old else None,
            "new_path": path if new else None,
            "old_sha1": old_blob if old else None,
            "new_sha1": new_blob if new else None,
        }
    )
