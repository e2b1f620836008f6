"""The tables of BigQuery's public dataset github_repos: their columns, and files that hold them.

`commits` has one row per commit with the repositories that contain it and the files it changed,
`licenses` and `languages` one row per repository. Files are parquet or JSONL, as BigQuery exports
them and commits_table.py writes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ft.commits.selection.database import MAX_LINE_BYTES, Database, literal, literals
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import Source

DIFFERENCE = {
    "old_mode": "BIGINT",  # git's file mode as an integer: 33188 is 100644; NULL for an added file
    "new_mode": "BIGINT",
    "old_path": "VARCHAR",
    "new_path": "VARCHAR",
    "old_sha1": "VARCHAR",  # the blob's id
    "new_sha1": "VARCHAR",
}
# Columns that the stages read, with DuckDB's types; a dictionary is a list of such records.
TABLES: dict[str, dict[str, Any]] = {
    "commits": {
        "commit": "VARCHAR",
        "subject": "VARCHAR",
        "message": "VARCHAR",
        "repo_name": "VARCHAR[]",
        "difference": DIFFERENCE,
        "difference_truncated": "BOOLEAN",
    },
    "licenses": {"repo_name": "VARCHAR", "license": "VARCHAR"},
    "languages": {"repo_name": "VARCHAR", "language": {"name": "VARCHAR", "bytes": "BIGINT"}},
}
# BigQuery's JSON leaves out what is NULL or empty.
MAY_BE_ABSENT = {"difference", "difference_truncated", "subject", "message"}
SAMPLE_ROWS = 1000


def sql_type(of: Any) -> str:
    """DuckDB's type of an entry of TABLES.

    >>> sql_type({"name": "VARCHAR", "bytes": "BIGINT"})
    'STRUCT(name VARCHAR, bytes BIGINT)[]'
    """
    if isinstance(of, str):
        return of
    return f"STRUCT({', '.join(f'{name} {kind}' for name, kind in of.items())})[]"


def create_view(database: Database, table: str, sources: Sequence[Source]) -> None:
    """A view named `table` over its files. UserError if a file has not the columns of TABLES."""
    columns = TABLES[table]
    casts = ", ".join(f"CAST({name} AS {sql_type(of)}) AS {name}" for name, of in columns.items())
    parts = []
    for parquet in (True, False):
        paths = [source.path for source in sources if (source.kind == "parquet") == parquet]
        for path in paths:
            _check(database, table, path, _read_parquet([path]) if parquet else _read_sample(path))
        if paths:
            read = _read_parquet(paths) if parquet else _read_json(paths, columns)
            parts.append(f"SELECT {casts} FROM {read}")
    database.run(f"CREATE VIEW {table} AS {' UNION ALL '.join(parts)}")


def _check(database: Database, table: str, path: Path, read: str) -> None:
    """UserError unless a file has the columns; of JSONL, only the first rows are looked at."""
    found = database.columns(f"SELECT * FROM {read}")
    parquet = read.startswith("read_parquet")
    optional = set() if parquet else MAY_BE_ABSENT
    missing = [name for name in TABLES[table] if name not in found and name not in optional]
    wrong = [
        f"{name} is {found[name]}"
        for name, of in TABLES[table].items()
        if parquet and name in found and not _fits(of, found[name])
    ]
    if missing or wrong:
        problem = f"no column {', '.join(missing)}" if missing else f"column {'; '.join(wrong)}"
        expected = ", ".join(f"{name} {sql_type(of)}" for name, of in TABLES[table].items())
        raise UserError(
            f"{path}: {problem}; it has {', '.join(list(found)[:20])}; expected github_repos' table {table}: {expected}"
        )


def _fits(of: Any, found: Any) -> bool:
    """Whether values of the DuckDB type `found` can be read as the entry `of` of TABLES."""
    kind = found.id
    if isinstance(of, dict):
        if kind != "list" or found.child.id != "struct":
            return False
        fields = dict(found.child.children)
        return all(name in fields and _fits(inner, fields[name]) for name, inner in of.items())
    if of.endswith("[]"):
        return kind == "list" and _fits(of[:-2], found.child)
    if of == "BIGINT":
        return "int" in kind  # tinyint to hugeint, signed or not
    return kind == of.lower()


def _read_parquet(paths: Sequence[Path]) -> str:
    return f"read_parquet({literals(paths)}, union_by_name = true)"


def _read_json(paths: Sequence[Path], columns: dict[str, Any]) -> str:
    types = ", ".join(f"{name}: {literal(sql_type(of))}" for name, of in columns.items())
    return f"read_json({literals(paths)}, {_json_options()}, columns = {{{types}}})"


def _read_sample(path: Path) -> str:
    return f"read_json({literals([path])}, {_json_options()}, sample_size = {SAMPLE_ROWS})"


def _json_options() -> str:
    return f"format = 'newline_delimited', maximum_object_size = {MAX_LINE_BYTES}"
