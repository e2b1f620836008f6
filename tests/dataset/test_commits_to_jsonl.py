"""dataset/commits_to_jsonl.py: commits become rows in one of the formats of commits."""

import json

import pytest
from conftest import one_error_line, run_program

from megatron_ft.commits.line_diff import apply_line_diff
from megatron_ft.files.jsonl_row import parse_object

TO_ROWS = "dataset/commits_to_jsonl.py"
COMMIT = {"old_contents": "one\n", "new_contents": "λ two\n", "subject": "Count up"}


def converted(directory, commits: list[dict], *flags: str) -> tuple[list[dict], str]:
    """The rows written for these commits, and the program's stderr."""
    (directory / "commits.jsonl").write_text("".join(json.dumps(commit) + "\n" for commit in commits))
    done = run_program(TO_ROWS, "--input", directory / "commits.jsonl", "--output", "-", *flags)
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]], done.stderr


@pytest.mark.parametrize(
    "format, inputs, outputs",
    [
        ("starcoder", "<commit_before>one\n<commit_msg>Count up<commit_after>", "λ two\n"),
        ("octocoder", "Question: Count up\n\none\n\n\nAnswer:", " λ two\n"),
        ("octocoder-published", "Question: Count up\none\n\n\nAnswer:", " λ two\n"),
        ("plain", "<commit_before>one\n<commit_msg>", "Count up<commit_after>λ two\n"),
        ("fenced", "```\none\n\n```\n", "Count up\n```\nλ two\n\n```"),
        (
            "line-diff",
            "<commit_before>\n  1 one\n<commit_msg>\nCount up\n<commit_after>\n",
            "-  1 one\n+  1 λ two",
        ),
    ],
)
def test_commit_is_written_in_the_chosen_format(tmp_path, format, inputs, outputs):
    rows, _ = converted(tmp_path, [COMMIT], "--format", format)
    assert rows == [{"inputs": inputs, "outputs": outputs}]


def test_origin_of_a_commit_stays_in_its_row(tmp_path):
    origin = {"commit": "0" * 40, "lang": "Python", "license": "mit", "repos": "owner/name"}
    rows, _ = converted(tmp_path, [{**COMMIT, **origin, "old_file": "a.py", "message": "m"}])
    assert list(rows[0]) == ["inputs", "outputs", *origin] and rows[0] | origin == rows[0]


def test_commits_without_subject_or_new_contents_are_skipped_and_counted(tmp_path):
    rows, stderr = converted(tmp_path, [COMMIT | {"subject": ""}, COMMIT, COMMIT | {"new_contents": ""}])
    assert len(rows) == 1
    assert "1 row -> -; 2 commits without a subject or new contents skipped" in stderr


@pytest.mark.parametrize("repos", ['"\\ud800"', "9" * 5000, "[" * 990 + "]" * 990, "[" * 5000 + "]" * 5000, "NaN"])
def test_unusual_values_of_copied_keys_are_no_obstacle(tmp_path, repos):
    commit = f'{{"old_contents": "a", "new_contents": "b", "subject": "s", "repos": {repos}}}'
    (tmp_path / "commits.jsonl").write_text(commit + "\n", encoding="utf-8")
    done = run_program(TO_ROWS, "--input", tmp_path / "commits.jsonl", "--output", "-")
    row = parse_object(done.stdout.encode().removesuffix(b"\n"))
    assert (row["outputs"], list(row)) == ("b", ["inputs", "outputs", "repos"])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"old_contents": "a", "new_contents": "b"}', "commits.jsonl, line 1: no key 'subject'"),
        (
            '{"old_contents": "a", "new_contents": 1, "subject": "s"}',
            "line 1: 'new_contents' is an integer, not a string",
        ),
        ("[1", "line 1: incomplete JSON"),
        ('{"old_contents": "a", "new_contents": "", "subject": "s"}', "no commit with a subject"),
    ],
)
def test_rows_that_are_not_commits_report_one_line_and_write_nothing(tmp_path, line, message):
    (tmp_path / "commits.jsonl").write_text(line + "\n")
    done = run_program(TO_ROWS, "--input", tmp_path / "commits.jsonl", "--output", tmp_path / "rows.jsonl", ok=False)
    assert message in one_error_line(done)
    assert [file.name for file in tmp_path.iterdir()] == ["commits.jsonl"]


def many(count: int) -> list[dict]:
    return [
        {**COMMIT, "commit": f"{n:040x}", "old_file": f"src/{n} {{}}.py", "new_contents": f"{n}\n"}
        for n in range(count)
    ]


def test_half_of_the_rows_have_a_file_name_chosen_by_commit_and_seed(tmp_path):
    plain, _ = converted(tmp_path, many(400), "--format", "plain")
    rows, _ = converted(tmp_path, many(400), "--format", "with-filename")
    named = [row["inputs"].startswith("<filename>") for row in rows]
    assert 160 < sum(named) < 240
    for n, (row, without) in enumerate(zip(rows, plain, strict=True)):
        prefix = f"<filename>{n} {{}}.py" if named[n] else ""
        assert row == {**without, "inputs": prefix + without["inputs"]}
    reordered, _ = converted(tmp_path, many(400)[::-1], "--format", "with-filename")
    assert reordered[::-1] == rows
    other, _ = converted(tmp_path, many(400), "--format", "with-filename", "--seed", "2")
    assert other != rows


def test_line_diff_rows_apply_to_their_old_files(tmp_path):
    commits = [
        {"subject": "s", "old_contents": "\n a\nb\n", "new_contents": "a\n\nb\nc"},
        {"subject": "Strip", "old_contents": "\na\n", "new_contents": "a"},
    ]
    rows, stderr = converted(tmp_path, commits, "--format", "line-diff")
    assert [apply_line_diff(commits[0]["old_contents"], row["outputs"]) for row in rows] == ["a\n\nb\nc"]
    assert "1 without a change skipped" in stderr
    commits[0]["old_file"] = "src/a.py"
    rows, _ = converted(tmp_path, commits[:1], "--format", "line-diff", "--filename-fraction", "1")
    assert rows[0]["inputs"].startswith("<file_name>\na.py\n<commit_before>\n  1 a\n")


def test_shards_concatenated_equal_the_single_run_and_their_reports_add_up(tmp_path):
    commits = [*many(50), COMMIT | {"subject": ""}, *many(20)]
    (tmp_path / "commits.jsonl").write_text("".join(json.dumps(commit) + "\n" for commit in commits))
    reports, texts = [], []
    for shard in ("1/1", "1/3", "2/3", "3/3"):
        out = tmp_path / f"{shard[0]}of{shard[2]}.jsonl"
        flags = ["--format", "with-filename", "--shard", shard]
        run_program(TO_ROWS, "--input", tmp_path / "commits.jsonl", "--output", out, *flags)
        texts.append(out.read_bytes())
        reports.append(json.loads(out.with_name(out.stem + "_report.json").read_text()))
    assert texts[0] == b"".join(texts[1:]) and all(texts)
    for key in ("rows_in", "rows_out", "with_file_name"):
        assert reports[0][key] == sum(report[key] for report in reports[1:])
    assert (reports[0]["rows_in"], reports[0]["rows_out"], reports[0]["dropped"]) == (71, 70, {"no subject": 1})


def test_parquet_in_and_out(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows, _ = converted(tmp_path, many(5))
    parquet.write_table(pyarrow.Table.from_pylist(many(5)), tmp_path / "commits.parquet")
    run_program(TO_ROWS, "--input", tmp_path / "commits.parquet", "--output", tmp_path / "rows.parquet")
    found = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [{key: row[key] for key in row if row[key] is not None} for row in found] == rows


def test_bad_rows_are_skipped_and_counted_by_reason(tmp_path):
    lines = [json.dumps(COMMIT), "{", json.dumps({**COMMIT, "subject": 3}), json.dumps(COMMIT)]
    (tmp_path / "commits.jsonl").write_text("\n".join(lines) + "\n")
    run_program(TO_ROWS, "--input", tmp_path / "commits.jsonl", "--output", tmp_path / "rows.jsonl", "--skip-bad-rows")
    report = json.loads((tmp_path / "rows_report.json").read_text())
    assert (report["rows_in"], report["rows_out"], sum(report["bad_rows"].values())) == (4, 2, 2)
    assert report["bad_rows"]["'subject' is an integer, not a string"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "starcoder", "--filename-fraction", "0.5"], "--format starcoder has no file names; use --format"),
        (["--format", "line-diff", "--filename-fraction", "2"], "--filename-fraction 2: must be 0 to 1"),
        (["--format", "with-filename"], "line 1: no key 'old_file' with the path of the file"),
    ],
)
def test_file_names_that_cannot_be_written_report_one_line_errors(tmp_path, flags, message):
    (tmp_path / "commits.jsonl").write_text(json.dumps(COMMIT) + "\n")
    done = run_program(TO_ROWS, "--input", tmp_path / "commits.jsonl", "--output", tmp_path / "o", *flags, ok=False)
    assert message in one_error_line(done) and not (tmp_path / "o").exists()
