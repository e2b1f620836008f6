"""Extract the commits of a local git repository that modified exactly one text file, as JSONL rows.

    python dataset/git_commits.py --repo ~/src/project --output commits.jsonl

Rows have CommitPack's schema (commit, old_file, new_file, old_contents, new_contents, subject,
message, lang, license, repos), oldest commit first. Merges, renames, binary files, symbolic links
and commits that touch a second file are skipped. With --modified-only, files that a commit adds,
deletes or renames are not counted, as in CommitPack: it still must modify exactly one file.
dataset/commits_to_jsonl.py turns the rows into training rows.

A repository without usable history (a tarball, a shallow clone, fewer rows than --min-rows) is an
error. With --fallback FILE the rows of FILE are written instead and the reason is printed.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shutil
from collections.abc import Sequence

from megatron_ft.commits.git import (
    BlobReader,
    find_license,
    first_line,
    name_of,
    run_git,
    single_file_commits,
)
from megatron_ft.commits.languages import language_of
from megatron_ft.commits.row import CommitRow
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress

MAX_FILE_BYTES = 1 << 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--repo", type=Path, default=".", metavar="DIR", help="working tree or bare repository; it is only read")
    add("--output", required=True, metavar="FILE", help="JSONL file to write, .gz and .zst compressed; - for stdout")
    add("--rev", default="HEAD", help="branch, tag or range of commits such as v1.0..main, as for git log")
    add("--modified-only", action="store_true", help="count only modified files of a commit, as CommitPack does")
    add("--max-rows", type=int, metavar="N", help="stop after N rows (default: no limit)")
    add("--max-file-bytes", type=int, default=MAX_FILE_BYTES, metavar="N", help="skip files larger than N bytes")
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
                print(f"{counted(count, 'single-file commit')} of {args.repo} -> {args.output}", file=sys.stderr)
                return
        found = counted(count, "single-file commit")
        if args.max_file_bytes < MAX_FILE_BYTES:
            found += f" of at most --max-file-bytes {args.max_file_bytes}"
        reason = f"{args.repo} has {found}, fewer than --min-rows {args.min_rows}"
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
    done = run_git(repo, "rev-parse", "--is-shallow-repository")
    if done.returncode:
        return f"{repo} is not a readable git repository ({first_line(done.stderr)})"
    if done.stdout.strip() == b"true":
        return f"{repo} is a shallow clone"
    if run_git(repo, "rev-parse", "--verify", "--quiet", "HEAD").returncode:
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
        for commit in single_file_commits(args.repo, args.rev, modified_only=args.modified_only):
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


if __name__ == "__main__":
    run_program(main)
