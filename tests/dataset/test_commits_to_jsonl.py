"""dataset/commits_to_jsonl.py: commits become rows in StarCoder's or OctoCoder's format."""

import json

import pytest
from conftest import one_error_line, run_program

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
    assert "1 rows -> -; 2 commits without a subject or new contents skipped" in stderr


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
