"""Time dataset/commitpack/scrape_github.py against one `git fetch --depth 2` per row.

    python bench/scrape.py
    python bench/scrape.py --repo ~/src/project --rows 500

Both scrape the same commits of one repository from a git server on 127.0.0.1 that waits before each
answer, --delay seconds, and counts requests. The repository is made for it, or a clone of --repo.
The published way (a new repository per row, fetch, two checkouts) is timed on --fetched-rows of the
rows, and both are compared per row. Ours is the complete program, start-up included; its contents
are compared with those of the other.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_ft.commits.git import git_environment, single_file_commits
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[1]
SERVER = ROOT / "tests/dataset/git_server.py"
NAME = "owner/name"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--repo", type=Path, metavar="DIR", help="git repository whose commits are scraped (default: one is made)")
    add("--rows", type=int, default=220, help="commits to scrape")
    add("--fetched-rows", type=int, default=8, help="commits to fetch one by one")
    add("--delay", type=float, default=0.05, metavar="SECONDS", help="wait of the server per request")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench(args, Path(directory))


def bench(args: argparse.Namespace, directory: Path) -> None:
    served = directory / "served" / NAME
    rows = serve_repository(args, served)
    with_ids = [row | {"old_sha1": row["old"], "new_sha1": row["new"]} for row in rows]
    results = {}
    with server(directory, args.delay) as (url, requests):
        before = requests()
        start = time.perf_counter()
        one_by_one = [fetch_one(url, directory / "one", row) for row in rows[: args.fetched_rows]]
        seconds, count = time.perf_counter() - start, requests() - before
        results["fetch --depth 2 per row"] = (seconds / len(one_by_one), count / len(one_by_one))
        for name, input in (("ours", rows), ("ours, blob ids known", with_ids)):
            before = requests()
            seconds, scraped = run_ours(url, directory / name.replace(" ", "_"), input)
            if scraped[: len(one_by_one)] != one_by_one or len(scraped) != len(rows):
                raise UserError(f"{name}: other contents than fetched one by one")
            results[name] = (seconds / len(rows), (requests() - before) / len(rows))
    print(f"{len(rows)} rows of one repository, {args.delay * 1000:.0f} ms per request")
    base_seconds, base_requests = results["fetch --depth 2 per row"]
    for name, (seconds, count) in results.items():
        ratios = f"{base_seconds / seconds:6.1f}x as fast, {base_requests / count:6.1f}x fewer requests"
        print(f"{name:24} {seconds * 1000:8.1f} ms and {count:.3f} requests per row; {ratios}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of a process: {peak:.0f} MiB")


def serve_repository(args: argparse.Namespace, path: Path) -> list[dict]:
    """Make the repository that is served; its rows of metadata with blob ids as "old" and "new"."""
    if args.repo:
        subprocess.run(["git", "clone", "--quiet", "--bare", args.repo, path], check=True, env=git_environment())
    else:
        subprocess.run(["git", "init", "--quiet", "--bare", path], check=True, env=git_environment())
        importing = ["git", "-C", path, "fast-import", "--quiet"]
        subprocess.run(importing, input=history(args.rows + 1), check=True, env=git_environment())
        subprocess.run(["git", "-C", path, "symbolic-ref", "HEAD", "refs/heads/main"], check=True)
    for name in ("allowFilter", "allowAnySHA1InWant"):
        subprocess.run(["git", "-C", path, "config", f"uploadpack.{name}", "true"], check=True)
    rows = []
    for commit in single_file_commits(path, "HEAD"):
        row = {"commit": commit.id, "repos": NAME, "old_file": commit.path, "new_file": commit.path}
        row |= {"subject": commit.subject, "message": commit.message, "license": "mit"}
        rows.append(row | {"old": commit.old_blob, "new": commit.new_blob})
        if len(rows) == args.rows:
            break
    if len(rows) < max(1, args.fetched_rows):
        raise UserError(f"--repo {args.repo}: {len(rows)} single-file commits, fewer than --fetched-rows")
    return rows


def history(count: int) -> bytes:
    """A stream for git fast-import: 50 files, of which each commit changes one."""
    lines = []
    for number in range(count):
        lines.append(f"commit refs/heads/main\ncommitter A <a@b.c> {1_700_000_000 + number} +0000")
        lines.append(f"data 11\nChange {number:04d}")
        for file in range(50) if number == 0 else [number % 50]:
            content = "".join(f"line {i} of file {file} as of {number}\n" for i in range(100))
            lines.append(f"M 100644 inline src/file{file}.py\ndata {len(content)}\n{content}")
    return "\n".join(lines).encode() + b"\n"


@contextmanager
def server(directory: Path, delay: float) -> Iterator:
    """The URL of a running server, and a function that counts its requests so far."""
    log = directory / "requests.log"
    log.touch()
    command = [sys.executable, SERVER, "--root", directory / "served", "--delay", str(delay), "--log", log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # a pipe
        try:
            yield process.stdout.readline().strip(), lambda: len(log.read_bytes().splitlines())
        finally:
            process.terminate()


def fetch_one(url: str, scratch: Path, row: dict) -> tuple[str, str]:
    """The contents before and after one commit, as the published scraper gets them."""

    def git(*command: str) -> None:
        subprocess.run(["git", "-C", scratch, *command], check=True, capture_output=True, env=git_environment())

    scratch.mkdir()
    git("init", "--quiet")
    git("remote", "add", "origin", f"{url}/{NAME}")
    git("fetch", "--depth", "2", "origin", row["commit"])
    git("checkout", "FETCH_HEAD", "--", row["new_file"])
    new = (scratch / row["new_file"]).read_text(encoding="utf-8")
    git("checkout", "FETCH_HEAD^", "--", row["old_file"])
    old = (scratch / row["old_file"]).read_text(encoding="utf-8")
    shutil.rmtree(scratch)
    return old, new


def run_ours(url: str, output: Path, rows: list[dict]) -> tuple[float, list[tuple[str, str]]]:
    """Seconds of the complete program, and the contents that it wrote."""
    metadata = output.with_suffix(".jsonl")
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, ROOT / "dataset/commitpack/scrape_github.py", "--input", metadata, "--output", output]
    command += ["--base-url", url, "--temporary-directory", output.parent, "--no-suffix-filter", "--no-message-filter"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"scrape_github.py failed: {done.stderr.strip().splitlines()[-1]}")
    lines = (output / "part-00000.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return seconds, [(row["old_contents"], row["new_contents"]) for row in map(json.loads, lines)]


if __name__ == "__main__":
    run_program(main)
