"""Scores with and without the problems that the training rows hold."""

from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.report_tables import markdown_table, with_interval
from megatron_ft.evaluation.scores import Evaluation, pass_at_ks, score_of


def scores_without(evaluation: Evaluation, held: set[str]) -> list[dict[str, Any]]:
    """pass@1 of each task and language: of all problems, and of those that are not in `held`.

    A problem is the same one in all languages, so that one held in Go leaves out its translations,
    too. `without` is None if nothing is left. Raises UserError if there is no score.
    """
    numbers = {problem.rpartition("/")[2] for problem in held}
    found = []
    for scored in evaluation.scored:
        if reason := score_of(scored)["no_score"]:
            raise UserError(f"{evaluation.directory}: {scored.task}-{scored.language} has no score: {reason}")
        counts = scored.counts()
        clean = [count for problem, count in counts.items() if problem.rpartition("/")[2] not in numbers]
        found.append(
            {
                "task": scored.task,
                "language": scored.language,
                "problems": len(counts),
                "held": len(counts) - len(clean),
                "with": pass_at_ks(counts.values())["pass@1"],
                "without": pass_at_ks(clean)["pass@1"] if clean else None,
            }
        )
    return found


def score_table(scores: list[dict[str, Any]]) -> str:
    """The scores as a table of Markdown."""
    rows = [
        [
            score["task"],
            LANGUAGES[score["language"]],
            str(score["problems"]),
            str(score["held"]),
            with_interval(score["with"]),
            with_interval(score["without"]) if score["without"] else "nothing left",
        ]
        for score in scores
    ]
    return markdown_table(["task", "language", "problems", "held", "pass@1 (%), all", "without those held"], rows)
