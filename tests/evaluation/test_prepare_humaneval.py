"""evaluation/create/prepare_humaneval.py: HumanEval-X and hand-made bugs give HumanEvalPack."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from made_problems import row

from megatron_ft.evaluation.problems import LANGUAGES, load_problems

PREPARE = "evaluation/create/prepare_humaneval.py"
RUST_COMMENT = "\n/*\n Return the largest number of a list.\n*/\n"
FIELDS = ("task_id", "prompt", "declaration", "canonical_solution", "test")


@pytest.fixture
def humaneval_x(tmp_path) -> Path:
    """HumanEval-X with one made-up problem per language, and its bugs."""
    directory = tmp_path / "humaneval-x"
    for language in LANGUAGES:
        made = row(language)
        names = (*FIELDS, "import", "test_setup") if language == "go" else FIELDS
        rows = {name: made[name] for name in names} | ({"prompt": RUST_COMMENT} if language == "rust" else {})
        (directory / language).mkdir(parents=True)
        (directory / language / "humaneval.jsonl").write_text(json.dumps(rows) + "\n")
        bug = {name: made[name] for name in ("buggy_solution", "bug_type", "failure_symptoms")}
        (directory / language / "humanevalpack.json").write_text(json.dumps([bug]))
    (directory / "HumanEval_original.jsonl").write_text(json.dumps({"entry_point": "largest"}) + "\n")
    return directory


def test_merged_rows_are_problems(humaneval_x, tmp_path):
    run_program(PREPARE, "merge", humaneval_x, "--output", tmp_path / "pack")
    for language in LANGUAGES:
        (problem,) = load_problems(tmp_path / "pack", language)
        made = row(language)
        for name in ("prompt", "buggy_solution", "entry_point", "bug_type", "failure_symptoms"):
            assert getattr(problem, name) == made[name], (language, name)
        assert problem.docstring.startswith("Return the largest number of a list.")
        assert problem.instruction.endswith(
            f"function `{problem.signature}` to solve the following problem:\n{problem.docstring}"
        )
    assert load_problems(tmp_path / "pack", "rust")[0].signature == "largest(numbers:Vec<i32>) -> i32"
    assert load_problems(tmp_path / "pack", "js")[0].signature == "const largest = (numbers)"
    assert load_problems(tmp_path / "pack", "cpp")[0].signature == "int largest(vector<int> numbers)"


def test_humaneval_x_gives_humanevalpack_field_by_field(shared_data, tmp_path):
    done = run_program(PREPARE, "merge", shared_data / "humaneval-x", "--output", tmp_path)
    for language in LANGUAGES:
        made, published = (folder / f"{language}.jsonl" for folder in (tmp_path, shared_data / "humanevalpack"))
        rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (made, published)]
        assert rows[0] == rows[1]
        assert [[*row] for row in rows[0]] == [[*row] for row in rows[1]]
    report = json.loads((tmp_path / "humanevalpack_report.json").read_text())
    assert [(edit["problem"], edit["field"]) for edit in report["edits"]] == [
        ("Python/142", "docstring"),
        ("Python/142", "instruction"),
    ]
    assert "Python/142 docstring: published with the quote of a docstring" in done.stderr


def test_edits_made_by_hand_are_listed_by_check_and_can_be_left_out(shared_data, tmp_path):
    run_program(PREPARE, "merge", shared_data / "humaneval-x", "--output", tmp_path, "--no-edits")
    done = run_program(PREPARE, "check", tmp_path, shared_data / "humanevalpack")
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == ["Python/142 docstring", "Python/142 instruction"]
    assert lines[-1] == "0 fields differ without a known reason"


def test_check_finds_a_changed_field(humaneval_x, tmp_path):
    run_program(PREPARE, "merge", humaneval_x, "--output", tmp_path / "pack")
    other = shutil.copytree(tmp_path / "pack", tmp_path / "other")
    changed = json.loads((other / "go.jsonl").read_text()) | {"test": "none", "\x1b[2Jkey": "cleared"}
    (other / "go.jsonl").write_text(json.dumps(changed) + "\n")
    done = run_program(PREPARE, "check", tmp_path / "pack", other, ok=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "Go/0 test: differs",
        r"Go/0 \x1b[2Jkey: differs",
        "2 fields differ without a known reason",
    ]


def test_extract_writes_the_solutions_and_never_overwrites_bugs(humaneval_x):
    for language in LANGUAGES:
        (humaneval_x / language / "humanevalpack.json").unlink()
    run_program(PREPARE, "extract", humaneval_x)
    (python,) = json.loads((humaneval_x / "python/humanevalpack.json").read_text())
    assert python == {
        "buggy_solution": row("python")["canonical_solution"],
        "bug_type": "variable misuse",
        "failure_symptoms": "incorrect output",
    }
    (rust,) = json.loads((humaneval_x / "rust/humanevalpack.json").read_text())
    assert rust == {"buggy_solution": row("rust")["canonical_solution"]}
    error = one_error_line(run_program(PREPARE, "extract", humaneval_x, ok=False))
    assert "python/humanevalpack.json: exists, and may hold bugs made by hand" in error
    error = one_error_line(run_program(PREPARE, "merge", humaneval_x, "--output", humaneval_x / "out", ok=False))
    assert "Python/0 has no bug yet; edit one in by hand" in error
    assert not (humaneval_x / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("go/humanevalpack.json", "[]", "0 entries, expected a list of 1"),
        ("go/humanevalpack.json", "[", "not JSON"),
        ("go/humanevalpack.json", "[{}]", "entry 0 needs the texts buggy_solution"),
        ("js/humaneval.jsonl", '{"task_id": "JavaScript/0"}\n', ":1: no key 'prompt'"),
        ("js/humaneval.jsonl", "", "0 rows, expected 1"),
        ("HumanEval_original.jsonl", '{"entry_point": "smallest"}\n', "'smallest' is neither in the declaration nor"),
    ],
)
def test_damaged_input_is_one_line_and_writes_nothing(file, content, message, humaneval_x, tmp_path):
    (humaneval_x / file).write_text(content)
    done = run_program(PREPARE, "merge", humaneval_x, "--output", tmp_path / "pack", ok=False)
    assert done.returncode == 2
    assert message in one_error_line(done)
    assert not (tmp_path / "pack").exists()


def test_missing_directory_and_step_are_one_line(tmp_path):
    error = one_error_line(run_program(PREPARE, "merge", tmp_path / "none", "--output", tmp_path / "pack", ok=False))
    assert "HumanEval_original.jsonl: no such file" in error
    assert "invalid choice: 'make'" in one_error_line(run_program(PREPARE, "make", ok=False))
