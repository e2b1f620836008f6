"""Collect the commits of a local git repository that modified exactly one text file, one JSONL row each in CommitPack's schema.

    python dataset/git_commits.py --repo ~/src/project --output commits.jsonl

A row has commit, old_file, new_file, old_contents, new_contents, subject, message, lang, license, repos; oldest commits come first.
A repository without a history to walk (a tarball, a shallow clone, fewer rows than --min-rows) is an error. With --fallback FILE the
rows of that file are written instead, and a line says so: the demonstration does that with examples/commits.jsonl.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ft.config.flags import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress

REGULAR_FILES = ("100644", "100755")  # git's modes; the others are symbolic links and submodules

# CommitPack's names of languages by file name or ending; anything else is "Text".
LANGUAGES = {
    ".c": "C", ".h": "C", ".cc": "C++", ".cpp": "C++", ".cxx": "C++", ".hpp": "C++", ".hh": "C++", ".cs": "C#", ".css": "CSS", ".scss": "SCSS",
    ".clj": "Clojure", ".coffee": "CoffeeScript", ".cu": "Cuda", ".dart": "Dart", ".ex": "Elixir", ".exs": "Elixir", ".erl": "Erlang",
    ".f90": "FORTRAN", ".go": "Go", ".groovy": "Groovy", ".hs": "Haskell", ".html": "HTML", ".ini": "INI", ".java": "Java", ".js": "JavaScript",
    ".jsx": "JSX", ".json": "JSON", ".jl": "Julia", ".kt": "Kotlin", ".less": "Less", ".lua": "Lua", ".md": "Markdown", ".ml": "OCaml",
    ".php": "PHP", ".pl": "Perl", ".ps1": "PowerShell", ".py": "Python", ".pyx": "Cython", ".r": "R", ".rb": "Ruby", ".rs": "Rust",
    ".rst": "reStructuredText", ".sbatch": "Shell", ".scala": "Scala", ".sh": "Shell", ".bash": "Shell", ".sql": "SQL", ".swift": "Swift",
    ".tex": "TeX", ".toml": "TOML", ".ts": "TypeScript", ".tsx": "TSX", ".vim": "VimL", ".vue": "Vue", ".xml": "XML", ".yaml": "YAML",
    ".yml": "YAML", ".zig": "Zig", "makefile": "Makefile", "dockerfile": "Dockerfile", "cmakelists.txt": "CMake", ".cmake": "CMake",
}  # fmt: skip

# Wording that tells a licence text, most specific first; names as GitHub's API and CommitPack write them.
LICENSES = {
    r"GNU AFFERO GENERAL PUBLIC LICENSE": "agpl-3.0",
    r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3": "lgpl-3.0",
    r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1": "lgpl-2.1",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 2": "gpl-2.0",
    r"Mozilla Public License,? [Vv]ersion 2\.0": "mpl-2.0",
    r"Apache License,?\s+Version 2\.0": "apache-2.0",
    r"Neither the name .{1,200}contributors may be used": "bsd-3-clause",
    r"Redistribution and use in source and binary forms": "bsd-2-clause",
    r"Permission is hereby granted, free of charge, to any person obtaining a copy": "mit",
    r"Permission to use, copy, modify, and(?:/or)? distribute this software for any\s+purpose": "isc",
    r"This is free and unencumbered software released into the public domain": "unlicense",
}


@dataclass
class Commit:
    """A commit that changed one file and nothing else: names and blob ids before and after are in `path`, `old`, `new`."""

    id: str
    subject: str
    message: str
    path: str
    old: str
    new: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--repo",
        type=Path,
        default=".",
        metavar="DIR",
        help="working tree or bare repository to read; nothing in it is changed",
    )
    add("--output", required=True, metavar="FILE", help="JSONL file to write; - for standard output")
    add("--rev", default="HEAD", help="branch, tag or range of commits, as git log takes it")
    add("--max-rows", type=int, metavar="N", help="stop after this many rows; all when not given")
    add("--max-file-bytes", type=int, default=1 << 20, metavar="N", help="leave out files longer than this")
    add("--license", help="licence to write in every row; told from the repository's licence file when not given")
    add("--min-rows", type=int, default=1, metavar="N", help="fewer rows than this count as no history")
    add("--fallback", type=Path, metavar="FILE", help="rows to write where there is no history, instead of an error")
    args = parser.parse_args(argv)
    if args.max_rows is not None and args.max_rows < 1:
        raise UserError(f"--max-rows {args.max_rows}: must be at least 1; leave it out for all rows")
    if args.fallback and args.fallback.resolve() == Path(args.output).resolve():
        raise UserError(f"--output {args.output}: is the --fallback file, and would be lost; give another name")
    if not args.repo.is_dir():
        raise UserError(f"--repo {args.repo}: no such directory; give a local git repository")
    return args


def main() -> None:
    args = parse_args()
    reason = why_no_history(args.repo)
    if reason is None:
        with OutputFile(args.output) as output, writing(args.output):
            count = write_rows(args, output)
            if count >= args.min_rows:
                output.commit()
                print(f"{count:,} commits of one text file from {args.repo} -> {args.output}", file=sys.stderr)
                return
        reason = f"{args.repo} has {count} commits of one text file, fewer than {args.min_rows}"
    if args.fallback is None:
        raise UserError(
            f"{reason}; give --repo a full clone (git fetch --unshallow makes one of a shallow clone), a lower --min-rows, "
            "or --fallback FILE with rows to use instead"
        )
    use_fallback(args, reason)


def why_no_history(repo: Path) -> str | None:
    """Why there are no commits to walk, or None where there are."""
    done = subprocess.run(git(repo, "rev-parse", "--is-shallow-repository"), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.splitlines() or ["git failed"])[0]
        return f"{repo} is no git repository that can be read ({said})"
    if done.stdout.strip() == "true":
        return f"{repo} is a shallow clone"
    if subprocess.run(git(repo, "rev-parse", "--verify", "--quiet", "HEAD"), capture_output=True).returncode:
        return f"{repo} has no commit yet"
    return None


def use_fallback(args: argparse.Namespace, reason: str) -> None:
    try:
        rows = args.fallback.read_bytes()
    except OSError as error:
        raise UserError(f"{reason}, and --fallback {args.fallback} cannot be read ({error.strerror})") from error
    with OutputFile(args.output) as output, writing(args.output):
        output.write(rows)
        output.commit()
    print(f"{reason}: the {rows.count(10)} rows of {args.fallback} are used instead -> {args.output}", file=sys.stderr)


def write_rows(args: argparse.Namespace, output: OutputFile) -> int:
    """Write a row for each fitting commit; returns how many."""
    count = 0
    repos = name_of(args.repo)
    with BlobReader(args.repo) as blobs, Progress("commits", None, " commits") as progress:
        license = args.license or find_license(args.repo, blobs)
        for commit in single_file_commits(args.repo, args.rev):
            progress.update(1)
            old, new = (blobs.text(blob, args.max_file_bytes) for blob in (commit.old, commit.new))
            if old is None or new is None:
                continue
            row = {
                "commit": commit.id,
                "old_file": commit.path,
                "new_file": commit.path,
                "old_contents": old,
                "new_contents": new,
                "subject": commit.subject,
                "message": commit.message,
                "lang": language_of(commit.path),
                "license": license,
                "repos": repos,
            }
            output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
            if count == args.max_rows:
                break
    return count


def git(repo: Path, *command: str) -> list[str]:
    return ["git", "-C", str(repo), "-c", "i18n.logOutputEncoding=UTF-8", *command]


def single_file_commits(repo: Path, rev: str) -> Iterator[Commit]:
    """Commits of `rev`, oldest first, with one parent and one changed file that was and is a regular file of other contents."""
    log = git(
        repo,
        "log",
        rev,
        "--reverse",
        "--no-merges",
        "--raw",
        "-z",
        "--no-abbrev",
        "--no-renames",
        "--format=%x00%H%x00%s%x00%B%x00",
        "--",
    )
    with subprocess.Popen(log, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            fields = split_at_nul(process.stdout)
            header, changes = None, []
            for field in fields:
                field = field.strip("\n")
                if field.startswith(":"):
                    changes.append((field, next(fields)))
                elif field:  # a commit's id, and its subject and message after it
                    yield from one_change(header, changes)
                    header, changes = (field, next(fields), next(fields)), []
            yield from one_change(header, changes)
            if process.wait():
                raise UserError(
                    f"--rev {rev}: git log says {process.stderr.read().decode(errors='replace').splitlines()[0]}"
                )
        finally:
            process.kill()


def one_change(header: tuple[str, str, str] | None, changes: list[tuple[str, str]]) -> Iterator[Commit]:
    """The commit, where its raw diff (':oldmode newmode oldblob newblob status' and a path a change) modified one regular file."""
    if header is None or len(changes) != 1:
        return
    (raw, path), (id, subject, message) = changes[0], header
    old_mode, new_mode, old, new, status = raw[1:].split()
    if status == "M" and old_mode in REGULAR_FILES and new_mode in REGULAR_FILES and old != new:
        yield Commit(id, subject.strip(), message.strip(), path, old, new)


def split_at_nul(stream) -> Iterator[str]:
    """The NUL-terminated fields of a stream; bytes that are not UTF-8 become U+FFFD."""
    rest = b""
    while chunk := stream.read(1 << 16):
        *fields, rest = (rest + chunk).split(b"\0")
        for field in fields:
            yield field.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


class BlobReader:
    """Reads files out of a repository by one `git cat-file --batch` process that lives as long as it is needed."""

    def __init__(self, repo: Path):
        self._process = subprocess.Popen(
            git(repo, "cat-file", "--batch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def text(self, name: str, max_bytes: int) -> str | None:
        """The text of a blob; None where there is none, it is longer than `max_bytes`, holds a NUL byte or is not UTF-8."""
        self._process.stdin.write(name.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 3:  # "<name> missing"
            return None
        data = self._process.stdout.read(int(answer[2]) + 1)[:-1]
        if answer[1] != b"blob" or len(data) > max_bytes or b"\0" in data:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    def __enter__(self) -> "BlobReader":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def language_of(path: str) -> str:
    """CommitPack's name of a file's language."""
    name = path.rsplit("/", 1)[-1].lower()
    return LANGUAGES.get(name) or LANGUAGES.get(Path(name).suffix, "Text")


def find_license(repo: Path, blobs: BlobReader) -> str:
    """The licence that the repository's newest licence file names, or "unknown"."""
    listed = subprocess.run(git(repo, "ls-tree", "-z", "--name-only", "HEAD"), capture_output=True).stdout
    for name in sorted(filter(None, listed.decode("utf-8", "replace").split("\0"))):
        if re.match(r"(licen[cs]e|copying|unlicense)", name, re.IGNORECASE):
            text = blobs.text(f"HEAD:{name}", 1 << 20) or ""
            for wording, license in LICENSES.items():
                if re.search(wording, text, re.DOTALL):
                    return license
    return "unknown"


def name_of(repo: Path) -> str:
    """owner/name from the address of `origin`, or else the directory's name."""
    url = subprocess.run(
        git(repo, "config", "--get", "remote.origin.url"), capture_output=True, text=True
    ).stdout.strip()
    match = re.search(r"([^/:@]+/[^/:@]+?)(?:\.git)?/?$", url) if "://" in url or "@" in url else None
    return match[1] if match else repo.resolve().name


if __name__ == "__main__":
    run_program(main)
