"""From a journal of repositories to the tables commits, licenses and languages of github_repos."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ft.commits.selection.database import PARQUET, Database, literal
from megatron_ft.commits.selection.github_tables import DIFFERENCE, MAX_LINE_BYTES, sql_type
from megatron_ft.commits.selection.journal import Entry
from megatron_ft.files.atomic import sync_path
from megatron_ft.files.output import scratch_directory, writing

FORMATS = {"parquet": PARQUET, "jsonl": "FORMAT json"}
PERSON = "STRUCT(name VARCHAR, time_sec BIGINT, tz_offset BIGINT)"
COLUMNS = {
    "commit": "VARCHAR",
    "tree": "VARCHAR",
    "parent": "VARCHAR[]",
    "author": PERSON,
    "committer": PERSON,
    "subject": "VARCHAR",
    "message": "VARCHAR",
    "repo_name": "VARCHAR[]",
    "difference": sql_type(DIFFERENCE),
    "difference_truncated": "BOOLEAN",
}
ENTRY = {
    "name": "VARCHAR",
    "status": "VARCHAR",
    "license": "VARCHAR",
    "languages": "STRUCT(name VARCHAR, bytes BIGINT)[]",
}


def person(column: str) -> str:
    """SQL of an author or committer with the time as a timestamp in UTC."""
    fields = f"name: {column}.name, time_sec: {column}.time_sec, tz_offset: {column}.tz_offset"
    return f"{{{fields}, date: make_timestamp({column}.time_sec * 1000000)}} AS {column}"


# A commit of several repositories, such as forks, is one row; that of the first one is taken.
# Lists of names are all that is held in memory.
COMMITS = f"""
WITH names AS (
  SELECT commit, list_sort(list(repo_name[1])) AS repo_name FROM journal GROUP BY commit
)
SELECT journal.commit, tree, parent, {person("author")}, {person("committer")}, subject, message,
  names.repo_name, difference, difference_truncated
FROM journal JOIN names ON names.commit = journal.commit AND names.repo_name[1] = journal.repo_name[1]
ORDER BY names.repo_name, journal.commit
"""
LICENSES = "SELECT name AS repo_name, license FROM manifest WHERE status = 'ok' ORDER BY name"
LANGUAGES = "SELECT name AS repo_name, languages AS language FROM manifest WHERE status = 'ok' ORDER BY name"
QUERIES = {"commits": COMMITS, "licenses": LICENSES, "languages": LANGUAGES}


def write_tables(journal: Path, manifest: Path, outputs: dict[str, Path], format: str, memory: int | None) -> int:
    """Write the three tables; returns the rows of commits. Each appears complete or not at all."""
    directory, rows = journal.parent, {}
    with writing(directory), scratch_directory(directory, ".commits_table") as scratch:
        with Database(scratch, memory) as database:
            for name, path, columns in (("journal", journal, COLUMNS), ("manifest", manifest, ENTRY)):
                types = ", ".join(f"{column}: {literal(kind)}" for column, kind in columns.items())
                options = f"format = 'newline_delimited', maximum_object_size = {MAX_LINE_BYTES}"
                database.run(
                    f"CREATE VIEW {name} AS SELECT * FROM read_json({literal(path)}, {options}, columns = {{{types}}})"
                )
            for table, query in QUERIES.items():
                partial = scratch / outputs[table].name
                ((rows[table],),) = database.run(f"COPY ({query}) TO {literal(partial)} ({FORMATS[format]})", table)
                sync_path(partial)
                os.rename(partial, outputs[table])
            sync_path(directory)
    return rows["commits"]


def counts(entries: Iterable[Entry], statuses: Sequence[str]) -> dict[str, int]:
    """Number of repositories of each status."""
    found = [entry.status for entry in entries]
    return {status: found.count(status) for status in statuses}
