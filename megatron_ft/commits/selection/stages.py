"""The five SQL stages that select CommitPack's commits, in BigQuery's dialect, and their DuckDB
form.

Each stage is one query in a file of its own. It reads tables of github_repos and of earlier stages,
and its parameters are lists of strings: `x IN UNNEST(@name)`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.files.json_file import read_small_text

PUBLIC_DATASET = "bigquery-public-data.github_repos"
NAMES = (
    "commits_table_base",
    "commits_table_dedup",
    "commits_table_dedup_difference",
    "commits_table_dedup_files",
    "commits_table_final",
)
FINAL = NAMES[-1]
# Rows of one repository are adjacent in the result, which the scraper fetches together.
ORDER = {FINAL: "repos, commit"}


@dataclass(frozen=True)
class Stage:
    """One query, and the table that its rows go to. `lists` has the values of its parameters."""

    table: str
    path: Path
    sql: str  # BigQuery's dialect
    lists: Mapping[str, Sequence[str]]

    @cached_property
    def _query(self) -> Any:
        sqlglot = require("sqlglot", "dataset")
        try:
            return sqlglot.parse_one(self.sql, read="bigquery")
        except sqlglot.errors.SqlglotError as error:
            raise UserError(f"{self.path}: not a query in BigQuery's dialect ({str(error).splitlines()[0]})") from error

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of the tables it reads: those of github_repos without their dataset."""
        exp = require("sqlglot.expressions", "dataset")
        defined = {common.alias for common in self._query.find_all(exp.CTE)}
        names = {found.name for found in self._query.find_all(exp.Table)}
        return tuple(sorted(names - defined))

    @property
    def digest(self) -> str:
        """Changes with the query and with its lists."""
        return digest_of([self.sql, {name: list(values) for name, values in self.lists.items()}])

    def duckdb_sql(self) -> str:
        """The query in DuckDB's dialect, its lists written out, its tables without a dataset."""
        exp = require("sqlglot.expressions", "dataset")
        query = self._query.copy()
        for table in query.find_all(exp.Table):
            table.set("db", None)
            table.set("catalog", None)
        for found in list(query.find_all(exp.In)):
            parameter = found.args.get("unnest") and found.args["unnest"].find(exp.Parameter)
            if parameter:
                found.set("unnest", None)
                found.set("expressions", [exp.Literal.string(value) for value in self.lists[parameter.name]])
        for join in [join for join in query.find_all(exp.Join) if isinstance(join.this, exp.Unnest)]:
            _unnest_in_its_table(join)
        sql = query.sql(dialect="duckdb")
        return f"SELECT * FROM ({sql}) ORDER BY {ORDER[self.table]}" if self.table in ORDER else sql

    def bigquery_sql(self, source: str) -> str:
        """The query with github_repos' tables in the dataset `source`, as PROJECT.DATASET."""
        return self.sql.replace(f"`{PUBLIC_DATASET}.", f"`{source}.")


def _unnest_in_its_table(join: Any) -> None:
    """`FROM t CROSS JOIN UNNEST(t.list) AS x` as `FROM (SELECT *, UNNEST(list) AS x FROM t) AS t`.

    DuckDB streams the second; for the first, it keeps all of the table in memory.
    """
    exp = require("sqlglot.expressions", "dataset")
    (column,), name = join.this.expressions, join.this.args["alias"].columns[0].name
    (table,) = (found for found in join.parent.find_all(exp.Table) if found.alias == column.table)
    source = exp.to_table(table.name)
    inner = exp.select("*", exp.alias_(exp.Explode(this=exp.column(column.name)), name)).from_(source)
    table.replace(inner.subquery(table.alias))
    join.pop()


def load_stages(directory: Path, lists: Mapping[str, Sequence[str]]) -> list[Stage]:
    """The stages of a directory in their order. Each gets those of `lists` that its query names."""
    stages = []
    for number, table in enumerate(NAMES, 1):
        path = directory / f"sql_{number}_{table}.sql"
        sql = read_small_text(path, "a query")
        used = {name: values for name, values in lists.items() if f"UNNEST(@{name})" in sql}
        stages.append(Stage(table, path, sql, used))
    return stages


def read_list(path: Path) -> list[str]:
    """The lines of a list, without blank lines and lines that start with #; UserError if none is
    left."""
    lines = [line.strip() for line in read_small_text(path, "one value per line").splitlines()]
    values = [line for line in lines if line and not line.startswith("# ")]
    if not values:
        raise UserError(f"{path}: empty list; expected one value per line")
    return values


def digest_of(value: Any) -> str:
    """Digest of a value that JSON can express, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
