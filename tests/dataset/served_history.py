"""Repositories for the scraper's tests, made by git fast-import, and their rows of metadata."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SYMLINK, SUBMODULE, REGULAR, EXECUTABLE = "120000", "160000", "100644", "100755"
Files = dict[str, tuple[str, bytes] | None]  # path to mode and content; None deletes it


class Change(NamedTuple):
    """A commit: its subject and what it does to files; `merge` is another parent's number."""

    subject: str
    files: Files
    merge: int | None = None
    root: bool = False


def text(content: str, mode: str = REGULAR) -> tuple[str, bytes]:
    return mode, content.encode()


def make_repository(path: Path, changes: Sequence[Change]) -> list[str]:
    """A bare repository with one commit per change, served with filters; returns the ids."""
    git = ["git", "-C", str(path)]
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", path], check=True)
    subprocess.run([*git, "config", "uploadpack.allowFilter", "true"], check=True)
    stream = b"".join(_commit(number, change) for number, change in enumerate(changes, 1))
    marks = path / "marks"
    subprocess.run([*git, "fast-import", "--quiet", f"--export-marks={marks}"], input=stream, check=True)
    ids = dict(line.split() for line in marks.read_text(encoding="ascii").splitlines())
    return [ids[f":{number}"] for number in range(1, len(changes) + 1)]


def _commit(number: int, change: Change) -> bytes:
    date = 1_700_000_000 + 60 * number
    lines = [f"commit refs/heads/{'root' if change.root else 'main'}{number if change.root else ''}", f"mark :{number}"]
    lines += [f"committer A <a@b.c> {date} +0000", f"data {len(change.subject.encode())}", change.subject]
    if change.merge:
        lines.append(f"merge :{change.merge}")
    body = "\n".join(lines).encode() + b"\n"
    for path, file in change.files.items():
        quoted = '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        if file is None:
            body += f"D {quoted}\n".encode()
        elif file[0] == SUBMODULE:
            body += f"M {SUBMODULE} {file[1].decode()} {quoted}\n".encode()
        else:
            body += f"M {file[0]} inline {quoted}\ndata {len(file[1])}\n".encode() + file[1] + b"\n"
    return body + b"\n"


def numbered(count: int, name: str = "a.py", salt: str = "") -> list[Change]:
    """A file added by the first commit and modified by the following ones."""
    return [Change(f"Set {name} to {i}", {name: text(f"{salt}{i}\n" * 20)}) for i in range(count + 1)]


def metadata(commit: str, repos: str, name: str = "a.py", **fields: str) -> dict:
    subject = f"Change {name} in {commit[:8]}"
    row = {"commit": commit, "repos": repos, "old_file": name, "new_file": name, "license": "mit"}
    return row | {"subject": subject, "message": subject + "\n"} | fields


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def contents(repo: Path, names: Sequence[str]) -> list[bytes]:
    """Files REVISION:PATH as a complete clone has them."""
    batch = ["git", "-C", str(repo), "cat-file", "--batch"]
    rest = subprocess.run(batch, input="\n".join(names).encode(), capture_output=True, check=True).stdout
    found = []
    for _ in names:
        header, _, rest = rest.partition(b"\n")
        size = int(header.split()[2])
        found.append(rest[:size])
        rest = rest[size + 1 :]
    return found


def blob_ids(repo: Path, commits: Sequence[str], name: str = "a.py") -> list[dict[str, str]]:
    """The blob ids of a file before and after each commit, as a row of metadata has them."""
    names = [f"{rev}:{name}" for commit in commits for rev in (commit + "^", commit)]
    parsed = subprocess.run(["git", "-C", str(repo), "rev-parse", *names], capture_output=True, check=True, text=True)
    ids = parsed.stdout.split()
    return [{"old_sha1": old, "new_sha1": new} for old, new in zip(ids[::2], ids[1::2], strict=True)]
