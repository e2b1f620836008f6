"""dataset/commitpack/split_languages.py: one folder per language, in shards, all or nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from filter_cases import GOOD

from megatron_ft.commits.languages import LANGUAGES, directory_name

SPLIT = "dataset/commitpack/split_languages.py"


def row(number: int, path: str, **changes) -> dict:
    return GOOD | {"commit": f"{number:040x}", "old_file": path, "new_file": path} | changes


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(input: Path, output: Path, *flags: str | Path, **kwargs) -> subprocess.CompletedProcess:
    return run_program(SPLIT, "--input", input, "--output", output, *flags, **kwargs)


def shards(directory: Path) -> dict[str, list[dict]]:
    """The rows of each file, by its path in the directory."""
    return {
        str(path.relative_to(directory)): [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def report(output: Path) -> dict:
    return json.loads(output.with_name(f"{output.name}_report.json").read_text(encoding="utf-8"))


def test_rows_are_sorted_by_language_in_the_published_folders(tmp_path):
    rows = [
        row(1, "a/x.py"),
        row(2, "a/x.C", lang=None),
        row(3, "x.dot", lang=""),
        row(4, "x.rpy", lang="no such language"),
        row(5, "notes", lang=None),
        row(6, "x.h", lang="C++"),  # the row's own language stays
    ]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    found = shards(tmp_path / "out")
    assert {name: [(int(row["commit"], 16), row["lang"]) for row in rows] for name, rows in found.items()} == {
        "python/python-0001.jsonl": [(1, "Python")],
        "c++/c++-0001.jsonl": [(2, "C++"), (6, "C++")],
        "graphviz-dot/graphviz-dot-0001.jsonl": [(3, "Graphviz (DOT)")],
        "renpy/renpy-0001.jsonl": [(4, "Ren'Py")],
        "text/text-0001.jsonl": [(5, "Text")],
    }
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out", "out_report.json"}


def test_scraped_rows_get_their_language_and_license_in_the_published_order(tmp_path):
    scraped = {
        key: value for key, value in row(1, "x.go", repos="fork/x,Jane/X").items() if key not in ("lang", "license")
    }
    scraped = {"stderr": "", **scraped, "returncode": 0}
    licenses = [{"repos": "a/b,jane/x", "license": "isc"}, {"repos": "jane/x", "license": "mit"}]
    write(tmp_path / "licenses.jsonl", licenses)
    rows = [scraped, row(2, "x.go", lang="Go", repos="other/x"), row(3, "x.go", lang="Go", repos="other/x", license="")]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--licenses", tmp_path / "licenses.jsonl")
    first, second, third = shards(tmp_path / "out")["go/go-0001.jsonl"]
    assert list(first) == [*GOOD, "stderr", "returncode"]
    assert (first["lang"], first["license"]) == ("Go", "isc")
    assert second == rows[1]
    assert third["license"] == "unknown"
    assert report(tmp_path / "out")["unknown_license"] == 1


def test_unchanged_rows_keep_their_line(tmp_path):
    line = b'{ "extra": 1.50, ' + json.dumps(GOOD).encode()[1:] + b"\n"
    (tmp_path / "rows.jsonl").write_bytes(line)
    run(tmp_path / "rows.jsonl", tmp_path / "out")
    assert (tmp_path / "out/python/python-0001.jsonl").read_bytes() == line


def test_shards_are_at_most_the_limit_and_no_first_shard_is_empty(tmp_path):
    sizes = [1_500_000, 600_000, 600_000, 300_000, 100_000, 1_100_000, 10]
    rows = [row(n, "x.py", new_contents="é" * (size // 2)) for n, size in enumerate(sizes)]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--shard-mib", "1")
    found = shards(tmp_path / "out")
    assert [[int(row["commit"], 16) for row in rows] for rows in found.values()] == [[0], [1], [2, 3, 4], [5], [6]]
    assert list(found) == [f"python/python-{n:04}.jsonl" for n in range(1, 6)]
    size = sum(path.stat().st_size for path in (tmp_path / "out/python").iterdir())
    assert report(tmp_path / "out")["languages"]["Python"] == {
        "directory": "python",
        "rows": 7,
        "shards": 5,
        "megabytes": round(size / 1e6, 3),
    }


def test_all_languages_at_once_need_few_open_files(tmp_path):
    suffixes = {language: name for name, language in LANGUAGES.items() if name.startswith(".")}
    rows = [row(n, f"x{suffix}", lang=None) for n in range(3) for suffix in suffixes.values()]
    write(tmp_path / "rows.jsonl", rows)
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / SPLIT), "--input", str(tmp_path / "rows.jsonl")]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = shards(tmp_path / "out")
    assert set(found) == {f"{directory_name(name)}/{directory_name(name)}-0001.jsonl" for name in suffixes}
    assert len(found) == 358 and all(len(rows) == 3 for rows in found.values())
    assert report(tmp_path / "out")["rows_out"] == len(rows)


def test_owners_who_opted_out_are_left_out_whatever_the_forks(tmp_path):
    (tmp_path / "owners.txt").write_text("Jane\n", encoding="utf-8")
    rows = [row(1, "x.py", repos="fork/x,jane/x"), row(2, "x.py", repos="JANE/y"), row(3, "x.py", repos="janet/x")]
    done = run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--opt-out", tmp_path / "owners.txt")
    assert [row["repos"] for row in shards(tmp_path / "out")["python/python-0001.jsonl"]] == ["janet/x"]
    found = report(tmp_path / "out")
    assert (found["rows_in"], found["dropped"], found["rows_out"]) == (3, {"opt_out": 2}, 1)
    assert "2 of owners who opted out dropped" in done.stderr


def test_parquet_in_and_out_and_a_plot(tmp_path):
    rows = [row(n, f"x{n % 2}.{'py' if n % 2 else 'go'}", lang="Python" if n % 2 else "Go") for n in range(20)]
    write(tmp_path / "rows.jsonl", rows)
    run(tmp_path / "rows.jsonl", tmp_path / "first", "--format", "parquet", "--plot", tmp_path / "plot.svg")
    assert {str(path.relative_to(tmp_path / "first")) for path in (tmp_path / "first").rglob("*.*")} == {
        "python/python-0001.parquet",
        "go/go-0001.parquet",
    }
    assert "20 rows in 2 languages" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    run(tmp_path / "first/go", tmp_path / "second")
    assert shards(tmp_path / "second") == {"go/go-0001.jsonl": rows[::2]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1}\n', "rows.jsonl, line 1: no key 'new_file'; the row has 'a'"),
        (b'{"new_file": 1}\n', "'new_file' is not a string"),
        (b'{"new_file": "x.py", "lang": 3}\n', "'lang' is not a string"),
        (b"nonsense\n", "line 1: not JSON"),
        (b"\n", "no row to write of 0"),
    ],
)
def test_bad_rows_are_one_line_and_leave_nothing(content, what, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert what in one_error_line(run(tmp_path / "rows.jsonl", tmp_path / "out", ok=False))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_rows_are_counted_where_asked(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"new_file": 1}\nnonsense\n' + json.dumps(GOOD).encode() + b"\n")
    done = run(tmp_path / "rows.jsonl", tmp_path / "out", "--skip-bad-rows")
    found = report(tmp_path / "out")
    assert (found["rows_in"], found["rows_out"], sum(found["bad_rows"].values())) == (1, 1, 2)
    assert "2 bad rows skipped" in done.stderr


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "change, what",
    [({"subject": "\ud800"}, "lone surrogate"), ({"old_contents": 3}, "'old_contents' is not a string")],
)
def test_rows_that_are_not_of_the_schema_are_bad(change, what, format, tmp_path):
    rows = [row(1, "x.py"), row(2, "y.py", **change)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path / "in.jsonl", tmp_path / "out", "--format", format, ok=False)
    assert f"in.jsonl, line 2: {what}" in one_error_line(done)
    run(tmp_path / "in.jsonl", tmp_path / "out", "--format", format, "--skip-bad-rows")
    assert report(tmp_path / "out")["bad_rows"] == {what: 1}


def test_output_that_exists_is_not_touched(tmp_path):
    input = write(tmp_path / "rows.jsonl", [GOOD])
    (tmp_path / "out").mkdir()
    run(input, tmp_path / "out")  # empty: fine
    before = shards(tmp_path / "out")
    assert "exists; remove it" in one_error_line(run(input, tmp_path / "out", ok=False))
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--shard-mib", "0"], "must be at least 1"),
        (["--plot", "x.gif"], "must end in .png, .pdf or .svg"),
        (["--licenses", "missing.jsonl"], "missing.jsonl"),
        (["--input", "-", "--licenses", "-"], "standard input (-) can be read only once; give --licenses a file"),
        (["--opt-out", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_wrong_flags_are_one_line(flags, what, tmp_path):
    input = write(tmp_path / "rows.jsonl", [GOOD])
    assert what in one_error_line(run(input, tmp_path / "out", *flags, ok=False))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path):
    input = write(tmp_path / "rows.jsonl", [GOOD])
    command = [sys.executable, str(ROOT / SPLIT), "--input", "-", "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write((json.dumps(GOOD) + "\n").encode() * 4000)
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out-*/python/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.glob(".out-*/python/*"))
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    run(input, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out", "out_report.json"}
