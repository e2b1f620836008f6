"""dataset/commitpack/select_commits.py --engine bigquery: the command lines of bq, printed and run.

BigQuery cannot run here: a stand-in for bq in PATH records its arguments and standard input, and
keeps the tables as files of JSON. What it is asked for is all that these tests see.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from sqlglot import exp, parse_one

SELECT = "dataset/commitpack/select_commits.py"
FLAGS = ("--engine", "bigquery", "--project", "my-project", "--dataset", "commitpack")
STAND_IN = r"""#!/bin/bash
here=${BASH_SOURCE%/*}
table=${@: -1} label= query= kind=
for argument; do
    case $argument in
        query | show | update) kind=$argument ;;
        --destination_table=*) destination=${argument#*=} ;;
        --dry_run) dry_run=1 ;;
        made_from:*) label=${argument#*:} ;;
    esac
done
[ $kind = query ] && query=$(</dev/stdin)
printf '%s\0' "$@" >> "$here/calls"
printf '%s\x1e' "$query" >> "$here/calls"
if [ $kind = query ]; then
    [ -n "$BQ_FAILS" ] && [[ $destination == *$BQ_FAILS ]] && { echo "Resources exceeded"; exit 1; }
    if [ -n "$dry_run" ]; then
        echo "running this query will process 123 bytes of data."
    elif [ -n "$destination" ]; then
        echo '{"numRows": "7"}' > "$here/$destination"
    fi
elif [ ! -e "$here/$table" ]; then
    echo "BigQuery error in $kind operation: Not found: Table $table"
    exit 2
elif [ $kind = show ]; then
    echo "$(< "$here/$table")"
else
    printf '{"numRows": "7", "labels": {"made_from": "%s"}}' "$label" > "$here/$table"
fi
"""


@pytest.fixture
def bq(tmp_path) -> Path:
    """Directory of a stand-in for bq."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "bq").write_text(STAND_IN, encoding="utf-8")
    (directory / "bq").chmod(0o755)
    return directory


def environment(bq: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{bq}:{os.environ['PATH']}", **variables}


def calls(bq: Path) -> list[tuple[list[str], str]]:
    """Arguments and queries of the calls of `bq query` since the last look."""
    path = bq / "calls"
    found = path.read_text(encoding="utf-8").split("\x1e")[:-1] if path.exists() else []
    path.unlink(missing_ok=True)
    parts = [call.split("\0") for call in found]
    return [(arguments, query) for *arguments, query in parts if "query" in arguments]


@pytest.mark.parametrize("source", ["bigquery-public-data.github_repos", "my-project.mirrors"])
def test_printed_commands_are_those_that_run(bq, source, tmp_path):
    uri = "gs://bucket/commits-*.parquet"
    flags = (*FLAGS, "--source", source, "--export-uri", uri, "--max-bytes-billed", "1000")
    printed = run_program(SELECT, *flags).stdout
    subprocess.run(["bash", "-e"], input=printed, encoding="utf-8", check=True, cwd=ROOT, env=environment(bq))
    typed = calls(bq)
    for path in bq.glob("my-project*"):
        path.unlink()
    run_program(SELECT, *flags, "--run", env=environment(bq))
    ran = calls(bq)
    assert typed == ran
    assert len(ran) == 6 and ran[-1][1].startswith("EXPORT DATA OPTIONS(uri='gs://bucket/commits-*.parquet'")
    for arguments, query in ran[:-1]:
        names = {f"{t.catalog}.{t.db}" for t in parse_one(query, read="bigquery").find_all(exp.Table) if t.db}
        assert names <= {source}
        assert arguments[:2] == ["--project_id=my-project", "--dataset_id=my-project:commitpack"]
        assert "--use_legacy_sql=false" in arguments and "--maximum_bytes_billed=1000" in arguments


def test_lists_are_parameters_in_bq_s_form(bq):
    run_program(SELECT, *FLAGS, "--run", env=environment(bq))
    (first, query), (second, _) = calls(bq)[:2]
    given = dict(part.removeprefix("--parameter=").split(":", 1) for part in first if part.startswith("--parameter="))
    assert set(given) == {parameter.name for parameter in parse_one(query, read="bigquery").find_all(exp.Parameter)}
    kind, _, values = given["noise_subjects"].partition(":")
    assert kind == "ARRAY<STRING>" and "can't you see i'm updating the time?" in json.loads(values)
    assert not any(part.startswith("--parameter") for part in second)


def test_tables_that_exist_are_skipped_unless_made_from_other_inputs(bq):
    done = run_program(SELECT, *FLAGS, "--run", env=environment(bq))
    assert "commits_table_final: 7 rows" in done.stderr and "this exports the result:" in done.stderr
    calls(bq)
    done = run_program(SELECT, *FLAGS, "--run", env=environment(bq))
    assert done.stderr.count("exists, skipped") == 5 and calls(bq) == []
    other = run_program(SELECT, *FLAGS, "--run", "--allowed-licenses", "mit", env=environment(bq), ok=False)
    assert "bq rm -t my-project:commitpack.commits_table_base" in one_error_line(other)
    (bq / "my-project:commitpack.commits_table_final").unlink()
    calls(bq)
    run_program(SELECT, *FLAGS, "--run", env=environment(bq))
    assert len(calls(bq)) == 1


def test_a_stage_that_fails_stops_the_run_which_continues_there(bq):
    failing = environment(bq, BQ_FAILS="_dedup")
    error = one_error_line(run_program(SELECT, *FLAGS, "--run", env=failing, ok=False))
    assert "commits_table_dedup: bq ended with status 1" in error
    assert len(calls(bq)) == 2
    run_program(SELECT, *FLAGS, "--run", env=environment(bq))
    assert len(calls(bq)) == 4


def test_dry_run_asks_for_bytes_and_makes_no_table(bq):
    assert run_program(SELECT, *FLAGS, "--dry-run").stdout.count("--dry_run") == 6
    done = run_program(SELECT, *FLAGS, "--dry-run", "--run", env=environment(bq))
    assert done.stdout.count("will process 123 bytes") == 1
    assert done.stderr.count("can be estimated once") == 4
    assert len(calls(bq)) == 1 and list(bq.glob("my-project*")) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((*FLAGS[:4],), "needs --dataset"),
        ((*FLAGS, "--source", "x`; DROP TABLE y"), "not a name in BigQuery"),
        ((*FLAGS[:5], "a-b"), "--dataset 'a-b': not a name in BigQuery"),
        ((*FLAGS, "--export-uri", "gs://bucket/one.parquet"), "with one *"),
        ((*FLAGS, "--export-uri", "gs://b/'*"), "with one *"),
    ],
)
def test_bad_names_are_one_line(flags, expected):
    assert expected in one_error_line(run_program(SELECT, *flags, ok=False))


def test_without_bq_it_is_one_line(tmp_path):
    done = run_program(SELECT, *FLAGS, "--run", env={**os.environ, "PATH": str(tmp_path)}, ok=False)
    assert "bq is not installed" in one_error_line(done)
