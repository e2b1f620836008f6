"""dataset/commitpackft/filter.py: shards, the waterfall, reports, formats and errors."""

import gzip
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from filter_cases import COMMITPACKFT, GOOD, subject

FILTER = "dataset/commitpackft/filter.py"
LANGUAGES = {"Python": "py", "Ruby": "rb", "Go": "go"}


def rows_of(count: int) -> list[dict]:
    """Rows in three languages, three of four with a case that a rule drops; ids are random."""
    chance = random.Random(5)
    cases = [case for dropped, kept in COMMITPACKFT.values() for case in dropped + kept]
    rows = []
    for n in range(count):
        lang, suffix = chance.choice(list(LANGUAGES.items()))
        row = GOOD | {"commit": f"{chance.getrandbits(160):040x}", "old_file": f"a/x{n}.{suffix}", "lang": lang}
        if n % 4:
            case = chance.choice(cases)
            row |= subject(case) if isinstance(case, str) else case
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, row in enumerate(rows)))
    return path


def run(input: Path, output: Path, *flags: str | Path, **kwargs):
    return run_program(FILTER, "--input", input, "--output", output, *flags, **kwargs)


def report(output: Path) -> dict:
    return json.loads(output.with_name(output.name.split(".")[0] + "_report.json").read_text(encoding="utf-8"))


def adds_up(counts: dict) -> bool:
    return counts["rows_in"] == counts["rows_out"] + sum(counts["dropped"].values())


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows_of(1200))


@pytest.fixture(scope="module")
def kept(rows) -> Path:
    """What the preset keeps of the rows; its report is next to it."""
    run(rows, rows.with_name("kept.jsonl"))
    return rows.with_name("kept.jsonl")


def test_waterfall_adds_up_in_total_and_per_language(rows, tmp_path):
    done = run(rows, tmp_path / "out.jsonl")
    found = report(tmp_path / "out.jsonl")
    kept = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert found["rows_in"] == 1200 and found["rows_out"] == len(kept) > 300 and adds_up(found)
    languages = found["languages"]
    assert all(adds_up(counts) for counts in languages.values())
    for key in ("rows_in", "rows_out"):
        assert sum(counts[key] for counts in languages.values()) == found[key]
    for rule, count in found["dropped"].items():
        assert sum(counts["dropped"].get(rule, 0) for counts in languages.values()) == count
        assert len(found["samples"].get(rule, [])) == min(count, 3)
    used = {rule for rule, (dropped, _) in COMMITPACKFT.items() if dropped}
    assert used <= {rule for rule, count in found["dropped"].items() if count}
    assert f"1,200 rows, {len(kept)} kept" in done.stderr
    assert found["samples"]["url"][0] in done.stderr


def test_unchanged_rows_keep_their_line_and_cleaned_ones_their_other_keys(tmp_path):
    lines = [
        b'{ "extra": 1.50, ' + json.dumps(GOOD).encode()[1:],
        json.dumps(GOOD | subject("[ui] Add a lower limit to the time")).encode(),
        json.dumps(GOOD | subject("Add a lower limit") | {"license": "x"}).encode(),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run(tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    out = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert out[0] == lines[0]
    assert json.loads(out[1]) == GOOD | subject("Add a lower limit to the time")
    assert list(json.loads(out[1])) == list(GOOD)
    assert len(out) == 2


@pytest.mark.parametrize("preset", ["commitpackft", "edit"])
def test_shards_concatenated_are_the_single_run_and_their_reports_add_up(rows, preset, tmp_path, shared_data):
    flags = ("--preset", preset, "--secrets", "drop", "--licenses", "published")
    flags += ("--tokenizer-file", str(shared_data / "starcoder-tokenizer.json"), "--min-tokens", "40")
    run(rows, tmp_path / "all.jsonl", *flags)
    parts = [tmp_path / f"part{n}.jsonl" for n in range(1, 4)]
    for n, part in enumerate(parts, 1):
        run(rows, part, *flags, "--shard", f"{n}/3")
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "all.jsonl").read_bytes() != b""
    complete, shards = report(tmp_path / "all.jsonl"), [report(part) for part in parts]
    for key in ("rows_in", "rows_out"):
        assert sum(shard[key] for shard in shards) == complete[key]
    for rule, count in complete["dropped"].items():
        assert sum(shard["dropped"][rule] for shard in shards) == count
    assert complete["dropped"]["tokens"] > 0
    assert complete["settings"] == shards[0]["settings"]


def test_order_of_rows_changes_no_decision(rows, kept, tmp_path):
    lines = rows.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_bytes(b"".join(lines))
    run(tmp_path / "shuffled.jsonl", tmp_path / "again.jsonl")
    first, again = (path.read_bytes().splitlines() for path in (kept, tmp_path / "again.jsonl"))
    assert sorted(first) == sorted(again)


def test_parquet_and_compressed_files_in_and_out_have_the_same_rows(rows, kept, tmp_path):
    expected = [json.loads(line) for line in kept.read_bytes().splitlines()]
    run(rows, tmp_path / "all.parquet", "--without", *COMMITPACKFT)
    run(tmp_path / "all.parquet", tmp_path / "kept.jsonl.gz")
    assert [
        json.loads(line) for line in gzip.decompress((tmp_path / "kept.jsonl.gz").read_bytes()).splitlines()
    ] == expected
    run(tmp_path / "kept.jsonl.gz", tmp_path / "kept.parquet", "--without", *COMMITPACKFT)
    from pyarrow import parquet

    table = parquet.read_table(tmp_path / "kept.parquet")
    assert table.column_names == list(GOOD)
    assert table.to_pylist() == expected


def test_contaminated_rows_are_dropped_and_their_tasks_named(tmp_path, shared_data):
    problems = [
        json.loads((shared_data / f"humanevalpack/{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("python", "go")
    ]
    rows = [GOOD | {"new_contents": problem["declaration"] + problem["canonical_solution"]} for problem in problems]
    input = write(tmp_path / "rows.jsonl", [*rows, GOOD])
    done = run(input, tmp_path / "out.jsonl", "--decontaminate", shared_data / "humanevalpack")
    found = report(tmp_path / "out.jsonl")
    assert found["dropped"]["contaminated"] == 2 and found["rows_out"] == 1
    assert {problem["task_id"] for problem in problems} <= set(found["contaminated_by"])
    assert "not decontaminated" not in done.stderr
    by_variable = {"HUMANEVALPACK": str(shared_data / "humanevalpack")}
    again = run(input, tmp_path / "again.jsonl", env=by_variable)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert "not decontaminated" not in again.stderr
    off = run(input, tmp_path / "off.jsonl", "--decontaminate", "off", env=by_variable)
    assert report(tmp_path / "off.jsonl")["rows_out"] == 3 and "not decontaminated" not in off.stderr
    assert "not decontaminated: give --decontaminate DIR" in run(input, tmp_path / "none.jsonl", env={}).stderr


SCORER = "import sys, json\nfor line in sys.stdin: print(len(json.loads(line)['subject']) / 100)"


def scorer(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_score_command_reads_what_is_left_and_decides(rows, kept, tmp_path):
    lines = kept.read_bytes().splitlines(keepends=True)
    expected = [line for line in lines if len(json.loads(line)["subject"]) / 100 >= 0.4]
    run(rows, tmp_path / "out.jsonl", "--score-command", scorer(SCORER), "--min-score", "0.4")
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(expected)
    found = report(tmp_path / "out.jsonl")
    assert found["dropped"]["score"] == len(lines) - len(expected) > 0 and adds_up(found)
    assert not list(tmp_path.glob(".scores*"))


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (scorer("import sys; sys.exit(3)"), "ended with status 3"),
        (scorer(SCORER + "\nimport os; os.kill(os.getpid(), 9)"), "was killed by signal 9"),
        (scorer("print(1)"), "wrote 1 lines; expected one number per row, 4 lines in all"),
        (scorer("print('1\\n' * 9)"), "wrote more than 4 lines"),
        (scorer("for _ in range(4): print('yes')"), "line 1 is 'yes', not a number"),
        (scorer("for _ in range(4): print('nan')"), "line 1 is 'nan', not a number"),
        ("no-such-scorer --x", "cannot be started (No such file or directory)"),
        ("'unclosed", "cannot be started (No closing quotation)"),
        (" ", "cannot be started"),
    ],
)
def test_failing_score_command_is_one_line_and_writes_nothing(command, what, tmp_path):
    input = write(tmp_path / "rows.jsonl", [GOOD] * 4)
    error = one_error_line(run(input, tmp_path / "out.jsonl", "--score-command", command, ok=False))
    assert what in error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_licenses_owners_and_thresholds(tmp_path):
    rows = [GOOD, GOOD | {"license": "agpl-3.0"}, GOOD | {"license": "unknown"}, GOOD | {"repos": "fork/x,Jane/x"}]
    input = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "owners.txt").write_text("jane\n", encoding="utf-8")
    run(input, tmp_path / "out.jsonl", "--licenses", "permissive", "--opt-out", tmp_path / "owners.txt")
    found = report(tmp_path / "out.jsonl")
    assert (found["dropped"]["license"], found["dropped"]["opt_out"], found["rows_out"]) == (2, 1, 1)
    run(input, tmp_path / "out.jsonl", "--min-subject-words", "10")
    assert report(tmp_path / "out.jsonl")["dropped"]["subject_length"] == 4
    run(
        input,
        tmp_path / "out.jsonl",
        "--min-subject-words",
        "10",
        "--without",
        "subject_length",
        "clean_subject_length",
    )
    assert report(tmp_path / "out.jsonl")["rows_out"] == 4


def test_bad_rows_stop_the_run_or_are_counted(tmp_path):
    lines = [json.dumps(GOOD), "nonsense", json.dumps({"commit": "1"}), json.dumps(GOOD | {"subject": 7})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    error = one_error_line(run(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", ok=False))
    assert "rows.jsonl, line 2: not JSON" in error and "--skip-bad-rows" in error
    assert not (tmp_path / "out.jsonl").exists()
    done = run(tmp_path / "rows.jsonl", tmp_path / "out.jsonl", "--skip-bad-rows")
    found = report(tmp_path / "out.jsonl")
    assert found["rows_in"] == found["rows_out"] == 1 and sum(found["bad_rows"].values()) == 3
    assert "3 bad rows skipped" in done.stderr


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--licenses", "permisive"], "--licenses permisive: not a license; expected permissive"),
        (["--without", "tokens"], "--without tokens: not a rule of preset commitpackft; it has old_too_long"),
        (["--min-tokens", "900"], "--min-tokens 900: no row passes --min-tokens 900 and --max-tokens 768"),
        (["--max-tokens", "40"], "--max-tokens 40: no row passes --min-tokens 50 and --max-tokens 40"),
        (["--mass-update-fraction", "1.5"], "must be from 0 to 1"),
        (["--min-tokens", "-1"], "must not be negative"),
        (["--shard", "3/2"], "--shard: 3/2"),
        (["--tokenizer-file", "missing.json"], "missing.json: no such tokenizer"),
        (["--decontaminate", "missing"], "missing: no problems found"),
        (["--opt-out", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_wrong_flags_are_one_line(flags, what, tmp_path):
    input = write(tmp_path / "rows.jsonl", [GOOD])
    assert what in one_error_line(run(input, tmp_path / "out.jsonl", *flags, ok=False))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_new_file_is_a_text_as_the_schema_has_it(tmp_path):
    done = run(write(tmp_path / "in.jsonl", [GOOD | {"new_file": 7}]), tmp_path / "out.parquet", ok=False)
    assert "in.jsonl, line 1: 'new_file' is an integer, not a string" in one_error_line(done)


def test_the_list_of_owners_is_not_overwritten(tmp_path):
    (tmp_path / "owners.txt").write_text("ada\n")
    rows = write(tmp_path / "in.jsonl", [GOOD])
    done = run(rows, tmp_path / "owners.txt", "--opt-out", tmp_path / "owners.txt", ok=False)
    assert "is both input and output" in one_error_line(done)
    assert (tmp_path / "owners.txt").read_text() == "ada\n"


def test_rows_of_another_kind_and_no_rows_are_one_line(tmp_path):
    input = write(tmp_path / "rows.jsonl", [{"inputs": "a", "outputs": "b"}])
    error = one_error_line(run(input, tmp_path / "out.jsonl", ok=False))
    assert "no key 'commit'; the row has 'inputs', 'outputs'" in error
    (tmp_path / "blank.jsonl").write_text("\n\n", encoding="utf-8")
    assert "no row" in one_error_line(run(tmp_path / "blank.jsonl", tmp_path / "out.jsonl", ok=False))


def test_memory_is_bounded_by_a_row_not_by_the_input(tmp_path):
    input = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD | {"old_contents": "x = 1\n" * 8000}).encode() + b"\n"
    with open(input, "wb") as file:
        for _ in range(4000):  # 220 MB
            file.write(line)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(ROOT / FILTER), "--input", str(input), "--output", "-"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    _, size, unit = done.stderr.split()[-3:]  # VmHWM: 43000 kB
    assert unit == "kB" and int(size) < 100_000
