"""The stages of stages.py on BigQuery, by the command `bq` of Google Cloud's CLI."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.commits.selection.stages import PUBLIC_DATASET, Stage, digest_of
from megatron_ft.errors import UserError

PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")
DATASET = re.compile(r"\w{1,1024}", re.ASCII)
EXPORT_URI = re.compile(r"gs://[^\s'\"\\`*]+(/[^\s'\"\\`*]*)*\*[^\s'\"\\`*]*")
LABEL = "made_from"  # of a table: what it was made from, so that it is not made twice


@dataclass(frozen=True)
class Command:
    """A command line, and the query that it reads from standard input."""

    arguments: list[str]
    query: str
    path: str | None  # the file that has just this query

    def __str__(self) -> str:
        """As typed in a shell."""
        line = shlex.join(self.arguments)
        return f"{line} < {shlex.quote(self.path)}" if self.path else f"{line} <<'SQL'\n{self.query.strip()}\nSQL"


@dataclass(frozen=True)
class BigQuery:
    """Where stages read and write. Raises UserError for names that BigQuery does not allow."""

    project: str  # which pays
    dataset: str  # of the tables that are written
    source: str = PUBLIC_DATASET  # PROJECT.DATASET of commits, licenses and languages
    dry_run: bool = False
    max_bytes_billed: int | None = None

    def __post_init__(self) -> None:
        project, _, dataset = self.source.rpartition(".")
        for flag, name, allowed in (
            ("--project", self.project, PROJECT),
            ("--dataset", self.dataset, DATASET),
            ("--source project", project, PROJECT),
            ("--source dataset", dataset, DATASET),
        ):
            if not allowed.fullmatch(name):
                raise UserError(f"{flag} {name!r}: not a name in BigQuery; expected such as {PUBLIC_DATASET}")

    def command(self, stage: Stage) -> Command:
        """The command that writes the table of a stage, or with `dry_run` prints the bytes that it
        would scan."""
        arguments = self._bq("query", f"--destination_table={self._name(stage.table)}")
        arguments += [
            f"--parameter={name}:ARRAY<STRING>:{json.dumps(list(values), ensure_ascii=False)}"
            for name, values in stage.lists.items()
        ]
        sql = stage.bigquery_sql(self.source)
        return Command(arguments, sql, str(stage.path) if sql == stage.sql else None)

    def export(self, table: str, uri: str) -> Command:
        """The command that exports a table as parquet files; `uri` is gs://... with one *."""
        if not EXPORT_URI.fullmatch(uri):
            raise UserError(f"--export-uri {uri}: expected gs://BUCKET/PATH-*.parquet, with one *")
        options = f"uri='{uri}', format='PARQUET', compression='ZSTD', overwrite=true"
        query = f"EXPORT DATA OPTIONS({options}) AS\nSELECT * FROM {table}"
        return Command(self._bq("query"), query, None)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages whose tables do not exist. UserError if a command fails, or a table was
        made from other inputs."""
        if shutil.which("bq") is None:
            raise UserError("bq is not installed, or not in PATH; install the Google Cloud CLI")
        made: dict[str, str] = {}
        for stage in stages:
            made_from = digest_of([stage.digest, *(made.get(table, self.source) for table in stage.reads)])
            made[stage.table] = made_from
            found = self._show(stage.table)
            if found is not None:
                self._check(stage.table, found, made_from)
                print(f"{stage.table}: exists, skipped", file=sys.stderr)
                continue
            absent = [table for table in stage.reads if table in made and self._show(table) is None]
            if self.dry_run and absent:
                print(f"{stage.table}: can be estimated once {', '.join(absent)} exists", file=sys.stderr)
                continue
            self.execute(self.command(stage), stage.table)
            if not self.dry_run:
                self._captured("update", "--set_label", f"{LABEL}:{made_from}", self._name(stage.table))
                rows = (self._show(stage.table) or {}).get("numRows", "?")
                print(f"{stage.table}: {rows} rows", file=sys.stderr)

    def execute(self, command: Command, what: str) -> None:
        """Run a command; its output is the user's. UserError if it fails."""
        status = subprocess.run(command.arguments, input=command.query, encoding="utf-8").returncode
        if status:
            raise UserError(f"{what}: bq ended with status {status}, see its output; then run this command again")

    def _show(self, table: str) -> dict[str, Any] | None:
        """What BigQuery knows of a table; None if it does not exist."""
        done = subprocess.run(
            self._bq("show", "--format=json", self._name(table)), capture_output=True, encoding="utf-8"
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        if "not found" in (done.stdout + done.stderr).lower():
            return None
        raise self._failed("show", done)

    def _check(self, table: str, found: dict[str, Any], made_from: str) -> None:
        if found.get("labels", {}).get(LABEL) != made_from:
            name = self._name(table)
            raise UserError(
                f"{name}: was made from other inputs, or not completed; delete it and those of later stages "
                f"(bq rm -t {name}), or choose another --dataset"
            )

    def _captured(self, *command: str) -> None:
        done = subprocess.run(self._bq(*command), capture_output=True, encoding="utf-8")
        if done.returncode:
            raise self._failed(command[0], done)

    def _failed(self, command: str, done: subprocess.CompletedProcess[str]) -> UserError:
        why = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        return UserError(f"bq {command} ended with status {done.returncode} ({why[-1]}); gcloud auth login signs in")

    def _name(self, table: str) -> str:
        return f"{self.project}:{self.dataset}.{table}"

    def _bq(self, command: str, *arguments: str) -> list[str]:
        """A command line of bq: its global flags come first."""
        flags = ["bq", f"--project_id={self.project}"]
        if command == "show":
            return [*flags, arguments[0], command, *arguments[1:]]
        if command != "query":
            return [*flags, command, *arguments]
        flags += [f"--dataset_id={self.project}:{self.dataset}", command, "--use_legacy_sql=false", "--max_rows=0"]
        if self.max_bytes_billed is not None:
            flags.append(f"--maximum_bytes_billed={self.max_bytes_billed}")
        return [*flags, *(["--dry_run"] if self.dry_run else []), *arguments]
