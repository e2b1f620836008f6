"""dataset/commitpack/select_commits.py on DuckDB: five stages select the golden rows, once."""

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlglot
from conftest import ROOT, one_error_line, run_program
from github_repos import (
    SCHEMAS,
    SUBMODULE,
    SYMLINK,
    added,
    commit,
    modified,
    read_parquet,
    write_bigquery_json,
    write_parquet,
)
from sqlglot import exp

SELECT = "dataset/commitpack/select_commits.py"
SQL = sorted((ROOT / "dataset/commitpack/sql").glob("*.sql"))
A_FILE = modified("a.py")
LICENSES = [
    {"repo_name": "a/mit", "license": "mit"},
    {"repo_name": "b/perl", "license": "isc"},
    {"repo_name": "c/gpl", "license": "gpl-3.0"},
    {"repo_name": "d/data", "license": "mit"},
    {"repo_name": "f/fork", "license": "apache-2.0"},
]
LANGUAGES = [
    {"repo_name": name, "language": [{"name": language, "bytes": 9} for language in used]}
    for name, used in {
        "a/mit": ["Python", "C"],  # two of the list: one row each
        "b/perl": ["Perl6"],
        "c/gpl": ["Python"],
        "d/data": ["JSON"],
        "f/fork": ["C"],
    }.items()
]
# What becomes of each commit: None, or the repositories, licenses and file of its row.
CASES = {
    "one file modified": ({"repos": ["a/mit"]}, [A_FILE], ("a/mit", "mit", "a.py")),
    "in forks of two licenses": ({"repos": ["f/fork", "a/mit"]}, [A_FILE], ("a/mit,f/fork", "mit,apache-2.0", "a.py")),
    "in a fork whose license is not allowed": ({"repos": ["c/gpl", "f/fork"]}, [A_FILE], ("f/fork", "apache-2.0", "a.py")),
    "license not allowed": ({"repos": ["c/gpl"]}, [A_FILE], None),
    "no license known": ({"repos": ["e/none"]}, [A_FILE], None),
    "languages not listed": ({"repos": ["d/data"]}, [A_FILE], None),
    "Perl6": ({"repos": ["b/perl"]}, [A_FILE], ("b/perl", "isc", "a.py")),
    "symbolic link": ({}, [modified("link", SYMLINK)], None),
    "file became a link": ({}, [modified("link", new_mode=SYMLINK)], None),
    "submodule": ({}, [modified("sub", SUBMODULE)], None),
    "difference truncated": ({"difference_truncated": True}, [A_FILE], None),
    "renamed": ({}, [modified("a.py", new_path="b.py")], None),
    "added": ({}, [added("b.py")], None),
    "one modified, one added": ({}, [A_FILE, added("b.py")], ("a/mit", "mit", "a.py")),
    "two modified": ({}, [A_FILE, modified("b.py")], None),
    "a file and a link modified": ({}, [A_FILE, modified("link", SYMLINK)], None),
    "same contents": ({}, [modified("a.py", blobs="aa")], None),
    "noise": ({"subject": "Update README.md"}, [A_FILE], None),
    "noise with a newline": ({"subject": "\tupdates \n"}, [A_FILE], None),
    "noise with a quote": ({"subject": "Can't you see I'm updating the time?"}, [A_FILE], None),
    "noise and a body": ({"subject": "wip", "message": "wip\n\nThe body\n"}, [A_FILE], None),
    "no wildcard": ({"subject": "update xconfig.yaml"}, [A_FILE], ("a/mit", "mit", "a.py")),
    "merge": ({"subject": "Merge branch 'x'"}, [A_FILE], None),
    "5 characters": ({"subject": "Adds"}, [A_FILE], None),
    "6 characters": ({"subject": "Fixés"}, [A_FILE], ("a/mit", "mit", "a.py")),
    "9999 characters": ({"subject": "Long", "message": "é" * 9999}, [A_FILE], ("a/mit", "mit", "a.py")),
    "10000 characters": ({"subject": "Long", "message": "x" * 10000}, [A_FILE], None),
}  # fmt: skip


def case_rows() -> tuple[list[dict], list[dict]]:
    """The commits of CASES, and the rows that they must become."""
    commits, expected = [], []
    for number, (name, (fields, difference, row)) in enumerate(CASES.items()):
        found = make(number, name, fields, difference)
        commits.append(found)
        if row:
            repos, licenses, path = row
            blobs = {"old_sha1": "a" * 40, "new_sha1": "b" * 40}
            expected.append(
                {
                    **{name: found[name] for name in ("commit", "subject", "message")},
                    **{"repos": repos, "license": licenses.split(",")[0], "licenses": licenses},
                    **{"old_file": path, "new_file": path, **blobs},
                }
            )
    return commits, sorted(expected, key=lambda row: (row["repos"], row["commit"]))


def make(number: int, name: str, fields: dict, difference: list[dict]) -> dict:
    arguments = {"subject": f"Case: {name}", "repos": ["a/mit"]} | fields
    return commit(f"{number:040x}", arguments.pop("subject"), *difference, **arguments)


@pytest.fixture
def tables(tmp_path) -> dict[str, Path]:
    rows = {"commits": case_rows()[0], "licenses": LICENSES, "languages": LANGUAGES}
    return {table: write_parquet(tmp_path, table, found) for table, found in rows.items()}


def arguments(tables: dict, output: Path) -> list:
    flags = [part for table, paths in tables.items() for part in (f"--{table}", *_list(paths))]
    return [*flags, "--output", output]


def _list(paths) -> list:
    return paths if isinstance(paths, list) else [paths]


def select(tables: dict, output: Path, *more: str, **kwargs) -> list[dict]:
    run_program(SELECT, *arguments(tables, output), *more, **kwargs)
    return read_parquet(output / "commits_table_final.parquet")


def test_the_cases_give_the_golden_rows(tables, tmp_path):
    assert select(tables, tmp_path / "out") == case_rows()[1]


def test_licenses_are_found_in_any_case(tables, tmp_path):
    upper = [entry | {"license": entry["license"].upper()} for entry in LICENSES]
    tables["licenses"] = write_parquet(tmp_path, "licenses", upper, "upper")
    assert select(tables, tmp_path / "out") == case_rows()[1]


def test_json_as_bigquery_exports_it_gives_the_same_rows(tmp_path):
    rows = {"commits": case_rows()[0], "licenses": LICENSES, "languages": LANGUAGES}
    tables = {table: write_bigquery_json(tmp_path, table, found) for table, found in rows.items()}
    assert select(tables, tmp_path / "out") == case_rows()[1]


def test_a_commit_in_several_files_is_one_row(tables, tmp_path):
    """Tables of several shards, in both formats: each has the repositories that it knows."""
    commits, expected = case_rows()
    halves = [[{**row, "repo_name": row["repo_name"][i::2]} for row in commits] for i in range(2)]
    twice = write_bigquery_json(tmp_path, "commits", [*halves[1], *halves[1]], "second")
    files = [write_parquet(tmp_path, "commits", halves[0], "first"), twice]
    assert select(tables | {"commits": files}, tmp_path / "out") == expected


def test_allowed_licenses_languages_and_noise_are_lists_of_the_user(tables, tmp_path):
    (tmp_path / "languages").write_text('# Comment\nJSON\n\nC\'s "quotes"\n', encoding="utf-8")
    (tmp_path / "noise").write_text("CASE: one file modified\n", encoding="utf-8")
    flags = ("--repository-languages", tmp_path / "languages", "--noise-subjects", tmp_path / "noise")
    rows = select(tables, tmp_path / "out", "--allowed-licenses", "mit", *flags)
    assert [row["repos"] for row in rows] == ["d/data"]
    rows = select(tables, tmp_path / "gpl", "--allowed-licenses", "gpl-3.0,agpl-3.0")
    assert {row["license"] for row in rows} == {"gpl-3.0"}


def test_reports_count_the_rows_of_each_stage(tables, tmp_path):
    done = run_program(SELECT, *arguments(tables, tmp_path / "out"))
    reports = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*_report.json")}
    assert len(reports) == 5
    base, final = (reports[f"commits_table_{name}_report.json"] for name in ("base", "final"))
    assert base["rows_in"] == {"commits": len(CASES), "languages": 5, "licenses": 5}
    assert final["rows_out"] == len(case_rows()[1])
    assert final["rows_in"]["commits_table_dedup_files"] == reports["commits_table_dedup_files_report.json"]["rows_out"]
    assert f"-> {final['rows_out']} (" in done.stderr


def test_existing_tables_are_skipped_and_missing_ones_made_again(tables, tmp_path):
    output = tmp_path / "out"
    select(tables, output)
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    final = output / "commits_table_final.parquet"
    content = final.read_bytes()
    final.unlink()
    done = run_program(SELECT, *arguments(tables, output))
    assert done.stderr.count("skipped") == 4 and final.read_bytes() == content
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {final}


@pytest.mark.parametrize("change", ["commits", "licenses", "query"])
def test_tables_of_other_inputs_are_an_error(tables, tmp_path, change):
    output = tmp_path / "out"
    select(tables, output)
    before = {path: path.read_bytes() for path in output.iterdir()}
    more = ("--allowed-licenses", "mit") if change == "query" else ()
    if change != "query":
        os.utime(tables[change], (1, 1))
    error = one_error_line(run_program(SELECT, *arguments(tables, output), *more, ok=False))
    assert f"({change} changed)" in error and f"rm {output}/commits_table_*" in error
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    for path in output.glob("commits_table_*"):
        path.unlink()
    select(tables, output, *more)  # as the error asks


def test_a_table_of_another_program_is_an_error(tables, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_parquet(output, "licenses", LICENSES, "commits_table_dedup")
    error = one_error_line(run_program(SELECT, *arguments(tables, output), ok=False))
    assert "commits_table_dedup.parquet: was made by another program" in error


DAMAGE = {
    "cut": lambda data: data[:-200],
    "footer": lambda data: data[:-600] + bytes(590) + data[-10:],
    "origin": lambda data: data.replace(b'{"query"', b'\0\0query"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_named_and_made_again(tables, tmp_path, damage):
    output = tmp_path / "out"
    rows = select(tables, output)
    path = output / "commits_table_base.parquet"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    error = one_error_line(run_program(SELECT, *arguments(tables, output), ok=False))
    assert f"{path}: cannot be read (" in error and "delete it and run the command again" in error
    path.unlink()  # as the error asks
    assert select(tables, output) == rows


def test_a_selection_of_no_commits_names_the_stage_that_left_none(tables, tmp_path):
    tables["licenses"] = write_parquet(tmp_path, "licenses", [{"repo_name": "x/y", "license": "mit"}], "others")
    for _ in range(2):  # the second time from existing tables
        done = run_program(SELECT, *arguments(tables, tmp_path / "out"))
        assert "warning: no commit was selected: commits_table_base made no row of " in done.stderr
        assert "1 of licenses" in done.stderr


def bad_inputs() -> dict:
    import pyarrow

    strings = pyarrow.schema([(f.name, "string" if f.name == "repo_name" else f.type) for f in SCHEMAS["commits"]])
    row = commit("1" * 40, "A subject", A_FILE, repos=["a/mit"])
    less = {key: value for key, value in A_FILE.items() if not key.endswith("sha1")}
    return {
        "missing column": (pyarrow.Table.from_pylist(LICENSES), "no column commit, subject"),
        "other type": (pyarrow.Table.from_pylist([{**row, "repo_name": "a/mit"}], strings), "repo_name is VARCHAR"),
        "other record": (pyarrow.Table.from_pylist([{**row, "difference": [less]}]), "column difference is STRUCT"),
        "cut parquet": (b"PAR1" + b"x" * 100, "cut.parquet"),
        "other keys": (b'{"inputs": "x", "outputs": "y"}\n', "no column commit, repo_name; it has inputs, outputs"),
        "no JSON": (b'{"commit": "1", "repo_name": ["a/mit"]}\n{"commit": \n', "Malformed JSON in file"),
        "wrong value": (b'{"commit": "1", "repo_name": "a/mit"}\n', "line 1"),
    }


@pytest.mark.parametrize("kind", bad_inputs())
def test_bad_inputs_are_one_line(tables, tmp_path, kind):
    import pyarrow.parquet

    content, expected = bad_inputs()[kind]
    path = tmp_path / ("bad.parquet" if not isinstance(content, bytes) else "bad.jsonl")
    if kind == "cut parquet":
        path = tmp_path / "cut.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pyarrow.parquet.write_table(content, path)
    output = tmp_path / "out"
    error = one_error_line(run_program(SELECT, *arguments(tables | {"commits": path}, output), ok=False))
    assert path.name in error and expected in error, error
    assert list(output.glob("*.parquet")) == [] and list(output.glob(".*")) == []


def test_missing_flags_lists_and_packages_are_one_line(tables, tmp_path):
    error = one_error_line(run_program(SELECT, "--output", tmp_path, ok=False))
    assert "--engine duckdb needs --commits, --licenses, --languages" in error
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    flags = arguments(tables, tmp_path / "out")
    error = one_error_line(run_program(SELECT, *flags, "--noise-subjects", tmp_path / "empty", ok=False))
    assert "empty list" in error
    error = one_error_line(run_program(SELECT, *flags, "--allowed-licenses", "mti", ok=False))
    assert "--allowed-licenses mti: not a license" in error
    (tmp_path / "duckdb.py").write_text("raise ModuleNotFoundError(name='duckdb')", encoding="utf-8")
    done = run_program(SELECT, *flags, ok=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "pip install -e '.[dataset]'" in one_error_line(done)


def test_a_full_disk_is_one_line_and_leaves_no_table(tables, tmp_path):
    output = tmp_path / "out"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    done = run_program(SELECT, *arguments(tables, output), ok=False, preexec_fn=limit)
    assert "disk" in one_error_line(done)
    assert list(output.glob("*.parquet")) == []
    assert select(tables, output) == case_rows()[1]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> dict[str, Path]:
    """Tables that take seconds to select from."""
    directory = tmp_path_factory.mktemp("many")
    rng = random.Random(1)
    rows = [
        commit(f"{rng.getrandbits(160):040x}", f"Change {i}", modified(f"{i}.py"), repos=["a/mit", "f/fork"][i % 2 :])
        for i in range(60_000)
    ]
    rows = {"commits": rows, "licenses": LICENSES, "languages": LANGUAGES}
    return {table: write_parquet(directory, table, found) for table, found in rows.items()}


@pytest.mark.slow
def test_killed_runs_leave_nothing_half_written(many, tmp_path):
    """SIGKILL and SIGTERM at random instants, then the same command: the uninterrupted result."""
    expected = select(many, tmp_path / "expected")
    assert len(expected) == 60_000
    output, rng = tmp_path / "out", random.Random(2)
    for attempt in range(8):
        command = [sys.executable, ROOT / SELECT, *arguments(many, output)]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, cwd="/")
        time.sleep(rng.uniform(0.2, 1.5))
        process.send_signal(signal.SIGTERM if attempt % 2 else signal.SIGKILL)
        stderr = process.communicate()[1].decode()
        assert "Traceback" not in stderr
        for path in output.glob("*.parquet"):
            read_parquet(path)  # complete
        if attempt % 2 and process.returncode == 128 + signal.SIGTERM:
            assert list(output.glob(".*")) == []
    assert select(many, output) == expected
    names = {path.name for path in (tmp_path / "expected").iterdir()}
    assert {path.name for path in output.iterdir()} == names


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.stem)
def test_every_stage_is_one_query_of_bigquery_s_dialect(path):
    (query,) = sqlglot.parse(path.read_text(encoding="utf-8"), read="bigquery")
    assert isinstance(query, exp.Select)
    assert sqlglot.parse_one(query.sql(dialect="bigquery"), read="bigquery") == query


def test_there_are_five_stages():
    assert len(SQL) == 5
