"""DuckDB within what a job may use: its memory, its cores, and a directory for what does not fit.

DuckDB 2 refuses a second statement while the first one's rows are not fetched, and does not notice
signals while it works; `Database.run` fetches and can be interrupted.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.progress import Progress

MEMORY_FRACTION = 0.75  # of what the job may use; the rest is for what DuckDB does not count
# What a JSON line may be long, in bytes. DuckDB reserves a few times as much for each thread.
MAX_LINE_BYTES = 32 << 20
# How a parquet file is written. A row group is held in memory until it is complete, one per thread;
# rows with a message and all files of a commit are large.
PARQUET = "FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 16384"


class Database:
    """A database in memory that spills to `scratch`. Use as a context manager.

    `memory` is its limit in bytes (default: MEMORY_FRACTION of `usable_memory()`). Raises UserError
    if DuckDB is not installed.
    """

    def __init__(self, scratch: Path, memory: int | None = None):
        self._duckdb = require("duckdb", "dataset")
        self._memory = memory or int(MEMORY_FRACTION * usable_memory())
        self._scratch = scratch
        self._connection = self._duckdb.connect(
            config={
                "memory_limit": f"{self._memory}B",
                "threads": len(os.sched_getaffinity(0)),
                "temp_directory": str(scratch),
                "preserve_insertion_order": False,  # takes memory; what is ordered has an ORDER BY
                "autoinstall_known_extensions": False,  # compute nodes have no internet
            }
        )
        self.run("SET enable_progress_bar = true")  # counts, which is all that is wanted
        self.run("SET enable_progress_bar_print = false")

    def run(self, sql: str, task: str = "") -> list[tuple[Any, ...]]:
        """The rows of a statement; with `task`, its progress is shown. Raises UserError if memory,
        disk or an input file is the cause; an exception of a signal handler ends the statement."""
        rows: list[tuple[Any, ...]] = []
        failed: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                rows.extend(self._connection.execute(sql).fetchall())
            except BaseException as error:  # raised by the caller's thread
                failed.append(error)
            finally:
                done.set()

        threading.Thread(target=work, daemon=True).start()
        try:
            self._wait(done, task)
        except BaseException:
            self._connection.interrupt()
            done.wait()
            raise
        if failed:
            raise self._user_error(failed[0]) from failed[0]
        return rows

    def _wait(self, done: threading.Event, task: str) -> None:
        """Wait for a statement, waking up so that handlers of signals run."""
        if not task:
            while not done.wait(0.1):
                pass
            return
        with Progress(task, 100, "%") as progress:
            while not done.wait(0.1):
                percent = int(self._connection.query_progress())  # -1 while it is unknown
                progress.update(max(0, percent - progress.done))
            progress.update(100 - progress.done)

    def columns(self, sql: str) -> dict[str, Any]:
        """Names and DuckDB types of a query's columns; raises as `run`."""
        try:
            relation = self._connection.sql(sql)
        except self._duckdb.Error as error:
            raise self._user_error(error) from error
        return dict(zip(relation.columns, relation.types, strict=True))

    def _user_error(self, error: BaseException) -> BaseException:
        """The error as a UserError, unless it is a bug."""
        what = str(error).strip().split("\n")[0].split(" Error: ", 1)[-1].rstrip(". ")
        kinds = self._duckdb
        if isinstance(error, kinds.OutOfMemoryException):
            if "max_temp_directory_size" in str(error):
                return UserError(f"{self._scratch}: disk full ({what}); free disk space")
            return UserError(
                f"{self._memory >> 20} MiB of memory are too few ({what}); ask SLURM for more (--mem), or raise --memory"
            )
        if isinstance(error, kinds.IOException):
            return UserError(f"{what}; free disk space, or check the file and its permissions")
        if isinstance(error, kinds.InvalidInputException | kinds.ConversionException):
            return UserError(f"{what}; expected the columns of BigQuery's github_repos, see docs/dataset.md")
        if type(error) is kinds.Error:  # the end of a parquet file, which tells where the rest is
            return UserError(f"a parquet file is damaged ({what}); copy it again")
        return error

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def usable_memory() -> int:
    """Bytes that this job may use: SLURM's allocation on this node, if any, and no more than what
    the machine has available."""
    available = psutil.virtual_memory().available
    for name, count in (("SLURM_MEM_PER_NODE", "1"), ("SLURM_MEM_PER_CPU", os.environ.get("SLURM_CPUS_ON_NODE", "1"))):
        mebibytes = os.environ.get(name, "")
        if mebibytes.isdecimal() and int(mebibytes) and count.isdecimal():  # 0 is all of the node
            available = min(available, int(mebibytes) * int(count) << 20)
    return available


def literal(text: object) -> str:
    """A string literal of SQL.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + str(text).replace("'", "''") + "'"


def literals(texts: Sequence[object]) -> str:
    """A list of string literals.

    >>> literals(["a", "b"])
    "['a', 'b']"
    """
    return f"[{', '.join(map(literal, texts))}]"
