"""Write the history of local git repositories as the tables of BigQuery's github_repos.

    python dataset/commitpack/commits_table.py --repos mirrors/*/*.git --output tables

Writes commits.parquet, licenses.parquet and languages.parquet to tables/, the input of
select_commits.py. Repositories may be bare or not. All commits that HEAD reaches are taken; one
that several repositories contain, such as forks, is one row with all their names. Names and times
of authors are kept, e-mail addresses are not. A license is recognized by the license file at HEAD;
the languages are those of the files at HEAD by bytes, roughly as GitHub counts them.

tables/manifest.jsonl lists the repositories that are done with their status: ok, empty, shallow,
unreadable, or same_name (of one before). The same command continues where a killed run stopped; a
repository that is done is not read again. Run once more after the end, it tries again those that
were not ok. --shard I/N takes each Nth repository; the tables of all shards together are the input
of select_commits.py.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import dataclasses
import os
import shutil
from collections.abc import Sequence

from megatron_ft.commits.selection.history import inspect
from megatron_ft.commits.selection.journal import Journal
from megatron_ft.commits.selection.write_tables import FORMATS, QUERIES, counts, write_tables
from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_shard_flag
from megatron_ft.errors import UserError, run_program
from megatron_ft.extras import require
from megatron_ft.files.json_file import read_small_file
from megatron_ft.files.output import open_locked, writing
from megatron_ft.files.report import report_path, write_report
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress

STATUSES = ("ok", "empty", "shallow", "unreadable", "same_name")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    repos = parser.add_mutually_exclusive_group(required=True).add_argument
    repos("--repos", nargs="+", metavar="DIR", help="local repositories; they are only read")
    repos("--repos-file", type=Path, metavar="FILE", help="file with one path of a repository per line")
    add("--output", type=Path, required=True, metavar="DIR", help="directory of the tables")
    add("--format", choices=tuple(FORMATS), default="parquet", help="format of the tables")
    add_shard_flag(parser, "take the Ith of every N repositories")
    add("--memory", type=int, metavar="MIB", help="memory for DuckDB (default: three quarters of the job's)")
    args = parser.parse_args(argv)
    if args.memory is not None and args.memory < 64:
        raise UserError(f"--memory {args.memory}: must be at least 64 MiB")
    return args


def main() -> None:
    args = parse_args()
    require("duckdb", "dataset")
    if shutil.which("git") is None:
        raise UserError("git is not installed, or not in PATH; install it, or load its module")
    index, count = args.shard
    repos = repositories(args)[index - 1 :: count]
    suffix = f"-{index}-of-{count}" if count > 1 else ""
    outputs = {table: args.output / f"{table}{suffix}.{args.format}" for table in QUERIES}
    manifest = args.output / f"manifest{suffix}.jsonl"
    with writing(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        with (
            open_locked(args.output / f".commits{suffix}.lock"),
            Journal(args.output / f".commits{suffix}.jsonl.zst", manifest) as journal,
        ):
            read_repositories(journal, repos, list(outputs.values()))
            finish(journal, manifest, outputs, args)


def repositories(args: argparse.Namespace) -> list[str]:
    """Absolute paths of the repositories, each once."""
    paths = args.repos
    if paths is None:
        paths = [os.fsdecode(line) for line in read_small_file(args.repos_file).splitlines() if line.strip()]
    if not paths:
        raise UserError(f"{args.repos_file}: empty; expected one path of a repository per line")
    return list(dict.fromkeys(os.path.realpath(path) for path in paths))


def read_repositories(journal: Journal, repos: list[str], outputs: list[Path]) -> None:
    """Add the repositories that are not in the journal yet; if all are, those that were not ok."""
    done = {entry.path for entry in journal.entries}
    if others := sorted(done.difference(repos)):
        raise UserError(
            f"{outputs[0].parent}: also has {others[0]}, which is not among the repositories; name it, too, or choose "
            "another --output"
        )
    todo = [repo for repo in repos if repo not in done] or journal.forget(STATUSES[1:])
    names = {entry.name: entry.path for entry in journal.entries if entry.status == "ok"}
    with Progress("repositories", len(todo), " repos") as progress:
        for path in todo:
            repo = inspect(Path(path))
            if repo.status == "ok":
                if repo.name in names:
                    repo = dataclasses.replace(repo, status="same_name", reason=f"same name as {names[repo.name]}")
                else:
                    for output in outputs:  # made without it
                        output.unlink(missing_ok=True)
            entry = journal.add(repo)
            if entry.status == "ok":
                names[entry.name] = path
            else:
                print(printable(f"{path}: {entry.status} ({entry.reason})"), file=sys.stderr)
            progress.update(1, printable(entry.name))


def finish(journal: Journal, manifest: Path, outputs: dict[str, Path], args: argparse.Namespace) -> None:
    """Write the tables, unless they exist, and the report. UserError if no repository is ok."""
    found = counts(journal.entries, STATUSES)
    if not found["ok"]:
        first = journal.entries[0] if journal.entries else None
        why = f"{first.path}: {first.status}, {first.reason}" if first else "this shard has none"
        raise UserError(f"no readable repository ({why}); give directories of git repositories with their history")
    if all(path.exists() for path in (*outputs.values(), report_path(outputs["commits"]))):
        print(f"{args.output}: complete, nothing to do", file=sys.stderr)
        return
    rows = write_tables(journal.path, manifest, outputs, args.format, args.memory and args.memory << 20)
    report = {"repositories": found, "commits_in": sum(entry.commits for entry in journal.entries), "commits_out": rows}
    write_report(outputs["commits"], report)
    listed = ", ".join(f"{number:,} {status}" for status, number in found.items() if number)
    print(f"repositories: {listed}; {counted(rows, 'commit')} -> {outputs['commits']}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
