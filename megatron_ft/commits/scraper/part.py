"""One part of the input, scraped: repositories by several workers, forks in order, failures
again."""

import itertools
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.commits.scraper.journal import Batch, Journal
from megatron_ft.commits.scraper.metadata import Metadata
from megatron_ft.commits.scraper.pace import Pace
from megatron_ft.commits.scraper.protocol import MAX_IDS, Result, Wanted, scrape
from megatron_ft.commits.scraper.server import FetchFailed, Server
from megatron_ft.commits.scraper.status import RETRIED, Status, best
from megatron_ft.errors import UserError
from megatron_ft.files.output import writing
from megatron_ft.printable import printable
from megatron_ft.progress import Progress

PAUSING = (Status.REFUSED, Status.SERVER_ERROR)
ANNOUNCED_SECONDS = 5.0  # shorter pauses are not printed
SPLIT = (Status.TIMEOUT, Status.TOO_LARGE)  # may go away with fewer rows per fetch


@dataclass
class Scraper:
    """What all parts share. `scratch` is a directory for repositories that are removed at once."""

    server: Server
    pace: Pace
    pool: ThreadPoolExecutor
    scratch: Path
    max_file_bytes: int
    attempts: int
    served: bool = False  # whether the server has sent any repository
    last_failure: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def fetch(self, repo: str, rows: Sequence[Wanted]) -> Batch:
        """Scrape rows of one repository; runs in a worker. Raises FetchFailed, Stopped,
        ServerUnavailable, and UserError for what ends the run."""
        self.pace.wait()
        directory = self.scratch / f"{next(self._numbers)}"
        batch = Batch(directory.with_suffix(".jsonl"), repo)
        started = time.monotonic()
        try:
            with writing(self.scratch):
                for result in scrape(self.server, directory, repo, rows, self.max_file_bytes, self.pace.wait):
                    batch.add(result)
            self.served = True
        except FetchFailed as failure:
            self._failed(repo, failure, started)
            if failure.status != Status.REPO_GONE:
                batch.discard()
                raise
            answered = {row for row, _, _ in batch.entries}
            for row in rows:
                if row.index not in answered:
                    batch.add(Result(row.index, Status.REPO_GONE))
        except BaseException:
            batch.discard()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self.pace.succeeded()
        batch.close()
        return batch

    def _failed(self, repo: str, failure: FetchFailed, started: float) -> None:
        """Pause all workers if the server refuses or fails. UserError if it rejects the token."""
        if failure.login:
            if self.server.has_token:
                raise UserError("the server rejects the token (HTTP 401); renew it, then run the command again")
            if not self.served:
                # A server that asks for a login everywhere would make every repository look gone.
                failure.status = Status.REFUSED
                self.last_failure = f"{repo}: the server asks for a login; set an access token (--token-variable)"
                return
        self.last_failure = f"{repo}: {failure}"
        if failure.status in PAUSING:
            seconds = self.pace.failed(started, self.last_failure, failure.retry_after)
            if seconds > ANNOUNCED_SECONDS:
                print(printable(f"{self.last_failure}; pausing for {seconds:.0f} s"), file=sys.stderr, flush=True)


class PartScraper:
    """Scrapes the rows of one part into its journal."""

    def __init__(self, scraper: Scraper, journal: Journal, rows: Sequence[Metadata]):
        self._scraper, self._journal, self._rows = scraper, journal, rows
        self._failed: Counter[str] = Counter()  # rounds in which a repository failed
        self._last: dict[str, Status] = {}  # how it failed last
        self._rows_per_fetch: dict[str, int] = {}
        self._repositories = [row.repositories for row in rows]

    def run(self, progress: Progress) -> None:
        """Scrape until nothing is left but what failed --attempts times."""
        progress.update(sum(self._finished(row) for row in range(len(self._rows))))
        while fetches := list(self._fetches()):
            futures = {
                self._scraper.pool.submit(self._scraper.fetch, repo, rows): (repo, rows) for repo, rows in fetches
            }
            failed: set[str] = set()
            try:
                for future in as_completed(futures):
                    repo, rows = futures.pop(future)
                    before = sum(self._finished(row.index) for row in rows)
                    if status := self._keep(future, repo, rows):
                        failed.add(repo)
                        self._last[repo] = status
                    note = f"{self._scraper.server.requests:,} requests"
                    progress.update(sum(self._finished(row.index) for row in rows) - before, note)
            finally:
                for future in futures:
                    future.cancel()
            self._failed.update(failed)

    def _keep(self, future: "Future[Batch]", repo: str, rows: Sequence[Wanted]) -> Status | None:
        """Put the results of a fetch into the journal; its status if it failed."""
        try:
            batch = future.result()
        except FetchFailed as failure:
            if failure.status in SPLIT and len(rows) > 1:
                self._rows_per_fetch[repo] = len(rows) // 2
                if failure.status == Status.TOO_LARGE:
                    return None  # not an attempt: fewer rows are another request
            elif failure.status == Status.TOO_LARGE:
                batch = Batch(self._scraper.scratch / "too_large.jsonl", repo)
                for row in rows:
                    batch.add(Result(row.index, failure.status))
                batch.close()
                self._append(batch)
                return None
            return failure.status
        self._append(batch)
        return None

    def _append(self, batch: Batch) -> None:
        with writing(self._journal.path):
            self._journal.append(batch)
        batch.discard()

    def _fetches(self) -> Iterator[tuple[str, list[Wanted]]]:
        """The next round: for every row that is not finished its next repository, by repository."""
        groups: dict[str, list[Wanted]] = defaultdict(list)
        for i, row in enumerate(self._rows):
            if repo := self._next_repository(i):
                groups[repo].append(Wanted(i, row.commit, row.old_file, row.new_file, row.old_blob, row.new_blob))
        for repo, rows in groups.items():
            size = min(MAX_IDS, self._rows_per_fetch.get(repo, MAX_IDS))
            yield from ((repo, rows[start : start + size]) for start in range(0, len(rows), size))

    def _next_repository(self, row: int) -> str | None:
        """The first repository of a row that was not asked yet, or failed and is to be retried."""
        if self._journal.final(row):
            return None
        tried = self._journal.tried.get(row, {})
        attempts = self._scraper.attempts
        return next((r for r in self._repositories[row] if r not in tried and self._failed[r] < attempts), None)

    def _finished(self, row: int) -> bool:
        """Whether every repository gave an answer that needs no retry, or one gave a final one."""
        tried: Mapping[str, Status] = self._journal.tried.get(row, {})
        return self._journal.final(row) is not None or all(repo in tried for repo in self._repositories[row])

    def status(self, row: int) -> tuple[Status, str]:
        """Status of a row, and the repository that it is from ("" if none was asked).

        It is one of RETRIED if a repository that failed may still have the commit.
        """
        tried = self._journal.tried.get(row, {})
        if final := self._journal.final(row):
            return final, next(repo for repo, status in tried.items() if status == final)
        for repo in self._repositories[row]:
            if repo not in tried:
                return self._last.get(repo, Status.SERVER_ERROR), repo
        if not tried:  # no usable name of a repository
            return Status.REPO_GONE, ""
        status = best(tried.values())
        return status, next(repo for repo, found in tried.items() if found == status)

    def unfinished(self) -> Counter[Status]:
        """Rows that are to be retried, by status."""
        statuses = (self.status(row)[0] for row in range(len(self._rows)))
        return Counter(status for status in statuses if status in RETRIED)
