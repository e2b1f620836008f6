"""The tables of a report, once as data, and as Markdown or HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.records import STATUSES
from megatron_ft.printable import printable


@dataclass(frozen=True)
class Table:
    """A titled table; every row has as many cells as the header."""

    title: str
    header: list[str]
    rows: list[list[str]]


def percent(value: float) -> str:
    """A fraction in percent.

    >>> percent(0.31432926829268293)
    '31.4'
    """
    return f"{100 * value:.1f}"


def with_interval(found: dict[str, float]) -> str:
    """An estimate and its interval, in percent."""
    return f"{percent(found['estimate'])} ({percent(found['low'])} to {percent(found['high'])})"


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables of a report of `scores.report_of`."""
    found = [score_table(report), status_table(report)]
    for task in dict.fromkeys(score["task"] for score in report["scores"] if score["bug_types"]):
        found.append(bug_table(task, [score for score in report["scores"] if score["task"] == task]))
    return found


def score_table(report: dict[str, Any]) -> Table:
    """pass@k of every task and language, and the averages over languages."""
    scores = report["scores"]
    ks = list(dict.fromkeys(k for score in scores for k in score["score"] or {})) or ["pass@1"]
    rows = []
    for score in scores:
        values = score["score"]
        shown = [with_interval(values[k]) if k in values else "" for k in ks] if values else ["no score"]
        shown += [""] * (len(ks) - len(shown))
        rows.append(
            [score["task"], LANGUAGES[score["language"]], str(len(score["counts"])), f"{score['scored']:,}", *shown]
        )
    for task, found in report["averages"].items():
        rows.append([task, "average", "", "", with_interval(found), *[""] * len(ks[1:])])
    return Table("Scores", ["task", "language", "problems", "samples", *(f"{k} (%)" for k in ks)], rows)


def status_table(report: dict[str, Any]) -> Table:
    """How many samples ended with each status."""
    used = [status for status in STATUSES if any(status in score["statuses"] for score in report["scores"])]
    rows = [
        [score["task"], LANGUAGES[score["language"]], *(f"{score['statuses'].get(status, 0):,}" for status in used)]
        for score in report["scores"]
    ]
    return Table("Statuses", ["task", "language", *(status.replace("_", " ") for status in used)], rows)


def bug_table(task: str, scores: list[dict[str, Any]]) -> Table:
    """pass@1 by bug type, one column per language that has a score."""
    scores = [score for score in scores if score["bug_types"]]
    names = list(dict.fromkeys(name for score in scores for name in score["bug_types"]))
    rows = []
    for name in names:
        found = [score["bug_types"].get(name) for score in scores]
        problems = str(max(one["problems"] for one in found if one))
        rows.append([name, problems, *(with_interval(one["pass@1"]) if one else "" for one in found)])
    languages = [LANGUAGES[score["language"]] for score in scores]
    return Table(f"pass@1 (%) by bug type: {task}", ["bug type", "problems", *languages], rows)


def notes(report: dict[str, Any]) -> list[str]:
    """One line per warning, missing score and excluded problem."""
    lines = []
    for score in report["scores"]:
        where = f"{score['task']}, {LANGUAGES[score['language']]}"
        if score["no_score"]:
            lines.append(f"{where}: no score: {score['no_score']}")
        lines += [f"{where}: {warning}" for warning in score["warnings"]]
        lines += [f"{where}: {name} is excluded: {why}" for name, why in score["excluded"].items()]
    return [printable(line) for line in lines]


def settings(report: dict[str, Any]) -> str:
    """One line: which model, how it was asked, and where the programs ran."""
    manifest = report["manifest"]
    parts = [f"{name} {manifest[key]}" for key, name in MADE_BY.items() if key in manifest]
    parts += [f"{report['mode']} mode"]
    parts += [f"{name} {manifest[key]}" for key, name in SHOWN.items() if key in manifest]
    sandboxes = sorted({name for score in report["scores"] for name in score["sandboxes"]})
    toolchains = sorted({name for score in report["scores"] for name in score["toolchains"]})
    parts += [f"sandbox {', '.join(sandboxes)}", *toolchains]
    return printable("; ".join(parts))


MADE_BY = {"model": "model", "style": "style", "imported": "generations"}
SHOWN = {"samples": "samples", "temperature": "temperature", "top_p": "top-p", "seed": "seed"}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    parts = [f"# Evaluation: {printable(report['name'])}", settings(report)]
    if found := notes(report):
        parts.append("\n".join(f"- {note}" for note in found))
    parts += [f"## {table.title}\n\n{markdown_table(table.header, table.rows)}" for table in tables(report)]
    parts.append("In parentheses: 95% bootstrap intervals over problems.")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, as Markdown and as text on a terminal.

    >>> print(markdown_table(["a", "b"], [["1", "two"]]))
    | a | b   |
    |---|-----|
    | 1 | two |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def to_html(report: dict[str, Any]) -> str:
    """The same tables and notes as HTML, without the page around them."""
    parts = [
        f"<h1>Evaluation: {html.escape(printable(report['name']))}</h1>",
        f"<p>{html.escape(settings(report))}</p>",
    ]
    if found := notes(report):
        parts.append("<ul class=notes>" + "".join(f"<li>{html.escape(note)}" for note in found) + "</ul>")
    for table in tables(report):
        head = "".join(f"<th>{html.escape(cell)}" for cell in table.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows)
        parts.append(f"<h2>{html.escape(table.title)}</h2><div class=wide><table><tr>{head}{body}</table></div>")
    parts.append("<p class=key>In parentheses: 95% bootstrap intervals over problems.</p>")
    return "\n".join(parts)
