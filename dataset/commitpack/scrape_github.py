"""Scrape the files before and after each commit from GitHub or a mirror: metadata to CommitPack.

    python dataset/commitpack/scrape_github.py --input metadata.parquet --output commitpack

Input rows have commit, repos (comma-separated), old_file, new_file, subject, message, and possibly
license, old_sha1 and new_sha1 (ids of the blobs), as dataset/commitpack/select_commits.py writes
them; sort them by repos for the fewest requests. The output is a directory:

    part-00000.jsonl          rows of CommitPack's schema, in the order of the input
    status/part-00000.jsonl   for every row of the part commit, new_file, status and repo

and next to it OUTPUT_report.json with the counts. A repository takes four requests however many of
its commits are wanted (up to 1,000), two if the blobs' ids are known. Repositories of one row are
tried in order.

Run the command again to resume: nothing that was fetched is fetched again, and the files are those
of an uninterrupted run. Failures of the server (timeout, refused, server_error) are retried, now
and by the next run; the exit status is 75 while rows of such repositories are left.

A token in GITHUB_TOKEN raises GitHub's limits. Other servers than https://github.com get a token
only from the variable that --token-variable names. Git's own configuration is not used: a proxy is
taken from the variables https_proxy and http_proxy.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import unquote, urlsplit

from megatron_ft.commits.languages import language_of
from megatron_ft.commits.row import CommitRow
from megatron_ft.commits.scraper.journal import Journal
from megatron_ft.commits.scraper.metadata import Filter, Part, read_parts
from megatron_ft.commits.scraper.pace import Pace, ServerUnavailable
from megatron_ft.commits.scraper.part import PartScraper, Scraper
from megatron_ft.commits.scraper.server import GITHUB, Server
from megatron_ft.commits.scraper.status import Status
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_RESUME, UserError, run_program
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.json_file import read_json
from megatron_ft.files.jsonl import STDIN, Source, shard_bytes
from megatron_ft.files.output import open_locked, scratch_directory, writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import TableWriter, open_tables
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress

GITHUB_TOKEN = "GITHUB_TOKEN"
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
STATE = ".scrape"  # in the output directory: manifest, counts, journals of unfinished parts
COLUMNS = dict.fromkeys(CommitRow.__annotations__, "string")
OLDEST_GIT = (2, 31)  # GIT_CONFIG_COUNT; fetch --stdin is older
ENDS_BYTES = 1 << 20  # of each end of an input file, by which it is recognized


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="metadata, JSONL or parquet, or directories of them")
    add("--output", type=Path, required=True, metavar="DIR", help="directory for the rows; the same to resume")
    add("--format", choices=FORMATS, default="jsonl", help="format of the rows")
    add(
        "--base-url",
        default=GITHUB,
        metavar="URL",
        help="http, https or file URL; OWNER/NAME replaces {repo} or ends it",
    )
    add(
        "--token-variable", metavar="NAME", help="environment variable of the token (default: GITHUB_TOKEN, for GitHub)"
    )
    add("--suffix-filter", action=argparse.BooleanOptionalAction, default=True, help="only files of listed languages")
    add(
        "--message-filter",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop 'Update FILE', 'initial commit', 'please' and 'lalala'",
    )
    add("--max-file-bytes", type=int, default=1 << 20, metavar="N", help="larger files are too_large")
    add("--max-repository-bytes", type=int, default=4 << 30, metavar="N", help="disk for one fetch; more is too_large")
    add("--repositories-at-once", type=int, default=4, metavar="N", help="fetches that run at the same time")
    add("--rate", type=float, default=1.5, metavar="N", help="fetches of repositories that start per second, at most")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="time for one fetch")
    add("--attempts", type=int, default=3, metavar="N", help="attempts per repository and run before the next one")
    add("--record-failures", action="store_true", help="finish parts although rows are left; nothing retries these")
    add(
        "--part-rows",
        type=int,
        default=50_000,
        metavar="N",
        help="rows that are grouped by repository and written at once",
    )
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    add("--temporary-directory", type=Path, metavar="DIR", help="for scratch repositories (default: TMPDIR or /tmp)")
    args = parser.parse_args(argv)
    for name in (
        "max_file_bytes",
        "max_repository_bytes",
        "repositories_at_once",
        "rate",
        "timeout",
        "attempts",
        "part_rows",
    ):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    check_url(args.base_url)
    args.output = Path(os.path.abspath(args.output))  # "." has no name for the report
    return args


def check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "file") or (parts.scheme != "file" and not parts.hostname):
        raise UserError(f"--base-url {url}: expected https://HOST, http://HOST or file:///DIRECTORY")
    if parts.username or parts.password:
        raise UserError(
            "--base-url: holds a name or password; put a token in a variable and give --token-variable NAME"
        )
    if parts.scheme == "file" and "{repo}" not in url and not Path(unquote(parts.path)).is_dir():
        raise UserError(f"--base-url {url}: directory not found; give the directory that holds OWNER/NAME")


def token_of(args: argparse.Namespace) -> str | None:
    """The token for the server, from the environment; None without one."""
    name = args.token_variable or GITHUB_TOKEN
    if args.token_variable is None and args.base_url.rstrip("/") != GITHUB:
        return None  # GitHub's token is nobody else's business
    token = os.environ.get(name, "")
    if not token:
        if args.token_variable:
            raise UserError(
                f"--token-variable {name}: not set; put the token in it, as in read -rs {name}; export {name}"
            )
        return None
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"{name}: holds a blank, a line break or another character that no token has; set it again")
    url = urlsplit(args.base_url)
    if url.scheme == "http" and url.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"--base-url {args.base_url}: would send the token unencrypted; use https")
    return token


def check_git() -> None:
    if shutil.which("git") is None:
        raise UserError("git is not installed, or not in PATH; install it, or load its module")
    version = subprocess.run(["git", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", version)
    if not found or tuple(map(int, found.groups())) < OLDEST_GIT:
        raise UserError(
            f"{version.strip()}: expected git {OLDEST_GIT[0]}.{OLDEST_GIT[1]} or later; load a newer module"
        )


def main() -> int:
    args = parse_args()
    sources = open_tables(args.input)
    if any(source.path == STDIN for source in sources):
        raise UserError("--input -: a scrape is resumed from its input; give files")
    token = token_of(args)
    check_git()
    state = args.output / STATE
    with ExitStack() as stack:
        with writing(args.output):
            for directory in (state, args.output / "status"):
                directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(open_locked(state / "lock"))
            check_manifest(state / "manifest.json", args, sources)
        temporary = args.temporary_directory or Path(tempfile.gettempdir())
        with writing(temporary):
            scratch = stack.enter_context(scratch_directory(temporary, ".scrape_github"))
        stop = threading.Event()
        server = Server(args.base_url, token, args.timeout, args.max_repository_bytes, stop)
        pool = stack.enter_context(ThreadPoolExecutor(args.repositories_at_once))
        stack.callback(stop.set)  # before the pool waits for its workers
        pace = Pace(args.rate, stop)
        return scrape_all(args, sources, Scraper(server, pace, pool, scratch, args.max_file_bytes, args.attempts))


def check_manifest(path: Path, args: argparse.Namespace, sources: list[Source]) -> None:
    """Write down what the output is made from; UserError if it was begun with something else."""
    inputs = [{"name": source.path.name, "size": source.size, "ends": ends_digest(source.path)} for source in sources]
    names = ("format", "suffix_filter", "message_filter", "max_file_bytes", "part_rows", "skip_bad_rows")
    settings = {name: getattr(args, name) for name in names}
    if path.exists():
        before = read_json(path)
        if before.get("inputs") != inputs:
            known = ", ".join(str(entry.get("name")) for entry in before.get("inputs", []))
            raise UserError(f"--output {args.output}: was begun with another input ({known}); choose another directory")
        for name, value in settings.items():
            if (old := before.get("settings", {}).get(name)) != value:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"--output {args.output}: was begun with {flag} {old}, not {value}; choose another directory"
                )
    else:
        replace_file(path, json.dumps({"inputs": inputs, "settings": settings}, indent=2).encode() + b"\n")


def ends_digest(path: Path) -> str:
    """sha256 of the first and last ENDS_BYTES of a file, which tells inputs apart at any size."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(ENDS_BYTES))
        file.seek(max(0, path.stat().st_size - ENDS_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def scrape_all(args: argparse.Namespace, sources: list[Source], scraper: Scraper) -> int:
    """Scrape every part that is not complete; returns the exit status."""
    totals: Counter[str] = Counter()
    unfinished: Counter[Status] = Counter()
    size = shard_bytes(sources) or 1
    filter = Filter(args.suffix_filter, args.message_filter)
    unavailable = ""
    with Progress("scrape", None, " rows") as progress:
        for number, part in enumerate(read_parts(sources, filter, args.part_rows, args.skip_bad_rows)):
            name = f"part-{number:05d}"
            done = args.output / f"{name}.{args.format}"
            if not done.exists():
                try:
                    left = scrape_part(args, scraper, part, name, done, progress)
                except ServerUnavailable as error:
                    unavailable = str(error)
                    break
                progress.update(0, f"{part.consumed / size:.0%} of the input")
                if left:
                    unfinished += left
                    continue
            journal_of(args, name).unlink(missing_ok=True)
            totals.update(read_json(args.output / STATE / f"{name}.json"))
    if unavailable:
        print(printable(f"the server keeps failing ({unavailable}); run the command again later"), file=sys.stderr)
        return EXIT_RESUME
    if unfinished:
        counts = ", ".join(f"{status} {count:,}" for status, count in sorted(unfinished.items()))
        print(
            printable(
                f"{unfinished.total():,} rows are left ({counts}; {scraper.last_failure}); run the command again to "
                "retry them, or with --record-failures to finish without them"
            ),
            file=sys.stderr,
        )
        return EXIT_RESUME
    if not totals["rows_in"]:
        raise UserError(f"{sources[0].name}: no usable row; expected one JSON object per line")
    report(args, totals, scraper.server.requests)
    return 0


def scrape_part(
    args: argparse.Namespace, scraper: Scraper, part: Part, name: str, done: Path, progress: Progress
) -> Counter[Status]:
    """Scrape and write one part; returns the rows that are left, if it is not complete."""
    path = journal_of(args, name)
    with writing(path):
        journal = Journal(path)
    with journal:
        rows = PartScraper(scraper, journal, part.rows)
        rows.run(progress)
        left = rows.unfinished()
        if left and not args.record_failures:
            return left
        write_part(args, part, rows, journal, name, done)
    return Counter()


def journal_of(args: argparse.Namespace, name: str) -> Path:
    return args.output / STATE / f"{name}.journal"


def write_part(
    args: argparse.Namespace, part: Part, rows: PartScraper, journal: Journal, name: str, done: Path
) -> None:
    """Write the statuses, the counts, and last the rows, whose final name completes the part."""
    counts: Counter[str] = Counter(rows_in=part.rows_in)
    counts.update({f"dropped.{reason}": count for reason, count in part.dropped.items()})
    statuses = args.output / "status" / f"{name}.jsonl"
    with writing(done), TableWriter(statuses) as status_table, TableWriter(done, COLUMNS) as table:
        for i, row in enumerate(part.rows):
            status, repo = rows.status(i)
            counts[f"status.{status}"] += 1
            status_table.write({"commit": row.commit, "new_file": row.new_file, "status": status, "repo": repo})
            if status == Status.OK:
                old, new = journal.contents(i)
                table.write(
                    vars(
                        CommitRow(
                            commit=row.commit,
                            old_file=row.old_file,
                            new_file=row.new_file,
                            old_contents=old,
                            new_contents=new,
                            subject=row.subject,
                            message=row.message,
                            lang=language_of(row.new_file),
                            license=row.license,
                            repos=row.repos,
                        )
                    )
                )
        status_table.commit()
        replace_file(args.output / STATE / f"{name}.json", json.dumps(counts).encode() + b"\n")
        table.commit()


def report(args: argparse.Namespace, totals: Counter[str], requests: int) -> None:
    """Write and print the counts of all parts."""

    def counts(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): totals[name] for name in sorted(totals) if name.startswith(prefix)}

    statuses, dropped = counts("status."), counts("dropped.")
    rows_out = statuses.get(Status.OK, 0)
    write_report(
        args.output, {"rows_in": totals["rows_in"], "rows_out": rows_out, "dropped": dropped, "status": statuses}
    )
    others = {**dropped, **{status: count for status, count in statuses.items() if status != Status.OK}}
    note = "; ".join(f"{name} {count:,}" for name, count in others.items())
    print(
        f"{counted(totals['rows_in'], 'row')} of metadata, {rows_out:,} scraped -> {args.output}"
        + (f" ({note})" if note else "")
        + f"; {requests:,} requests in this run",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_program(main)
