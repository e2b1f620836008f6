"""Two evaluations compared problem by problem.

Problems differ far more than models do, so a comparison pairs the two results on each: its error is
several times smaller than that of two separate scores.
"""

from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.report_tables import markdown_table, percent
from megatron_ft.evaluation.scores import Evaluation, score_of
from megatron_ft.evaluation.statistics import (
    holm,
    mcnemar_exact,
    paired_bootstrap,
    pass_at_k,
    smallest_detectable_difference,
)
from megatron_ft.printable import printable

SIGNIFICANT = 0.05
SOLVED = 0.5  # fraction of passed samples from which a problem counts as solved
NAMES_SHOWN = 40


def compare(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """Differences b - a in pass@1 of each task and language that both have, ready for JSON.

    P-values are of the paired bootstrap, or McNemar's exact ones if both have one sample per
    problem; `p_holm` is adjusted for the number of languages of the task. Raises UserError if they
    have nothing in common, or one of them has no score.
    """
    others = {(scored.task, scored.language): scored for scored in b.scored}
    pairs = []
    for mine in a.scored:
        other = others.get((mine.task, mine.language))
        if other is None:
            continue
        values = []
        for evaluation, scored in ((a, mine), (b, other)):
            if reason := score_of(scored)["no_score"]:
                raise UserError(f"{evaluation.directory}: {scored.task}-{scored.language} has no score: {reason}")
            values.append({name: pass_at_k(*count, 1) for name, count in scored.counts().items()})
        greedy = mine.samples == other.samples == 1
        pairs.append({"task": mine.task, "language": mine.language, **compare_problems(values[0], values[1], greedy)})
    if not pairs:
        raise UserError(f"{a.directory} and {b.directory} have no task in common for the same language")
    for task in dict.fromkeys(pair["task"] for pair in pairs):
        of_task = [pair for pair in pairs if pair["task"] == task]
        for pair, adjusted in zip(of_task, holm([pair["p"] for pair in of_task]), strict=True):
            pair["p_holm"] = adjusted
    return {
        "a": {"directory": str(a.directory), "model": a.manifest.get("model")},
        "b": {"directory": str(b.directory), "model": b.manifest.get("model")},
        "mode": a.mode,
        "settings_that_differ": different_settings(a.manifest, b.manifest),
        "comparisons": pairs,
    }


def compare_problems(a: dict[str, float], b: dict[str, float], greedy: bool) -> dict[str, Any]:
    """Compare the pass@1 of the same problems."""
    first, second = list(a.values()), [b[name] for name in a]
    found = paired_bootstrap(first, second)
    won = [name for name in a if a[name] < SOLVED <= b[name]]
    lost = [name for name in a if b[name] < SOLVED <= a[name]]
    differences = [y - x for x, y in zip(first, second, strict=True)]
    return {
        "problems": len(a),
        "a": sum(first) / len(first),
        "b": sum(second) / len(second),
        "difference": found.difference.estimate,
        "low": found.difference.low,
        "high": found.difference.high,
        "test": "McNemar" if greedy else "paired bootstrap",
        "p": mcnemar_exact(len(lost), len(won)) if greedy else found.p_value,
        "smallest_detectable": smallest_detectable_difference(differences) if len(a) > 1 else None,
        "won": won,
        "lost": lost,
    }


def different_settings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Settings of generation that differ: the models are then not the only reason."""
    names = ("style", "samples", "temperature", "top_p", "max_length")
    return [f"{name} {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def to_markdown(found: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    sides = (f"{side.upper()}: {found[side]['directory']} ({found[side]['model']})" for side in ("a", "b"))
    parts = ["# Comparison", printable("; ".join([*sides, f"{found['mode']} mode"]))]
    if found["settings_that_differ"]:
        parts.append(printable("Not only the models differ: " + "; ".join(found["settings_that_differ"]) + "."))
    header = ["task", "language", "problems", "A (%)", "B (%)", "B - A (95% interval)", "test", "p", "p (Holm)"]
    rows = [row(pair) for pair in found["comparisons"]]
    parts.append(markdown_table([*header, "detectable"], rows))
    parts.append(
        f"p (Holm) is adjusted for the languages of a task: below {SIGNIFICANT} there is a difference. `detectable` is "
        "the smallest difference that these problems find with a probability of 80%; a smaller one needs more "
        "problems or languages, not more samples."
    )
    for pair in found["comparisons"]:
        if pair["won"] or pair["lost"]:
            where = f"{pair['task']}, {LANGUAGES[pair['language']]}"
            parts.append(f"{where}: only B solves {names(pair['won'])}; only A solves {names(pair['lost'])}.")
    parts.append("A problem is solved if at least half of its samples pass.")
    return "\n\n".join(parts) + "\n"


def row(pair: dict[str, Any]) -> list[str]:
    """The cells of one comparison."""
    points = [f"{100 * pair[name]:+.1f}" for name in ("difference", "low", "high")]
    detectable = pair["smallest_detectable"]
    return [
        pair["task"],
        LANGUAGES[pair["language"]],
        str(pair["problems"]),
        percent(pair["a"]),
        percent(pair["b"]),
        f"{points[0]} ({points[1]} to {points[2]})",
        pair["test"],
        f"{pair['p']:.4f}",
        f"{pair['p_holm']:.4f}",
        "" if detectable is None else percent(detectable),
    ]


def names(problems: list[str]) -> str:
    """A list for people.

    >>> names(["Go/1", "Go/2"]), names([])
    ('2: Go/1, Go/2', 'none')
    """
    if not problems:
        return "none"
    more = f" and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
    return f"{len(problems)}: {', '.join(problems[:NAMES_SHOWN])}{more}"
