"""The programs of an evaluation: its generated texts, cut and assembled.

An evaluation's texts come from generate.py, or are the reference harness's lists, which are cut
already (`imported` in the manifest).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft import __version__
from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import Problem, data_digest
from megatron_ft.evaluation.programs import Program, program_of
from megatron_ft.evaluation.prompts import prompt_of
from megatron_ft.evaluation.records import (
    Generation,
    RecordWriter,
    check_generations,
    generations_file,
    missing_samples,
    open_manifest,
    read_generations,
    read_lists,
)
from megatron_ft.files.json_file import read_small_file

MAX_LISTS_BYTES = 1 << 30


@dataclass(frozen=True)
class Sample:
    """A sample and its program; `is_empty` if the model added nothing to the function's start."""

    problem: str
    number: int
    program: Program
    is_empty: bool


def programs_of(
    directory: Path, manifest: Mapping[str, Any], task: str, language: str, problems: list[Problem], mode: str
) -> tuple[list[Sample], int]:
    """The samples of a task and language in the data's order, and how many are missing.

    Raises UserError if a generation answers another problem or prompt.
    """
    generations = read_generations(directory, task, language)
    imported = "imported" in manifest
    prompts = {problem.task_id: prompt_sha256(problem, task, manifest) for problem in problems}
    if task == "explainsynthesize":  # each prompt holds its own description
        prompts = {}
    if prompts or imported:
        check_generations(generations, prompts, directory)
    wanted = [problem.task_id for problem in problems]
    count = int(manifest["samples"])
    found = []
    for problem in problems:
        earlier: list[str] = []
        for number in range(count):
            if (generation := generations.get((problem.task_id, number))) is None:
                continue
            text = generation.text
            answer = text if imported else cut(text, problem, task, manifest["style"], mode, manifest.get("eos"))
            program = program_of(problem, task, answer, mode, earlier if language == "go" else ())
            earlier.append(answer)
            starts = {"", problem.prompt.strip(), problem.declaration.strip()}
            found.append(Sample(problem.task_id, number, program, answer.strip() in starts))
    return found, len(missing_samples(generations, wanted, count))


def prompt_sha256(problem: Problem, task: str, manifest: Mapping[str, Any]) -> str:
    """Digest of a problem's prompt; of its id for imported lists, whose prompts are unknown."""
    text = problem.task_id if "imported" in manifest else prompt_of(problem, task, manifest["style"])
    return hashlib.sha256(text.encode()).hexdigest()


def import_lists(
    path: Path, directory: Path, task: str, language: str, data: Path, problems: list[Problem]
) -> dict[str, Any]:
    """Make an evaluation of the reference harness's lists; returns its manifest.

    Raises UserError if there is not one list per problem, or `directory` holds another evaluation.
    """
    lists = read_lists(path)
    if len(lists) != len(problems):
        raise UserError(f"{path}: {len(lists)} lists, expected {len(problems)}: one per problem of {language}")
    if len({len(texts) for texts in lists}) > 1:
        raise UserError(f"{path}: lists of different lengths; expected as many samples for each problem")
    manifest = {
        "imported": path.name,
        "imported_sha256": hashlib.sha256(read_small_file(path, MAX_LISTS_BYTES)).hexdigest(),
        "data_sha256": {language: data_digest(data, language)},
        "tasks": [task],
        "languages": [language],
        "samples": len(lists[0]),
        "version": __version__,
    }
    open_manifest(directory, manifest)
    done = read_generations(directory, task, language)
    records = [
        Generation(task, language, problem.task_id, number, 0, prompt_sha256(problem, task, manifest), text, 0, "stop")
        for problem, texts in zip(problems, lists, strict=True)
        for number, text in enumerate(texts)
        if (problem.task_id, number) not in done
    ]
    if records:
        with RecordWriter(generations_file(directory, task, language)) as writer:
            writer.append(records)
    return manifest
