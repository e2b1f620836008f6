"""dataset/other/mix.py: the quotas of a mix, from the same rows in any order and any files."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, one_error_line, run_program

MIX = "dataset/other/mix.py"
LANGUAGES = ("Python", "Go", "Rust", "Java", "JavaScript", "C++", "Ruby")


def rows_of(name: str, count: int) -> list[bytes]:
    """Lines whose spacing no JSON writer of ours would produce."""
    rows = [{"inputs": f"{name} {n}", "outputs": f"é{n}", "lang": LANGUAGES[n % 7]} for n in range(count)]
    return [json.dumps(row, separators=(",", ":  "), ensure_ascii=False).encode() + b"\n" for row in rows]


def write_spec(directory: Path, spec: dict) -> Path:
    (directory / "mix.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    return directory / "mix.yaml"


def mixed(spec: Path | str, output: Path, *flags) -> list[bytes]:
    """The lines of a mix."""
    run_program(MIX, spec, "--output", output, *flags)
    return output.read_bytes().splitlines(keepends=True)


@pytest.fixture
def sources(tmp_path) -> Path:
    """A directory with the rows a.jsonl, of seven languages, and b.jsonl."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows_of("a", 700)))
    (tmp_path / "b.jsonl").write_bytes(b"".join(rows_of("b", 300)))
    return tmp_path


def test_quotas_by_language_number_and_all(sources):
    spec = {
        "seed": 7,
        "sources": {
            "a": {"files": "a.jsonl", "by": "lang", "quotas": {"python": 20, "C++": 30}},
            "b": {"files": ["b.jsonl"], "rows": 50},
            "c": {"files": "b.jsonl", "only": {"lang": ["Go", "rust"]}, "rows": "all"},
        },
    }
    lines = mixed(write_spec(sources, spec), sources / "out.jsonl")
    given = rows_of("a", 700) + rows_of("b", 300)
    assert set(lines) <= set(given)
    parsed = [json.loads(line) for line in lines]
    assert Counter(row["lang"] for row in parsed if row["inputs"].startswith("a")) == {"Python": 20, "C++": 30}
    go_and_rust = sum(json.loads(line)["lang"] in ("Go", "Rust") for line in given[700:])
    assert sum(row["inputs"].startswith("b") for row in parsed) == 50 + go_and_rust
    report = json.loads((sources / "out_report.json").read_text(encoding="utf-8"))
    assert report["rows_out"] == len(lines) == sum(one["rows_out"] for one in report["sources"].values())
    assert report["sources"]["a"]["quotas"]["c++"] == {"rows_in": 100, "quota": 30}
    for name, digest in [("a.jsonl", report["sources"]["a"]["files"]), ("out.jsonl", {"": report["output"]})]:
        assert next(iter(digest.values()))["sha256"] == hashlib.sha256((sources / name).read_bytes()).hexdigest()


def test_mix_is_independent_of_order_and_files(sources):
    spec = {"sources": {"a": {"files": "a.jsonl", "rows": 100}, "b": {"files": "b.jsonl", "rows": "all"}}}
    lines = mixed(write_spec(sources, spec), sources / "out.jsonl")
    reordered = rows_of("a", 700)
    random.Random(1).shuffle(reordered)
    (sources / "parts").mkdir()
    (sources / "parts/1.jsonl.gz").write_bytes(gzip.compress(b"".join(reordered[:50] + reordered[600:])))
    (sources / "parts/2.jsonl").write_bytes(b"".join(reordered[50:600]))
    flags = ["--source", f"a={sources}/parts/2.jsonl", "--source", f"a={sources}/parts/1.jsonl.gz"]
    assert mixed(sources / "mix.yaml", sources / "again.jsonl", *flags) == lines
    assert mixed(sources / "mix.yaml", sources / "tiny.jsonl", "--memory", 1) == lines
    other = mixed(sources / "mix.yaml", sources / "other.jsonl", "--seed", 3)
    assert len(other) == len(lines) and set(other) != set(lines)


def test_fewer_rows_are_the_first_of_more(sources):
    lines = {
        count: mixed(
            write_spec(sources, {"sources": {"a": {"files": "a.jsonl", "rows": count}}}), sources / f"{count}.jsonl"
        )
        for count in (50, 100, 700)
    }
    assert lines[50] == lines[100][:50] and lines[100] == lines[700][:100]
    assert sorted(lines[700]) == sorted(rows_of("a", 700)) != lines[700]


def test_rows_of_every_quota_are_spread_over_the_mix(sources):
    spec = {"sources": {"a": {"files": "a.jsonl", "rows": 70}, "b": {"files": "b.jsonl", "rows": "all"}}}
    lines = mixed(write_spec(sources, spec), sources / "out.jsonl")
    positions = [n for n, line in enumerate(lines) if json.loads(line)["inputs"].startswith("a")]
    quarters = Counter(4 * position // len(lines) for position in positions)
    assert len(positions) == 70 and all(8 <= quarters[n] <= 28 for n in range(4))


def test_equal_rows_of_a_source_are_taken_once(sources):
    (sources / "twice.jsonl").write_bytes(b"".join(rows_of("a", 60) * 2))
    spec = {"sources": {"a": {"files": "twice.jsonl", "rows": "all"}, "b": {"files": "twice.jsonl", "rows": 60}}}
    assert Counter(mixed(write_spec(sources, spec), sources / "out.jsonl")) == Counter(rows_of("a", 60) * 2)


def test_which_of_equal_rows_is_taken_is_independent_of_their_order(sources):
    equal = [b'{"inputs": "a", "outputs": "b", "n": %d}\n' % n for n in (3, 1, 2)]
    (sources / "a.jsonl").write_bytes(b"".join(equal))
    (sources / "b.jsonl").write_bytes(b"".join(reversed(equal)))
    for name in ("a", "b"):
        spec = write_spec(sources, {"sources": {"x": {"files": f"{name}.jsonl", "rows": "all"}}})
        assert mixed(spec, sources / "out.jsonl") == [equal[1]]


def test_the_spec_is_not_overwritten(sources):
    spec = write_spec(sources, {"sources": {"a": {"files": "a.jsonl", "rows": 5}}})
    before = spec.read_bytes()
    assert "is both input and output" in one_error_line(run_program(MIX, spec, "--output", spec, ok=False))
    assert spec.read_bytes() == before


def test_weights_divide_the_number_at_the_top(sources):
    spec = {
        "rows": 100,
        "sources": {
            "a": {"files": "a.jsonl", "weight": 3},
            "b": {"files": "b.jsonl", "weight": 1},
            "c": {"files": "b.jsonl", "rows": 7},
        },
    }
    assert len(mixed(write_spec(sources, spec), sources / "out.jsonl")) == 107
    report = json.loads((sources / "out_report.json").read_text(encoding="utf-8"))
    assert [one["rows_out"] for one in report["sources"].values()] == [75, 25, 7]


def test_dry_run_prints_the_counts_and_writes_nothing(sources):
    before = sorted(sources.iterdir())
    spec = write_spec(sources, {"sources": {"a": {"files": "a.jsonl", "by": "lang", "quotas": {"Go": 5}}}})
    done = run_program(MIX, spec, "--dry-run")
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["source", "quota", "rows", "taken"],
        ["a", "go", "100", "5"],
    ]
    assert sorted(sources.iterdir()) == sorted([*before, spec])


def test_preset_octocoder_takes_commits_of_six_languages_and_all_of_oasst(tmp_path, shared_data):
    rows = [{"inputs": f"i{n}", "outputs": "o", "lang": LANGUAGES[n % 7]} for n in range(7000)]
    (tmp_path / "commits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chats = shared_data / "oasst-commitpackft.jsonl"
    run_program("dataset/other/to_rows.py", "--input", chats, "--output", tmp_path / "oasst.jsonl")
    flags = ["--source", f"commitpackft={tmp_path}/commits.jsonl", "--source", f"oasst={tmp_path}/oasst.jsonl"]
    lines = mixed("octocoder", tmp_path / "out.jsonl", *flags)
    languages = Counter(json.loads(line).get("lang") for line in lines)
    distinct = len(set((tmp_path / "oasst.jsonl").read_bytes().splitlines()))
    assert languages.pop(None) == distinct and sum(languages.values()) == 5000
    assert set(languages) == set(LANGUAGES) - {"Ruby"} and min(languages.values()) > 700


def test_preset_xp3x_takes_5000_rows_of_nine_sources(tmp_path):
    names = list(yaml.safe_load((ROOT / "dataset/other/mixes/xp3x.yaml").read_text(encoding="utf-8"))["sources"])
    flags = []
    for name in names:
        rows = [{"inputs": f"{name} {n}", "targets": "o"} for n in range(1600)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags += ["--source", f"{name}={tmp_path}/{name}.jsonl"]
    lines = mixed("xp3x", tmp_path / "out.jsonl", *flags)
    assert len(names) == 9 and len(set(lines)) == len(lines) == 5000
    taken = Counter(json.loads(line)["inputs"].split()[0] for line in lines)
    assert [taken[name] for name in names] == [1500, 1460, 600, 560, 220, 220, 200, 200, 40]


def test_parquet_in_and_out(sources):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) | {"n": n} for n, line in enumerate(rows_of("a", 700))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), sources / "a.parquet")
    spec = {"sources": {"a": {"files": "a.parquet", "rows": 20}, "b": {"files": "b.jsonl", "rows": 10}}}
    run_program(MIX, write_spec(sources, spec), "--output", sources / "out.parquet")
    found = parquet.read_table(sources / "out.parquet").to_pylist()
    assert sum(row["n"] is not None for row in found) == 20 and len(found) == 30
    assert all(row in rows for row in found if row["n"] is not None)


GOOD = {"files": "a.jsonl", "rows": 5}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"sources": {"a": {**GOOD, "quota": 3}}}, "sources: a: unknown key 'quota'; did you mean quotas?"),
        ({"sources": {"a": GOOD}, "x": 1}, "mix.yaml: unknown key 'x'; known are seed, rows, sources"),
        ({"seed": 1}, "mix.yaml: no sources, expected keys with values"),
        ([1], "mix.yaml: a list, expected keys with values"),
        (
            {"sources": {"a": {"files": "a.jsonl"}}},
            "sources: a: nothing to count rows by; give one of rows, quotas, weight",
        ),
        ({"sources": {"a": {**GOOD, "weight": 1}}}, "mix.yaml: rows at the top and weight of a source go together"),
        ({"sources": {"a": {**GOOD, "rows": "some"}}}, "a: rows is some, expected a number of rows or all"),
        ({"sources": {"a": {**GOOD, "rows": True}}}, "a: rows is true or false, expected a number of rows or all"),
        ({"sources": {"a": {**GOOD, "by": "lang"}}}, "a: by is the key of quotas; give both or neither"),
        ({"sources": {"a": {"files": "a.jsonl", "by": "lang", "quotas": {"Go": 0}}}}, "a: quotas: Go is 0, expected"),
        ({"sources": {"a": {"rows": 5}}}, "sources: a: no files; name them there, or give --source a=FILE"),
        ({"sources": {"a": {"files": "x*.jsonl", "rows": 5}}}, "sources: a: no file matches"),
        ({"sources": {"a": {"files": "gone.jsonl", "rows": 5}}}, "gone.jsonl: No such file or directory"),
        (
            {"sources": {"a": {**GOOD, "rows": 701}}},
            "source a: 700 different rows, the mix needs 701; lower its number",
        ),
        (
            {"sources": {"a": {"files": "a.jsonl", "by": "lang", "quotas": {"Go": 101}}}},
            "source a: 100 different rows with lang go, the mix needs 101",
        ),
        (
            {"sources": {"a": {"files": "a.jsonl", "by": "lang", "quotas": {"Fortran": 1}}}},
            "0 different rows with lang fortran, the mix needs 1; lower its number or add files (other values of lang: Python,",
        ),
        (
            {"sources": {"a": {**GOOD, "only": {"lang": "D"}, "rows": "all"}}},
            "source a: 0 different rows, the mix needs at least",
        ),
        ({"sources": {"a": {**GOOD, "files": "mix.yaml"}}}, "mix.yaml, line 1: "),
    ],
)
def test_wrong_specs_report_one_line_errors_and_write_nothing(sources, spec, message):
    done = run_program(MIX, write_spec(sources, spec), "--output", sources / "out.jsonl", ok=False)
    assert message in one_error_line(done) and done.returncode == 2
    assert {path.name for path in sources.iterdir()} == {"a.jsonl", "b.jsonl", "mix.yaml"}


# Python 3.13 takes any pattern.
BAD_PATTERN = "a: no file matches" if sys.version_info >= (3, 13) else "sources: a: files is ***.jsonl: Invalid pattern"


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("sources: {a: [", [], "mix.yaml, line 1: not YAML"),
        ("sources: {a: {rows: 1}}", ["--source", "b=x"], "--source b: not a source of"),
        ("sources: {a: {rows: 1}}", ["--source", "a"], "--source a: expected NAME=FILE"),
        ("sources: {a: {rows: 1}}", ["--source", "a=-"], "standard input (-) cannot be read twice"),
        ("!!python/object/apply:os.getcwd []", [], "mix.yaml, line 1: not YAML"),
        (None, [], "mix.yaml: no such file"),
        ("sources: {a: {rows: 1}, b: {rows: 1}, a: {rows: 2}}", [], "mix.yaml, line 1: key 'a' is given twice; remove"),
        ("{seed: 2026-02-30}", [], "mix.yaml: a value does not fit its type (day is out of range"),
        ("{seed: !!int x}", [], "mix.yaml: a value does not fit its type (invalid literal"),
        ("sources: {a: {files: '***.jsonl', rows: 1}}", [], BAD_PATTERN),
        ("rows: 1\nsources: {a: {files: x, weight: 2}, b: {files: x, weight: 1}}", [], "no row is left for b; raise"),
        ("sources: {a: {files: x, by: lang, quotas: {no: 1}}}", [], "a: quotas: false, as YAML reads words like no"),
        ("sources: {a: {files: x, only: {lang: [no]}, rows: 1}}", [], "a: only: false, as YAML reads words like no"),
    ],
)
def test_unreadable_specs_and_flags_report_one_line_errors(tmp_path, text, flags, message):
    if text is not None:
        (tmp_path / "mix.yaml").write_text(text, encoding="utf-8")
    done = run_program(MIX, tmp_path / "mix.yaml", "--output", tmp_path / "out.jsonl", *flags, ok=False)
    assert message in one_error_line(done)


def test_bad_rows_stop_or_are_counted(sources):
    with open(sources / "b.jsonl", "ab") as file:
        file.write(b'{"inputs": "x"}\n{\n')
    spec = write_spec(sources, {"sources": {"b": {"files": "b.jsonl", "rows": "all"}}})
    done = run_program(MIX, spec, "--output", sources / "out.jsonl", ok=False)
    assert "b.jsonl, line 301: no key 'outputs' or 'targets'" in one_error_line(done)
    assert len(mixed(spec, sources / "out.jsonl", "--skip-bad-rows")) == 300
    report = json.loads((sources / "out_report.json").read_text(encoding="utf-8"))
    assert sum(report["bad_rows"].values()) == 2


def test_memory_is_bounded_whatever_the_size_of_the_sources(tmp_path):
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for n in range(60_000):
            file.write(json.dumps({"inputs": str(n), "outputs": "x" * 1000}) + "\n")
    spec = write_spec(tmp_path, {"sources": {"a": {"files": "a.jsonl", "rows": "all"}}})
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", probe, ROOT / MIX, spec, "--output", tmp_path / "out.jsonl", "--memory", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert int(done.stdout.split("PEAK ")[1]) < 60_000  # KiB, of 60 MB of rows
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 60_000
