"""The stages of stages.py on this machine: each writes a parquet table, once.

A table holds in its metadata what it was made from: digests of its query and lists, and of the
tables it was read from, down to the names, sizes and times of the input files.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ft.commits.selection.database import PARQUET, Database, literal
from megatron_ft.commits.selection.github_tables import TABLES, create_view
from megatron_ft.commits.selection.stages import Stage, digest_of
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_path
from megatron_ft.files.json_file import parse_json
from megatron_ft.files.jsonl import Source
from megatron_ft.files.output import scratch_directory, writing
from megatron_ft.files.report import write_report
from megatron_ft.printable import printable

MADE_FROM = "made_from"  # key in the metadata of a table
QUERY = "query"


def run_stages(
    stages: Sequence[Stage], inputs: Mapping[str, Sequence[Source]], directory: Path, memory: int | None = None
) -> Path:
    """Write the tables of the stages to `directory`, except existing ones; returns the last, and
    warns if it has no rows.

    `inputs` are the files of each table of github_repos. A table appears complete or not at all,
    with its `_report.json`: rows in and out. Raises UserError if a table was made from other inputs
    than these.
    """
    made = {table: digest_of([_identity(source) for source in sources]) for table, sources in inputs.items()}
    with writing(directory), scratch_directory(directory, ".select_commits") as scratch:
        with Database(scratch, memory) as database:
            tables = Tables(database, inputs, directory)
            for stage in stages:
                made_from = {QUERY: stage.digest} | {table: made[table] for table in stage.reads}
                made[stage.table] = digest_of(made_from)
                tables.complete(stage, made_from, scratch)
            tables.warn_of_none(stages)
    return directory / f"{stages[-1].table}.parquet"


def _identity(source: Source) -> list[str | int]:
    return [source.path.name, source.size, source.path.stat().st_mtime_ns]


class Tables:
    """The tables of a run: views over input files and over the tables of stages."""

    def __init__(self, database: Database, inputs: Mapping[str, Sequence[Source]], directory: Path):
        self._database, self._inputs, self._directory = database, inputs, directory
        self._rows: dict[str, int] = {}  # of each table that has a view

    def complete(self, stage: Stage, made_from: dict[str, str], scratch: Path) -> None:
        """Write the table of a stage, or check that the existing one has the same origin."""
        path = self._directory / f"{stage.table}.parquet"
        if path.exists():
            self._check(path, made_from)
            print(f"{stage.table}: exists, skipped", file=sys.stderr)
            return
        start, partial = time.monotonic(), scratch / path.name
        rows_in = {table: self._view(table) for table in stage.reads}
        metadata = f"{{{MADE_FROM}: {literal(json.dumps(made_from))}}}"
        copy = f"COPY ({stage.duckdb_sql()}) TO {literal(partial)}"
        ((rows,),) = self._database.run(f"{copy} ({PARQUET}, KV_METADATA {metadata})", stage.table)
        seconds = time.monotonic() - start
        write_report(path, {"rows_in": rows_in, "rows_out": rows, "seconds": round(seconds, 3)})
        sync_path(partial)
        os.rename(partial, path)
        sync_path(self._directory)
        read = ", ".join(f"{count:,} of {table}" for table, count in rows_in.items())
        print(f"{stage.table}: rows {read} -> {rows:,} ({seconds:.1f} s)", file=sys.stderr)

    def warn_of_none(self, stages: Sequence[Stage]) -> None:
        """Name the first stage that left no rows, if the last one has none."""
        if self._view(stages[-1].table):
            return
        first = next(stage for stage in stages if not self._view(stage.table))
        given = ", ".join(f"{self._view(table):,} of {table}" for table in first.reads)
        print(
            f"warning: no commit was selected: {first.table} made no row of {given}; check that the tables are of "
            "the same repositories, and the lists of licenses, languages and noise subjects",
            file=sys.stderr,
        )

    def _view(self, table: str) -> int:
        """Rows of a table, for which a view is created the first time."""
        if table not in self._rows:
            if table in TABLES:
                create_view(self._database, table, self._inputs[table])
            else:
                path = self._directory / f"{table}.parquet"
                self._database.run(f"CREATE VIEW {table} AS SELECT * FROM read_parquet({literal(path)})")
            ((self._rows[table],),) = self._database.run(f"SELECT COUNT(*) FROM {table}")
        return self._rows[table]

    def _check(self, path: Path, made_from: dict[str, str]) -> None:
        """UserError unless the table of a file was made from this."""
        query = f"SELECT decode(value) FROM parquet_kv_metadata({literal(path)}) WHERE decode(key) = '{MADE_FROM}'"
        try:
            rows = self._database.run(query)
            found = parse_json(rows[0][0], f"its {MADE_FROM}") if rows else {}
        except UserError as error:
            reason = str(error).partition("; ")[0]
            raise UserError(
                f"{path}: cannot be read ({reason}); if it is damaged, delete it and run the command again"
            ) from error
        if found != made_from:
            others = [name for name in sorted(found | made_from) if found.get(name) != made_from.get(name)]
            reason = f"with other inputs ({', '.join(others)} changed)" if found else "by another program"
            name = printable(self._directory)
            raise UserError(
                f"{path}: was made {reason}; delete the tables (rm {name}/commits_table_*), or choose another --output"
            )
