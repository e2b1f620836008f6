"""Reading HumanEvalPack: what loads, and the one line for what does not."""

import json

import pytest
from made_problems import row, write_rows

from megatron_ft.errors import UserError
from megatron_ft.evaluation.problems import (
    EXCLUDED,
    LANGUAGES,
    data_digest,
    data_directory,
    load_problems,
    parse_languages,
    select,
)


@pytest.mark.parametrize("language", LANGUAGES)
def test_problems_load_with_all_texts_unchanged(language, tmp_path):
    rows = [row(language, number) for number in range(3)]
    write_rows(tmp_path, language, rows)
    problems = load_problems(tmp_path, language)
    assert [problem.task_id for problem in problems] == [found["task_id"] for found in rows]
    for name in ("prompt", "declaration", "canonical_solution", "buggy_solution", "test", "instruction"):
        assert [getattr(problem, name) for problem in problems] == [found[name] for found in rows]
    assert [problem.imports for problem in problems] == [found.get("import", "") for found in rows]


def test_clone_of_the_hub_repository_is_found(tmp_path):
    directory = tmp_path / "data/python/data"
    directory.mkdir(parents=True)
    write_rows(tmp_path, "python", [row("python")]).rename(directory / "humanevalpack.jsonl")
    assert len(load_problems(tmp_path, "python")) == 1


def test_digest_changes_with_the_data(tmp_path):
    write_rows(tmp_path, "js", [row("js")])
    before = data_digest(tmp_path, "js")
    write_rows(tmp_path, "js", [row("js") | {"test": ""}])
    assert data_digest(tmp_path, "js") != before


def test_shared_data_has_164_problems_per_language(shared_data):
    problems = {name: load_problems(shared_data / "humanevalpack", name) for name in LANGUAGES}
    assert {len(found) for found in problems.values()} == {164}
    assert set(EXCLUDED) < {problem.task_id for found in problems.values() for problem in found}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:1] + [lines[1][: len(lines[1]) // 2]], "the last line does not end in a newline"),
        (lambda lines: lines[1:], ":1: task_id is 'Python/1', expected 'Python/0'"),
        (lambda lines: [lines[0], lines[0]], ":2: task_id is 'Python/0', expected 'Python/1'"),
        (lambda lines: [lines[0].replace("Python/", "Rust/")], ":1: task_id is 'Rust/0', expected 'Python/0'"),
        (lambda lines: [lines[0].replace('"test"', '"tests"')], ":1: no key 'test'; the row has 'task_id'"),
        (lambda lines: [lines[0].replace('"value misuse"', "7")], ":1: 'bug_type' is an integer, not a string"),
        (lambda lines: ["{]\n"], ":1: not JSON"),
        (lambda lines: [], ": empty"),
    ],
)
def test_damaged_file_is_one_line_that_names_file_and_line(damage, message, tmp_path):
    path = write_rows(tmp_path, "python", [])
    path.write_text("".join(damage([json.dumps(row("python", n)) + "\n" for n in range(2)])))
    with pytest.raises(UserError) as error:
        load_problems(tmp_path, "python")
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_language_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="rust.jsonl: no such file"):
        load_problems(tmp_path, "rust")
    with pytest.raises(UserError, match="language 'ruby': unknown; one of python, cpp"):
        parse_languages("python,ruby")


def test_data_directory_is_the_flag_else_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("HUMANEVALPACK", raising=False)
    with pytest.raises(UserError, match="no --data"):
        data_directory(None)
    monkeypatch.setenv("HUMANEVALPACK", str(tmp_path))
    assert data_directory(None) == tmp_path
    with pytest.raises(UserError, match="not a directory"):
        data_directory(tmp_path / "missing")


def test_problem_missing_from_the_data_is_named(tmp_path):
    write_rows(tmp_path, "go", [row("go", number) for number in range(2)])
    problems = load_problems(tmp_path, "go")
    assert select(problems, ["Go/1"], "x.json") == problems[1:]
    with pytest.raises(UserError, match="x.json: problem 'Go/2' is not in the data, which has Go/0 to Go/1"):
        select(problems, ["Go/0", "Go/2"], "x.json")
