"""What a report shows of each sample: raw text, answer, program, output, and the difference to the
canonical solution."""

import difflib
import hashlib
from os.path import commonprefix
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut, diff_in
from megatron_ft.evaluation.problems import Problem
from megatron_ft.evaluation.programs import program_of
from megatron_ft.evaluation.prompts import prompt_of, start_of
from megatron_ft.evaluation.records import Generation
from megatron_ft.evaluation.scores import Scored
from megatron_ft.evaluation.stopping import DIFF_STOP_WORDS

PER_STATUS = 3  # samples shown of one problem with one status, those with equal texts as one
CONTEXT = 2  # unchanged lines around a change


def samples_of(
    scored: Scored, eos: str | None, descriptions: dict[tuple[str, int], Generation]
) -> list[dict[str, Any]]:
    """The samples of a task and language to show, problem by problem, ready for JSON.

    `descriptions` are those that explainsynthesize answers. Raises UserError if a program is not
    the one that was scored.
    """
    found = []
    for problem in scored.problems:
        answers: list[str] = []
        shown: dict[tuple[str, str], dict[str, Any]] = {}
        for sample in range(scored.samples):
            key = problem.task_id, sample
            generation, result = scored.generations.get(key), scored.results.get(key)
            if generation is None:
                continue
            text = generation.text
            answer = cut(text, problem, scored.task, scored.style, scored.mode, eos) if scored.style else text
            program = program_of(problem, scored.task, answer, scored.mode, answers)
            answers.append(answer)
            if result is None:
                continue
            if program.sha256 != result.program_sha256:
                raise UserError(
                    f"sample {sample} of {problem.task_id} ({scored.task}): the scored program is not that of its "
                    f"generation; score again: remove the results of {scored.task}-{scored.language}.{scored.mode}"
                )
            kept = kept_length(text, answer, problem, scored, eos)
            first = shown.setdefault((result.status, text), {"samples": []})
            first["samples"].append(sample)
            if len(first) == 1:
                first |= {
                    "problem": problem.task_id,
                    "status": result.status,
                    "finish": generation.finish,
                    "prompt": _prompt(problem, scored, generation, eos, descriptions),
                    "text": text,
                    "kept": kept,
                    "program": program.source,
                    "output": result.output,
                    "exit": result.exit,
                    "signal": result.signal,
                    "cpu_s": result.cpu_s,
                    "difference": difference(answer, problem, scored.task),
                }
        per_status: dict[str, int] = {}
        for (status, _), sample_shown in shown.items():
            per_status[status] = per_status.get(status, 0) + 1
            if per_status[status] <= PER_STATUS:
                found.append(sample_shown)
    return found


def _prompt(problem: Problem, scored: Scored, generation: Generation, eos: str | None, descriptions: dict) -> str:
    """The exact prompt of a sample; a line instead of it if it cannot be made again."""
    if scored.style is None:
        return "(of imported generations the prompt is unknown)"
    description = None
    if scored.task == "explainsynthesize":
        described = descriptions.get((problem.task_id, generation.sample))
        if described is None:
            return "(its description is not in this directory)"
        description = cut(described.text, problem, "explaindescribe", scored.style, eos=eos)
    prompt = prompt_of(problem, scored.task, scored.style, description)
    if hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest() != generation.prompt_sha256:
        return "(generated with another prompt than this version makes)"
    return prompt


def kept_length(text: str, answer: str, problem: Problem, scored: Scored, eos: str | None) -> int:
    """How many characters of the raw text are in the answer; the rest was cut off."""
    if scored.style is None:
        return len(text)
    if scored.style in DIFF_STOP_WORDS:
        kept = diff_in(text, problem.language, scored.style, scored.mode, eos)
    else:
        kept = answer[len(_start(answer, problem, scored.task)) :]
    return len(commonprefix([text, kept]))


def difference(answer: str, problem: Problem, task: str) -> str:
    """What an answer changes in the canonical solution, as lines of a unified diff; "" for equal
    ones. Empty lines and spaces at the end of lines do not matter."""
    canonical = (_start(answer, problem, task) or problem.prompt).rstrip() + "\n" + problem.canonical_solution
    old, new = ([line.rstrip() for line in text.split("\n") if line.strip()] for text in (canonical, answer))
    lines = difflib.unified_diff(old, new, n=CONTEXT, lineterm="")
    return "\n".join(line for line in list(lines)[2:])


def _start(answer: str, problem: Problem, task: str) -> str:
    """The start of the function that the answer begins with."""
    starts = (problem.prompt.rstrip(), start_of(problem, task).rstrip())
    return next((start for start in starts if answer.startswith(start)), "")
