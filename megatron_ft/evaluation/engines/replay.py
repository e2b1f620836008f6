"""Samples that were generated before, from a file: records of generate.py, or lists of texts.

The reference harness (bigcode-evaluation-harness) writes the lists, one per problem. Its texts
begin with the start of the function, which the prompt has, too; it is removed, so that they are cut
and scored as other texts are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.evaluation.engines.engine import Request, Sample
from megatron_ft.evaluation.problems import Problem
from megatron_ft.evaluation.prompts import RUST_MAIN, prompt_of, start_of
from megatron_ft.evaluation.records import MANIFEST, Generation, read_generations, read_lists, read_records
from megatron_ft.evaluation.stopping import DIFF_STOP_WORDS
from megatron_ft.files.json_file import read_json

Key = tuple[str, str, int]  # task, problem, sample


class Replay:
    """The samples of `path`: an evaluation's directory, one of its files of generations, or a JSON
    file with lists of one task and language.

    Raises UserError if a sample is missing that is asked for, or answers another problem.
    """

    at_once = 1

    def __init__(
        self, path: Path, tasks: Sequence[str], problems: Mapping[str, list[Problem]], samples: int, style: str
    ):
        self._path = path
        self.eos: str | None = None
        if path.suffix == ".json":
            self._found = _from_lists(path, tasks, problems, style)
            self._content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            self.eos = _eos(path if path.is_dir() else path.parent.parent)
            self._found = _from_records(path, tasks, problems)
            digests = [f"{key} {found.prompt_sha256} {found.text}" for key, found in sorted(self._found.items())]
            self._content = hashlib.sha256("\n".join(digests).encode("utf-8", "surrogatepass")).hexdigest()
        for task in tasks:
            for problem in (problem for language in problems.values() for problem in language):
                for number in range(samples):
                    found = self._found.get((task, problem.task_id, number))
                    if found is None:
                        raise UserError(
                            f"{path}: no sample {number} of {problem.task_id} for {task}; expected {samples} per "
                            "problem: name its --tasks and --languages, and --samples, as it has them"
                        )
                    if task != "explainsynthesize":  # whose prompts hold descriptions
                        self._check(found, prompt_of(problem, task, style))

    def identity(self) -> dict[str, Any]:
        """The file and a digest of what it holds."""
        return {"model": str(self._path.resolve()), "model_sha256": self._content}

    def stored(self, task: str, problem: str, number: int) -> Generation:
        """A sample as it was generated; its `prompt_sha256` is empty if that is not known."""
        return self._found[task, problem, number]

    def sample(self, request: Request) -> list[Sample]:
        """The stored samples of these numbers; UserError if they answer another prompt."""
        samples = []
        for number in request.numbers:
            found = self.stored(request.task, request.problem.task_id, number)
            self._check(found, request.prompt)
            samples.append(Sample(found.text, found.tokens, found.finish, found.seed, found.prompt_cut))
        return samples

    def _check(self, found: Generation, prompt: str) -> None:
        """Raise UserError if a sample answers another prompt."""
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        if found.prompt_sha256 not in ("", digest):
            raise UserError(
                f"{self._path}: sample {found.sample} of {found.problem} answers another prompt (sha256 "
                f"{found.prompt_sha256[:16]}, expected {digest[:16]}); name its --style and --data"
            )


def _eos(directory: Path) -> str | None:
    """The end token in the manifest of the evaluation, None without one."""
    path = directory / MANIFEST
    found = read_json(path).get("eos") if path.is_file() else None
    return found if isinstance(found, str) else None


def _from_records(path: Path, tasks: Sequence[str], problems: Mapping[str, list[Problem]]) -> dict[Key, Generation]:
    if path.is_dir():
        records = [
            found
            for task in tasks
            for language in problems
            for found in read_generations(path, task, language).values()
        ]
    elif path.is_file():
        records = read_records(path, Generation)
    else:
        raise UserError(f"{path}: no such file; expected generations to replay")
    found: dict[Key, Generation] = {}
    for record in records:
        found.setdefault((record.task, record.problem, record.sample), record)
    return found


def _from_lists(
    path: Path, tasks: Sequence[str], problems: Mapping[str, list[Problem]], style: str
) -> dict[Key, Generation]:
    lists = read_lists(path)
    if len(tasks) != 1 or len(problems) != 1:
        raise UserError(f"{path}: lists are of one task and language; name them with --tasks and --languages")
    (task,), ((language, rows),) = tasks, problems.items()
    if task == "explainsynthesize" or style in DIFF_STOP_WORDS:
        what = f"--style {style}" if style in DIFF_STOP_WORDS else task
        raise UserError(
            f"{path}: lists of {what} do not have what the model wrote; score.py --import-generations reads them"
        )
    if len(lists) != len(rows):
        raise UserError(f"{path}: {len(lists)} lists, expected {len(rows)}: one per problem of {language}")
    found = {}
    for problem, texts in zip(rows, lists, strict=True):
        for number, text in enumerate(texts):
            new = _without_start(text, problem, task, prompt_of(problem, task, style))
            if new is None:
                raise UserError(
                    f"{path}: text {number} of list {problem.task_id} does not begin as the function of {task}; "
                    "name its --tasks and --languages, and the --data it was made with"
                )
            record = Generation(task, language, problem.task_id, number, 0, "", new, 0, "stop")
            found[task, problem.task_id, number] = record
    return found


def _without_start(text: str, problem: Problem, task: str, prompt: str) -> str | None:
    """What follows the prompt or the function's start in a text; None if it begins with neither.
    A description has no start."""
    start = start_of(problem, task).rstrip()
    for known in (prompt, start, start.removeprefix(RUST_MAIN)):
        if known and text.startswith(known):
            return text.removeprefix(known)
    return text if task == "explaindescribe" else None
