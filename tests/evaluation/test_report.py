"""evaluation/run/report.py: scores, why there is none, the page, and a run's curve."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from scored_directory import TEXTS, write_data, write_evaluation

from megatron_ft.evaluation.problems import load_problems
from megatron_ft.evaluation.report_samples import difference
from megatron_ft.evaluation.scores import average, load_evaluation, report_of
from megatron_ft.evaluation.statistics import pass_at_k

REPORT = "evaluation/run/report.py"
GOOD, BAD = "passed", "wrong_answer"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def report(directory: Path, data: Path, *flags, status: int = 0) -> tuple[dict, str]:
    """The report's JSON and its page."""
    done = run_program(REPORT, directory, "--data", data, *flags, ok=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == (directory / "report.md").read_text(encoding="utf-8")
    return json.loads((directory / "report.json").read_bytes()), (directory / "report.html").read_text(encoding="utf-8")


def samples_in(page: str) -> dict:
    found = re.search('<script type="application/json" id=samples>(.*?)</script>', page)
    assert found
    return json.loads(found[1])[0]


def test_scores_statuses_and_bug_types(data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD] * 10, [GOOD] * 5 + [BAD] * 5, [BAD] * 9 + ["timeout"]])
    found, _ = report(tmp_path / "e", data)
    score = found["scores"][0]
    assert score["score"]["pass@1"]["estimate"] == pytest.approx(0.5)
    assert score["score"]["pass@10"]["estimate"] == pytest.approx((1 + pass_at_k(10, 5, 10) + 0) / 3)
    assert 0 <= score["score"]["pass@1"]["low"] < 0.5 < score["score"]["pass@1"]["high"] <= 1
    assert score["statuses"] == {GOOD: 15, BAD: 14, "timeout": 1}
    assert {name: one["pass@1"]["estimate"] for name, one in score["bug_types"].items()} == {
        "value misuse": 0.5,
        "missing logic": 0.5,
    }
    markdown = (tmp_path / "e/report.md").read_text(encoding="utf-8")
    assert "| fixtests | Python   | 3        | 30      | 50.0 (0.0 to 100.0) |" in markdown


@pytest.mark.parametrize("partial", [False, True])
def test_missing_samples_give_a_score_only_with_partial(partial, data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD, GOOD], [BAD], []], asked=2)
    flags = ["--partial"] if partial else []
    found, _ = report(tmp_path / "e", data, *flags, status=0 if partial else 1)
    score = found["scores"][0]
    assert "3 of 6 samples scored" in score["warnings"]
    if partial:
        assert score["score"]["pass@1"]["estimate"] == 0.5 and score["counts"] == {
            "Python/0": [2, 2],
            "Python/1": [1, 0],
        }
    else:
        assert score["score"] is None and "--partial" in score["no_score"]
        assert "| no score " in (tmp_path / "e/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [[], ["--partial"]])
def test_an_error_of_the_machine_is_never_a_score(flags, data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD], [GOOD], ["sandbox_error"]])
    found, _ = report(tmp_path / "e", data, *flags, status=1)
    assert found["scores"][0]["score"] is None
    assert found["scores"][0]["no_score"].startswith("1 of 3 programs met a sandbox_error")


def test_samples_that_end_by_length_and_exclusions_are_reported(tmp_path):
    data = write_data(tmp_path / "data", "cpp", problems=24)
    statuses = [[GOOD if number == 23 else BAD] for number in range(24)]
    write_evaluation(tmp_path / "e", data, statuses, language="cpp", mode="clean", finish="length")
    found, _ = report(tmp_path / "e", data, "--mode", "clean")
    score = found["scores"][0]
    assert (
        score["score"]["pass@1"]["estimate"] == 0 and score["problems"] == 23 and list(score["excluded"]) == ["CPP/23"]
    )
    assert any(warning.startswith("100% of the samples ended by length") for warning in score["warnings"])


class Page(HTMLParser):
    """Tags, and the attributes that could load something."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[tuple] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [(tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "onload")]


def test_the_page_shows_samples_as_text_and_loads_nothing(data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD, GOOD], [GOOD, BAD], [BAD, "timeout"]])
    _, html = report(tmp_path / "e", data)
    page = Page()
    page.feed(html)
    assert not page.loads and "alert(1)</script>" not in html and "://" not in html.replace("/models/", "")
    assert page.tags.count("script") == 2
    group = samples_in(html)
    samples = group["samples"]
    assert [(one["problem"], one["samples"], one["status"]) for one in samples] == [
        ("Python/0", [0, 1], GOOD), ("Python/1", [0], GOOD), ("Python/1", [1], BAD), ("Python/2", [0], BAD),
        ("Python/2", [1], "timeout"),
    ]  # fmt: skip
    first = samples[0]
    assert first["text"] == TEXTS[GOOD] and first["text"][: first["kept"]].strip() == "return max(numbers)"
    assert first["difference"] == ""
    assert "-    return max(numbers)\n+    return min(numbers)" in samples[2]["difference"]
    common = group["problems"]["Python/1"]
    assert common["prompt"].startswith("Question: Fix bugs in largest.")
    program = common["before"] + samples[2]["program"] + common["after"]
    assert program.startswith("import math") and program.endswith("check(largest)") and "min(numbers)" in program


def test_differences_ignore_blank_lines(data):
    problem = load_problems(data, "python")[0]
    answer = problem.declaration + "\n    return max(numbers)   \n\n"
    assert difference(answer, problem, "fixtests") == ""


def test_averages_resample_translations_together():
    counts = [[10, 10], [10, 0], [10, 5], [10, 10]]
    scores = [
        {"task": "fixtests", "counts": {f"{prefix}/{i}": count for i, count in enumerate(counts)}}
        for prefix in ("Python", "Go")
    ]
    one, two = average(scores[:1]), average(scores)
    assert one == pytest.approx(two), "the same verdicts again are no further evidence"
    assert two["estimate"] == pytest.approx(0.625)


def test_the_curve_of_a_run_grows_by_one_point_per_checkpoint(data, tmp_path):
    save = tmp_path / "run"
    save.mkdir()
    steps = [{"iteration": i, "loss": 2.0, "part": 0, "consumed_samples": i, "consumed_tokens": i} for i in (1, 20)]
    (save / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    for iteration, statuses in (
        (20, [[GOOD], [GOOD], [BAD]]),
        (10, [[GOOD], [BAD], [BAD]]),
        (10, [[BAD], [BAD], [BAD]]),
    ):
        directory = tmp_path / f"e{iteration}{sum(statuses, []).count(BAD)}"
        write_evaluation(directory, data, statuses)
        report(directory, data, "--curve", save, "--iteration", iteration)
    page = (save / "report.html").read_text(encoding="utf-8")
    chart = page.split("HumanEvalPack, pass@1", 1)[1].split("</svg>")[0]
    assert chart.count("<circle") == 2, "the second evaluation of iteration 10 replaces the first"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "clean"], "nothing scored in clean mode; run python evaluation/run/score.py"),
        (["--curve", "."], "--curve SAVE and --iteration N belong together"),
        (["--curve", "/none", "--iteration", "1"], "--curve /none: not a directory"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD], [GOOD], [BAD]])
    done = run_program(REPORT, tmp_path / "e", "--data", data, *flags, ok=False)
    assert message in one_error_line(done) and done.returncode == 2


def test_other_data_and_other_generations_are_refused(data, tmp_path):
    write_evaluation(tmp_path / "e", data, [[GOOD], [GOOD], [BAD]])
    other = write_data(tmp_path / "other", problems=2)
    done = run_program(REPORT, tmp_path / "e", "--data", other, ok=False)
    assert "its python problems are not those of" in one_error_line(done)
    assert "not an evaluation (no manifest.json)" in one_error_line(run_program(REPORT, data, "--data", data, ok=False))
    path = tmp_path / "e/generations/fixtests-python.1-of-1.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("min(numbers)", "sum(numbers)"), encoding="utf-8")
    done = run_program(REPORT, tmp_path / "e", "--data", data, ok=False)
    assert "the scored program is not that of its generation; score again" in one_error_line(done)
    assert not (tmp_path / "e/report.html").exists()


def test_the_last_verdict_on_a_sample_counts(data, tmp_path):
    write_evaluation(tmp_path / "e", data, [["sandbox_error"], [GOOD], [BAD]])
    path = tmp_path / "e/results/fixtests-python.faithful.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0].replace("sandbox_error", GOOD)]), encoding="utf-8")
    score = report_of(load_evaluation(tmp_path / "e", data, "faithful"))["scores"][0]
    assert score["score"]["pass@1"]["estimate"] == pytest.approx(2 / 3)
