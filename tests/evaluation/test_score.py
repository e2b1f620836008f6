"""score.py on real answers: published numbers, caches, and no score where something is missing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from made_problems import BUGS, SOLUTIONS, row, write_rows
from sandboxes import sandbox_or_skip, toolchain_or_skip

from megatron_ft.evaluation.problems import LANGUAGES, data_digest, load_problems
from megatron_ft.evaluation.records import (
    Generation,
    RecordWriter,
    Result,
    generations_file,
    open_manifest,
    read_records,
    results_file,
)
from megatron_ft.evaluation.samples import prompt_sha256

SCORE = "evaluation/run/score.py"
STYLE = "octocoder"
# Canonical answers that the reference fails, by the numbers of their problems.
FAILS_IN_REFERENCE = {
    ("cpp", "fixtests"): {38},
    ("go", "fixtests"): {10, 32, 38, 50, 72, 90, 158},
    ("go", "synthesize"): {27, 72, 90, 158},
    ("rust", "fixtests"): {32, 137, 145},
    ("rust", "synthesize"): {32, 137, 145},
}
SAMPLED = {"python": (0, 1, 32, 162), "cpp": (22, 23, 38, 162), "js": (0, 33, 114, 162), "java": (0, 114, 162)}
SAMPLED |= {"go": (0, 10, 27, 72, 158), "rust": (0, 38, 91, 137, 162)}


def evaluation(directory: Path, data: Path, language: str, texts: dict[str, list[str]], *tasks: str) -> Path:
    """An evaluation of tasks, by default fixtests, with these generated texts by problem."""
    tasks = tasks or ("fixtests",)
    manifest = {
        "tasks": list(tasks),
        "languages": [language],
        "style": STYLE,
        "samples": max(map(len, texts.values())),
        "data_sha256": {language: data_digest(data, language)},
        "eos": "<|endoftext|>",
    }
    open_manifest(directory, manifest)
    for task in tasks:
        with RecordWriter(generations_file(directory, task, language)) as writer:
            for problem in load_problems(data, language):
                digest = prompt_sha256(problem, task, manifest)
                for i, text in enumerate(texts.get(problem.task_id, ())):
                    writer.append([Generation(task, language, problem.task_id, i, 0, digest, text, 1, "stop")])
    return directory


def made_evaluation(tmp_path: Path, texts: list[str], problems: int = 2) -> tuple[Path, Path]:
    """An evaluation of made-up problems in Python; returns it and its data."""
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data, "python", [row("python", i) for i in range(problems)])
    made = {f"Python/{i}": texts for i in range(problems)}
    return evaluation(tmp_path / "evaluation", data, "python", made), data


def statuses(directory: Path, language: str, task: str = "fixtests", mode: str = "faithful") -> dict:
    results = read_records(results_file(directory, task, language, mode), Result)
    return {(result.problem, result.sample): result.status for result in results}


def needs(*languages: str) -> None:
    sandbox_or_skip()
    for language in languages:
        toolchain_or_skip(language)


def test_score_of_made_answers_and_again_without_running_anything(tmp_path):
    needs("python")
    texts = ["\n" + SOLUTIONS["python"], "\n" + BUGS["python"], "\n" + SOLUTIONS["python"] + "\n", ""]
    directory, data = made_evaluation(tmp_path, texts)
    done = run_program(SCORE, directory, "--data", data)
    assert "faithful pass@1 0.5 over 2 problems" in done.stdout
    assert "8 samples, 3 programs: passed 4, wrong_answer 2, empty 2" in done.stdout
    assert "python: 2 programs executed" in done.stdout
    expected = {0: "passed", 1: "wrong_answer", 2: "passed", 3: "empty"}
    assert statuses(directory, "python") == {(f"Python/{p}", i): s for p in (0, 1) for i, s in expected.items()}
    first = results_file(directory, "fixtests", "python", "faithful").read_bytes()
    again = run_program(SCORE, directory, "--data", data, "--workers", "3")
    assert "python: 0 programs executed" in again.stdout
    assert results_file(directory, "fixtests", "python", "faithful").read_bytes() == first


def test_missing_samples_are_no_score_without_partial(tmp_path):
    needs("python")
    directory, data = made_evaluation(tmp_path, ["\n" + SOLUTIONS["python"]])
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    (directory / "manifest.json").write_text(json.dumps({**manifest, "samples": 2}), encoding="utf-8")
    done = run_program(SCORE, directory, "--data", data, ok=False)
    assert done.returncode == 1 and "pass@" not in done.stdout
    assert "2 of 4 samples are missing" in done.stderr and "--partial" in one_error_line(done)
    done = run_program(SCORE, directory, "--data", data, "--partial")
    assert "pass@1 1.0" in done.stdout and "2 of 4 samples are missing" in done.stderr


@pytest.mark.parametrize("broken", ["missing compiler", "wrong compiler", "broken sandbox"])
def test_broken_machine_is_no_score(broken, tmp_path):
    needs("js")
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data, "js", [row("js")])
    directory = evaluation(tmp_path / "evaluation", data, "js", {"JavaScript/0": ["\n" + SOLUTIONS["js"]]})
    commands = tmp_path / "bin"
    commands.mkdir()
    script = {"missing compiler": None, "wrong compiler": ("node", "exit 0"), "broken sandbox": ("bwrap", "exit 1")}
    if broken == "missing compiler":
        bwrap = shutil.which("bwrap")
        if not bwrap:
            pytest.skip("needs bubblewrap")
        (commands / "bwrap").symlink_to(bwrap)
        path = str(commands)
    else:
        name, line = script[broken] or ("", "")
        (commands / name).write_text(f"#!/bin/sh\necho v20.0.0\n{line}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
        path = f"{commands}:{os.environ['PATH']}"
    arguments = ["--sandbox", "bwrap"] if broken == "broken sandbox" else []
    environment = {**os.environ, "PATH": path, "NODE_PATH": "/usr/lib/node_modules"}
    done = run_program(SCORE, directory, "--data", data, *arguments, ok=False, env=environment)
    assert done.returncode == 1 and "pass@" not in done.stdout, done
    kind = "sandbox_error" if broken == "broken sandbox" else "toolchain_error"
    assert one_error_line(done).startswith(f"error: {kind}: ")
    assert not results_file(directory, "fixtests", "js", "faithful").exists()


def test_bad_input_is_one_line(tmp_path):
    directory, data = made_evaluation(tmp_path, ["\n" + SOLUTIONS["python"]])

    def error(*arguments: str | Path) -> str:
        done = run_program(SCORE, *arguments, ok=False, env={**os.environ, "HUMANEVALPACK": str(data)})
        assert done.returncode == 2 and not (directory / "results").exists()
        return one_error_line(done)

    assert "name either DIR" in error()
    assert "not an evaluation (no manifest.json); expected the --output of generate.py" in error(tmp_path)
    assert "its languages are python, not go" in error(directory, "--languages", "go")
    assert "its tasks are fixtests, not fixdocs" in error(directory, "--tasks", "fixdocs")
    assert "--workers must be at least 1" in error(directory, "--workers", "0")
    lists = tmp_path / "lists.json"
    lists.write_text('[["x"]]', encoding="utf-8")
    imported = ("--import-generations", lists, "--output", tmp_path / "new", "--task", "fixtests")
    assert "1 lists, expected 2" in error(*imported, "--languages", "python")
    assert "one of each" in error(*imported)
    write_rows(data, "python", [row("python", 0), {**row("python", 1), "test": "assert False"}])
    assert "are not those that" in error(directory)


@pytest.mark.slow
def test_octocoder_set_has_the_published_score(shared_data, tmp_path):
    """Its author's pass@1 and pass@10, to the last digit; again, nothing runs."""
    needs("python")
    source = shared_data / "octocoder-fixtests-python"
    published = json.loads((source / "metrics.json").read_text(encoding="utf-8"))["humanevalfixtests-python"]
    command = [SCORE, "--import-generations", source / "generations.json", "--task", "fixtests"]
    command += ["--languages", "python", "--data", shared_data / "humanevalpack", "--output", tmp_path / "octocoder"]
    done = run_program(*command, timeout=1200)
    for name, value in published.items():
        assert f"{name} {value!r} over 164 problems" in done.stdout
    assert "passed 1,031," in done.stdout and "timeout 49" in done.stdout
    again = run_program(*command)
    assert "python: 0 programs executed" in again.stdout
    assert f"pass@10 {published['pass@10']!r}" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_canonical_and_buggy_solutions_score_as_in_the_reference(language, shared_data, tmp_path):
    """A sample of the problems, among them those that the reference fails."""
    needs(language)
    data = shared_data / "humanevalpack"
    problems = [p for p in load_problems(data, language) if int(p.task_id.split("/")[1]) in SAMPLED[language]]
    answers = ("canonical_solution", "buggy_solution")
    texts = {p.task_id: ["\n" + getattr(p, answer).lstrip("\n") for answer in answers] for p in problems}
    tasks = ("fixtests", "synthesize")
    directory = evaluation(tmp_path / "evaluation", data, language, texts, *tasks)
    free = {23} if language == "cpp" else {32} if language == "rust" else set()
    for mode in ("faithful", "clean"):
        command = (SCORE, directory, "--data", data, "--mode", mode, "--cpu-limit", "5", "--partial")
        run_program(*command, timeout=900)
        for task in tasks:
            passed: tuple[set[int], set[int]] = set(), set()
            for (name, sample), status in statuses(directory, language, task, mode).items():
                if status == "passed":
                    passed[sample].add(int(name.split("/")[1]))
            fails = FAILS_IN_REFERENCE.get((language, task), set()) if mode == "faithful" else set()
            assert passed[0] - free == set(SAMPLED[language]) - fails - free, (task, mode)
            assert passed[1] <= free, (task, mode)
