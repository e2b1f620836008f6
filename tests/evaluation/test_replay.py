"""generate.py --engine replay: generations from files, as if a model had written them."""

import json
from pathlib import Path

import pytest
from conftest import one_error_line, reference_data, run_program
from generate_program import GENERATE, load, texts, write_data

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.engines.replay import Replay
from megatron_ft.evaluation.problems import load_problems
from megatron_ft.evaluation.prompts import start_of
from megatron_ft.evaluation.records import generations_file, read_lists, write_lists

SAMPLES = 2


@pytest.fixture
def replay(monkeypatch, tmp_path):
    """Call `main` with the file to replay, an output and more flags."""
    main, data = load(monkeypatch), write_data(tmp_path / "data")

    def run(source: Path, output: Path, *flags: str | int | Path) -> None:
        common = [source, "--engine", "replay", "--data", data, "--languages", "js", "--samples", SAMPLES]
        main(*common, "--style", "octocoder", "--output", output, *flags)

    return run


@pytest.fixture
def lists(tmp_path, replay) -> Path:
    """Right answers to the three problems, as the reference harness writes them."""
    problems = load_problems(tmp_path / "data", "js")
    answers = [
        [f"{start_of(p, 'synthesize').rstrip()}\n  // {i}\n{p.canonical_solution.rstrip()}" for i in range(SAMPLES)]
        for p in problems
    ]
    write_lists(tmp_path / "lists.json", answers)
    return tmp_path / "lists.json"


def test_lists_give_the_programs_they_hold(replay, lists, tmp_path):
    for shard in ("1/2", "2/2"):
        replay(lists, tmp_path / "out", "--tasks", "synthesize", "--shard", shard)
    found = texts(tmp_path / "out")
    problems = load_problems(tmp_path / "data", "js")
    for problem, expected in zip(problems, read_lists(lists), strict=True):
        answers = [cut(found[problem.task_id, number], problem, "synthesize") for number in range(SAMPLES)]
        assert answers == expected


@pytest.mark.parametrize("name", ["all", "all/generations/synthesize-js.1-of-1.jsonl"])
def test_records_are_replayed_unchanged(name, replay, lists, tmp_path):
    replay(lists, tmp_path / "all", "--tasks", "synthesize")
    replay(tmp_path / name, tmp_path / "again", "--tasks", "synthesize")
    path = generations_file(tmp_path / "again", "synthesize", "js")
    assert path.read_bytes() == generations_file(tmp_path / "all", "synthesize", "js").read_bytes()
    assert "seed" not in json.loads((tmp_path / "again/manifest.json").read_bytes())


def test_what_cannot_be_replayed_is_one_line_and_writes_nothing(replay, lists, tmp_path):
    replay(lists, tmp_path / "all", "--tasks", "synthesize")
    short, wrong = tmp_path / "short.json", tmp_path / "wrong.json"
    write_lists(short, read_lists(lists)[:2])
    write_lists(wrong, [["function largest() {}"] * SAMPLES] * 3)
    for source, flags, message in (
        (lists, ["--tasks", "synthesize", "--samples", 3], "no sample 2 of JavaScript/0 for synthesize; expected 3"),
        (lists, ["--tasks", "fixtests,fixdocs"], "lists are of one task and language"),
        (lists, ["--tasks", "fixtests", "--style", "diff"], "score.py --import-generations reads them"),
        (short, ["--tasks", "synthesize"], "2 lists, expected 3: one per problem of js"),
        (wrong, ["--tasks", "synthesize"], "text 0 of list JavaScript/0 does not begin as the function of synthesize"),
        (tmp_path / "all", ["--tasks", "fixdocs"], "no sample 0 of JavaScript/0 for fixdocs"),
        (tmp_path / "no.jsonl", ["--tasks", "fixdocs"], "no such file; expected generations to replay"),
        (
            tmp_path / "all",
            ["--tasks", "synthesize", "--style", "instruct"],
            "sample 0 of JavaScript/0 answers another",
        ),
    ):
        with pytest.raises(UserError, match=message):
            replay(source, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_a_list_is_one_line(tmp_path):
    data, path = write_data(tmp_path / "data"), tmp_path / "broken.json"
    path.write_text('[["a"', encoding="utf-8")
    flags = ("--engine", "replay", "--data", data, "--languages", "js", "--tasks", "fixdocs", "--style", "octocoder")
    done = run_program(GENERATE, path, *flags, "--output", tmp_path / "out", ok=False)
    assert "not JSON; expected a list with one list of texts per problem" in one_error_line(done)
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_the_public_generations_of_octocoder_keep_their_programs():
    data = reference_data("data")
    path = data / "octocoder-fixtests-python/generations.json"
    problems = load_problems(data / "humanevalpack", "python")
    engine = Replay(path, ["fixtests"], {"python": problems}, 20, "octocoder")
    for problem, texts_of_problem in zip(problems, read_lists(path), strict=True):
        for number, text in enumerate(texts_of_problem):
            stored = engine.stored("fixtests", problem.task_id, number).text
            assert cut(stored, problem, "fixtests").rstrip() == text.rstrip()
