"""evaluation/run/compare.py: paired differences, tests, and the problems that changed sides."""

import json
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from scored_directory import write_data, write_evaluation

from megatron_ft.errors import UserError
from megatron_ft.evaluation.comparison import compare, to_markdown
from megatron_ft.evaluation.contaminated import scores_without
from megatron_ft.evaluation.problems import load_problems
from megatron_ft.evaluation.scores import Evaluation, load_evaluation

GOOD, BAD = "passed", "wrong_answer"
COMPARE = "evaluation/run/compare.py"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data", problems=8)


def evaluation(directory: Path, data: Path, statuses: list[list[str]], **settings) -> Evaluation:
    return load_evaluation(write_evaluation(directory, data, statuses, **settings), data, "faithful")


def test_one_sample_per_problem_is_tested_by_mcnemar(data, tmp_path):
    a = [[GOOD]] + [[BAD]] * 6 + [[GOOD]]
    b = [[BAD]] + [[GOOD]] * 6 + [[GOOD]]
    write_evaluation(tmp_path / "a", data, a)
    write_evaluation(tmp_path / "b", data, b)
    done = run_program(COMPARE, tmp_path / "a", tmp_path / "b", "--data", data, "--json", tmp_path / "c.json")
    pair = json.loads((tmp_path / "c.json").read_bytes())["comparisons"][0]
    assert pair["test"] == "McNemar" and pair["p"] == 0.125, "1 against 6: 2 * (1 + 7) / 2**7"
    assert pair["difference"] == pytest.approx(5 / 8) and pair["low"] <= 5 / 8 <= pair["high"]
    assert pair["lost"] == ["Python/0"] and pair["won"] == [f"Python/{i}" for i in range(1, 7)]
    assert "only A solves 1: Python/0." in done.stdout and "+62.5 (" in done.stdout


def test_samples_are_compared_by_the_paired_bootstrap(data, tmp_path):
    a = evaluation(tmp_path / "a", data, [[GOOD, BAD]] * 4 + [[BAD, BAD]] * 4)
    b = evaluation(tmp_path / "b", data, [[GOOD, GOOD]] * 4 + [[BAD, BAD]] * 4, seed=1)
    pair = compare(a, b)["comparisons"][0]
    assert pair["test"] == "paired bootstrap" and pair["difference"] == 0.25 and pair["low"] > 0
    assert 0 < pair["p"] < 0.06 and pair["won"] == pair["lost"] == [], "half of the samples pass: solved by both"
    assert 0.2 < pair["smallest_detectable"] < 0.35
    back = compare(b, a)["comparisons"][0]
    assert back["difference"] == -0.25 and back["p"] == pytest.approx(pair["p"], abs=0.01)
    same = compare(a, a)["comparisons"][0]
    assert same["p"] == 1 and (same["low"], same["high"]) == (0, 0)


def test_p_values_are_adjusted_for_the_languages_of_a_task(tmp_path):
    data, names = tmp_path / "data", ("python", "js")
    for language in names:
        write_data(data, language, 8)
    sides: list[Evaluation] = []
    for side, status in (("a", BAD), ("b", GOOD)):
        parts = [
            evaluation(
                tmp_path / f"{side}-{language}", data, [[status]] * good + [[BAD]] * (8 - good), language=language
            )
            for language, good in zip(names, (8, 6), strict=True)
        ]
        sides.append(Evaluation(tmp_path / side, parts[0].manifest, "faithful", [part.scored[0] for part in parts]))
    pairs = compare(*sides)["comparisons"]
    assert [pair["p"] for pair in pairs] == [2 / 2**8, 2 / 2**6]
    assert [pair["p_holm"] for pair in pairs] == [4 / 2**8, 2 / 2**6]


def test_other_settings_are_named(data, tmp_path):
    a = evaluation(tmp_path / "a", data, [[GOOD]] * 8)
    b = evaluation(tmp_path / "b", data, [[GOOD]] * 8, temperature=0)
    found = compare(a, b)
    assert found["settings_that_differ"] == ["temperature 0.2 and 0"]
    assert "Not only the models differ: temperature 0.2 and 0." in to_markdown(found)


def test_what_has_no_score_is_not_compared(data, tmp_path):
    a = evaluation(tmp_path / "a", data, [[GOOD]] * 8)
    b = evaluation(tmp_path / "b", data, [[GOOD]] * 7)
    with pytest.raises(UserError, match=r"b: fixtests-python has no score: 7 of 8 samples scored"):
        compare(a, b)
    write_data(data, "js", 8)
    write_evaluation(tmp_path / "js", data, [[GOOD]] * 8, language="js")
    done = run_program(COMPARE, tmp_path / "a", tmp_path / "js", "--data", data, ok=False)
    assert "have no task in common for the same language" in one_error_line(done) and done.returncode == 2


def test_scores_without_the_problems_that_training_rows_hold(tmp_path):
    data = write_data(tmp_path / "data", problems=8)
    problems = load_problems(data, "python")
    first = problems[0]
    rows = [{"inputs": "Fix it", "outputs": first.prompt + first.canonical_solution}, {"inputs": "a", "outputs": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_evaluation(tmp_path / "e", data, [[GOOD]] * 4 + [[BAD]] * 4)
    flags = ["--data", data, "--results", tmp_path / "e", "--json", tmp_path / "hits.json"]
    done = run_program("evaluation/run/contamination.py", tmp_path / "rows.jsonl", *flags, ok=False)
    assert done.returncode == 1, done.stderr
    score = json.loads((tmp_path / "hits.json").read_bytes())["scores"][0]
    # The made problems have equal texts: the row holds all of them.
    assert score["held"] == 8 and score["without"] is None and "nothing left" in done.stdout
    evaluated = load_evaluation(tmp_path / "e", data, "faithful")
    score = scores_without(evaluated, {"Go/0", "Python/1"})[0]
    assert (score["held"], score["problems"], score["with"]["estimate"]) == (2, 8, 0.5)
    assert score["without"]["estimate"] == pytest.approx(2 / 6)
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n", encoding="utf-8")
    run_program("evaluation/run/contamination.py", tmp_path / "rows.jsonl", *flags)
    score = json.loads((tmp_path / "hits.json").read_bytes())["scores"][0]
    assert score["with"] == score["without"]
    done = run_program("evaluation/run/contamination.py", tmp_path / "rows.jsonl", *flags, "--shard", "1/2", ok=False)
    assert "--results needs all rows: not with --shard" in one_error_line(done)
