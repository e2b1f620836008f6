"""Scores of an evaluation: pass@k with intervals, statuses, bug types, and why there is no score.

A score is the mean over all problems, so it needs every sample that was asked for, and a verdict on
each: what is missing, or was refused by the machine, would bias it in silence.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.problems import EXCLUDED, Problem, data_digest, load_problems
from megatron_ft.evaluation.records import (
    MANIFEST,
    NO_SCORE,
    STATUSES,
    Generation,
    Result,
    read_generations,
    read_manifest,
    read_records,
    results_file,
)
from megatron_ft.evaluation.statistics import bootstrap, pass_at_k
from megatron_ft.files.json_file import require

KS = (1, 10, 100)
LENGTH_FRACTION = 0.2  # of samples that ended by length, above which a warning is due
Key = tuple[str, int]  # problem and sample


@dataclass(frozen=True)
class Scored:
    """One task in one language: what was asked, generated and scored.

    `problems` are those that count: without the exclusions of clean mode. `samples` are asked for
    per problem. `style` is None for imported lists, whose texts are cut already.
    """

    task: str
    language: str
    mode: str
    style: str | None
    samples: int
    problems: list[Problem]
    excluded: list[str]
    generations: dict[Key, Generation]
    results: dict[Key, Result]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Samples with a verdict and samples passed of every problem, in order."""
        found = {problem.task_id: [0, 0] for problem in self.problems}
        for (problem, _), result in self.results.items():
            found[problem][0] += 1
            found[problem][1] += result.status == "passed"
        return {problem: (samples, passed) for problem, (samples, passed) in found.items()}


@dataclass(frozen=True)
class Evaluation:
    """A directory of generate.py and score.py, read in one mode."""

    directory: Path
    manifest: dict[str, Any]
    mode: str
    scored: list[Scored]


def load_evaluation(directory: Path, data: Path, mode: str) -> Evaluation:
    """Read an evaluation and the problems that it is about.

    Raises UserError if there is none, if its data is not `data`, if nothing of it was scored in
    `mode`, or if a verdict belongs to a problem or a sample that was not asked for.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: unknown; one of {', '.join(MODES)}")
    manifest, where = read_manifest(directory), str(directory / MANIFEST)
    tasks, languages = require(manifest, "tasks", list, where), require(manifest, "languages", list, where)
    samples = require(manifest, "samples", int, where, low=1)
    style = None if "imported" in manifest else require(manifest, "style", str, where)
    digests = require(manifest, "data_sha256", dict, where)
    scored = []
    for language in languages:
        if digests.get(language) != data_digest(data, language):
            raise UserError(
                f"{data}: its {language} problems are not those of {directory}; name the --data it was made with"
            )
    for task in tasks:
        for language in languages if task != "explaindescribe" else ():
            scored.append(_load(directory, data, mode, style, task, language, samples))
    if not any(one.results for one in scored):
        raise UserError(
            f"{directory}: nothing scored in {mode} mode; run python evaluation/run/score.py {directory} --mode {mode}"
        )
    return Evaluation(directory, manifest, mode, scored)


def _load(directory: Path, data: Path, mode: str, style: str | None, task: str, language: str, samples: int) -> Scored:
    problems = load_problems(data, language)
    path = results_file(directory, task, language, mode)
    # A sample that was scored again, as after a sandbox error, has its last verdict.
    results = {(result.problem, result.sample): result for result in read_records(path, Result)}
    known = {problem.task_id for problem in problems}
    for problem, sample in results:
        if problem not in known or not 0 <= sample < samples:
            raise UserError(
                f"{path}: sample {sample} of {problem[:40]!r} was not asked for; "
                f"expected 0 to {samples - 1} of the problems in {data}"
            )
    excluded = [name for name in known & EXCLUDED.keys() if mode == "clean"]
    return Scored(
        task,
        language,
        mode,
        style,
        samples,
        [problem for problem in problems if problem.task_id not in excluded],
        excluded,
        read_generations(directory, task, language),
        {key: result for key, result in results.items() if key[0] not in excluded},
    )


def score_of(scored: Scored, partial: bool = False) -> dict[str, Any]:
    """The score of one task and language with all that belongs to it, ready for JSON.

    `score` is None, and `no_score` is the reason, if a verdict is missing (unless `partial`) or is
    an error of the machine. Fractions are from 0 to 1.
    """
    asked = len(scored.problems) * scored.samples
    statuses = Counter(result.status for result in scored.results.values())
    errors = sum(statuses[status] for status in NO_SCORE)
    reason = None
    if errors:
        first = next(result for result in scored.results.values() if result.status in NO_SCORE)
        last_line = (first.output.strip().splitlines() or ["no output"])[-1]
        reason = f"{errors:,} of {len(scored.results):,} programs met a {first.status}: {last_line[:200]}"
    elif len(scored.results) < asked and not partial:
        reason = f"{len(scored.results):,} of {asked:,} samples scored; generate and score the rest, or --partial"
    counts = {problem: count for problem, count in scored.counts().items() if count[0]}
    if reason is None and not counts:
        reason = "no sample scored"
    finishes = Counter(generation.finish for generation in scored.generations.values())
    return {
        "task": scored.task,
        "language": scored.language,
        "mode": scored.mode,
        "problems": len(scored.problems),
        "samples": scored.samples,
        "asked": asked,
        "scored": len(scored.results),
        "excluded": {name: EXCLUDED[name] for name in scored.excluded},
        "no_score": reason,
        "score": None if reason else pass_at_ks(counts.values()),
        "bug_types": None if reason or not scored.task.startswith("fix") else _by_bug_type(scored, counts),
        "statuses": {status: statuses[status] for status in STATUSES if statuses[status]},
        "finishes": dict(sorted(finishes.items())),
        "sandboxes": sorted({result.sandbox for result in scored.results.values()}),
        "toolchains": sorted({result.toolchain for result in scored.results.values()}),
        "counts": {problem: list(count) for problem, count in counts.items()},
        "warnings": _warnings(scored, asked, finishes),
    }


def pass_at_ks(counts: Iterable[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """pass@k with its interval over problems, given as (samples, passed), for each of KS for which
    every problem has enough samples."""
    counts = list(counts)
    fewest = min(samples for samples, _ in counts)
    return {f"pass@{k}": _interval([pass_at_k(n, c, k) for n, c in counts]) for k in KS if k <= fewest}


def _interval(values: list[float]) -> dict[str, float]:
    found = bootstrap(values)
    return {"estimate": found.estimate, "low": found.low, "high": found.high}


def _by_bug_type(scored: Scored, counts: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """pass@1 of the problems of each bug type, the most frequent type first."""
    types: dict[str, list[float]] = {}
    for problem in scored.problems:
        if problem.task_id in counts:
            types.setdefault(problem.bug_type, []).append(pass_at_k(*counts[problem.task_id], 1))
    ordered = sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: {"problems": len(values), "pass@1": _interval(values)} for name, values in ordered}


def _warnings(scored: Scored, asked: int, finishes: Mapping[str, int]) -> list[str]:
    warnings = []
    total = sum(finishes.values())
    if total and finishes.get("length", 0) > LENGTH_FRACTION * total:
        warnings.append(
            f"{finishes['length'] / total:.0%} of the samples ended by length, not by a stop word or the end token: "
            "is the style the one the model was trained with, is --max-length large enough?"
        )
    if len(scored.results) < asked:
        warnings.append(f"{len(scored.results):,} of {asked:,} samples scored")
    if cut := sum(generation.prompt_cut > 0 for generation in scored.generations.values()):
        warnings.append(f"{cut:,} samples answer a prompt that was longer than the model's positions and was cut")
    unsandboxed = sum(result.sandbox == "none" for result in scored.results.values())
    if unsandboxed:
        warnings.append(f"{unsandboxed:,} programs ran without a sandbox")
    return warnings


def average(scores: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of pass@1 over the languages of a task, with its interval.

    A problem's translations are resampled together: they are easy or hard together.
    """
    values: dict[str, float] = {}
    for score in scores:
        for problem, (samples, passed) in score["counts"].items():
            number = problem.rpartition("/")[2]
            part = pass_at_k(samples, passed, 1) / len(score["counts"]) / len(scores)
            values[number] = values.get(number, 0.0) + part
    found = bootstrap(np.array(list(values.values())) * len(values))
    return {"estimate": found.estimate, "low": found.low, "high": found.high}


def report_of(evaluation: Evaluation, partial: bool = False) -> dict[str, Any]:
    """All scores of an evaluation, as report.json has them."""
    scores = [score_of(scored, partial) for scored in evaluation.scored]
    averages = {}
    for task in dict.fromkeys(score["task"] for score in scores):
        of_task = [score for score in scores if score["task"] == task]
        if len(of_task) > 1 and all(score["score"] for score in of_task):
            averages[task] = average(of_task)
    return {
        "name": evaluation.directory.resolve().name,
        "mode": evaluation.mode,
        "partial": partial,
        "manifest": evaluation.manifest,
        "averages": averages,
        "scores": scores,
    }
