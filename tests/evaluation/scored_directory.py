"""A scored evaluation of made problems, as generate.py and score.py leave it."""

import hashlib
from pathlib import Path

from made_problems import row, write_rows

from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import data_digest, load_problems
from megatron_ft.evaluation.programs import program_of
from megatron_ft.evaluation.prompts import prompt_of
from megatron_ft.evaluation.records import (
    Generation,
    RecordWriter,
    Result,
    generations_file,
    open_manifest,
    results_file,
)

BUG_TYPES = ("value misuse", "missing logic", "value misuse")
TEXTS = {
    "passed": "\n    return max(numbers)\n\nprint('<script>alert(1)</script>')\n",
    "wrong_answer": "\n    return min(numbers)\n",
    "timeout": "\n    while True: pass\n",
    "sandbox_error": "\n    return 1\n",
}


def write_data(directory: Path, language: str = "python", problems: int = 3) -> Path:
    """HumanEvalPack with a few problems of a language."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [row(language, number) | {"bug_type": BUG_TYPES[number % 3]} for number in range(problems)]
    write_rows(directory, language, rows)
    return directory


def write_evaluation(
    directory: Path, data: Path, statuses: list[list[str]], *, asked: int | None = None, finish: str = "stop",
    mode: str = "faithful", language: str = "python", **manifest,
) -> Path:  # fmt: skip
    """An evaluation of fixtests: one list of statuses per problem, `asked` samples per problem."""
    samples = asked or len(statuses[0])
    open_manifest(
        directory,
        {
            "model": "/models/first-hf", "eos": "<|endoftext|>", "tasks": ["fixtests"], "languages": [language],
            "style": "octocoder", "samples": samples, "temperature": 0.2, "top_p": 0.95, "max_length": 2048, "seed": 0,
            "data_sha256": {language: data_digest(data, language)}, **manifest,
        },
    )  # fmt: skip
    problems = load_problems(data, language)
    generations, results = [], []
    for problem, of_problem in zip(problems, statuses, strict=False):
        digest = hashlib.sha256(prompt_of(problem, "fixtests", "octocoder").encode()).hexdigest()
        for sample, status in enumerate(of_problem):
            name, text = problem.task_id, TEXTS[status]
            generations.append(Generation("fixtests", language, name, sample, 7, digest, text, 9, finish))
            program = program_of(problem, "fixtests", cut(text, problem, "fixtests", mode=mode), mode)
            results.append(
                Result(
                    name,
                    sample,
                    program.sha256,
                    status,
                    0,
                    None,
                    0.05,
                    0.1,
                    1 << 20,
                    "out <b>put</b>",
                    "bwrap",
                    "Python 3.11",
                )
            )
    with RecordWriter(generations_file(directory, "fixtests", language)) as writer:
        writer.append(generations)
    with RecordWriter(results_file(directory, "fixtests", language, mode)) as writer:
        writer.append(results)
    return directory
