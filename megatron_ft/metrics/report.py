"""report.html: what a run was and did, on one self-contained page, easy to open and to email.

Reads metrics.jsonl, validation.jsonl, evaluations.jsonl, events.jsonl and config.yaml of a save
directory, and draws loss, scores, learning rate, gradient norm and throughput over all parts of a
resumed run. Several runs become one page, their curves in the same charts. No scripts, no network,
standard library only.
"""

import html
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.config.config_file import KEPT
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import writing
from megatron_ft.metrics import chart
from megatron_ft.metrics.chart import Curve, curve
from megatron_ft.metrics.evaluations import read_scores
from megatron_ft.metrics.lines import EVENTS, METRICS, VALIDATION, read_log
from megatron_ft.printable import counted, printable

MAX_EVENTS = 200
MAX_SETTINGS = 1 << 16  # bytes of config.yaml
FACTS = ("model", "layout", "precision", "device", "data")  # of a start, in events.jsonl
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #57606a; --page: #fff; --line: #d8dde3; --box: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --text: #dfe4ea; --dim: #9aa4af; --page: #14171a; --line: #39414a;
  --box: #1e2328 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 900px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em; margin-bottom: .2em } h2 { font-size: 1.05em; margin: 1.8em 0 .3em }
table { border-collapse: collapse } td, th { padding: .2em 1.4em .2em 0; text-align: left; vertical-align: top }
th { color: var(--dim); font-weight: normal; white-space: nowrap } td.n { text-align: right }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere } .note { font-size: .9em; color: var(--dim) }
.wide { overflow-x: auto } .events td:first-child { white-space: nowrap } pre { background: var(--box);
  border: 1px solid var(--line); border-radius: 4px; padding: .6em .8em; overflow-x: auto; font-size: 13px }
summary { cursor: pointer; margin-top: 1em }
"""


@dataclass(frozen=True)
class RunLog:
    """What a save directory tells about its run.

    Lines are as `lines.read_log` and `evaluations.read_scores` return them. `settings` is the text
    of config.yaml, the flags that were set.
    """

    name: str
    steps: list[dict]
    validations: list[dict]
    events: list[dict]
    scores: list[dict]
    settings: str

    @classmethod
    def read(cls, save_dir: Path) -> "RunLog":
        """Damaged lines are left out. Raises UserError if there are no steps."""
        steps = read_log(save_dir, METRICS)
        if not steps:
            raise UserError(f"{save_dir}: no {METRICS} with steps; give the --save directory of a training run")
        return cls(
            name="/".join(save_dir.resolve().parts[-2:]).lstrip("/"),
            steps=steps,
            validations=read_log(save_dir, VALIDATION),
            events=read_log(save_dir, EVENTS),
            scores=read_scores(save_dir),
            settings=read_settings(save_dir / KEPT),
        )

    @property
    def resumes(self) -> list[int]:
        """The first step of each part but the first."""
        return [b["iteration"] for a, b in itertools.pairwise(self.steps) if b["part"] != a["part"]]

    @property
    def groups(self) -> dict[str, list[dict]]:
        """Validations by group, in their order."""
        groups = dict.fromkeys(line["group"] for line in self.validations)
        return {group: [line for line in self.validations if line["group"] == group] for group in groups}

    def flags(self) -> dict[str, str]:
        """The settings by name."""
        lines = [line for line in self.settings.splitlines() if not line.startswith("#")]
        return {name: value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon}


def read_settings(path: Path) -> str:
    """The text of a config.yaml without its comment, empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_SETTINGS).decode("utf-8", "replace")
    except OSError:
        return ""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def write_report(save_dir: Path) -> Path:
    """Write report.html into `save_dir`, replacing an existing one; returns its path.

    Raises UserError if there are no steps, or if the page cannot be written.
    """
    page, path = render(RunLog.read(save_dir)), save_dir / "report.html"
    with writing(path):
        replace_file(path, page.encode())
    return path


def render(run: RunLog) -> str:
    """The page of one run."""
    losses = [curve("training loss", run.steps, "loss")]
    for group, lines in run.groups.items():
        losses.append(Curve(f"validation: {printable(group)}", curve("", lines, "loss").points, dots=True))
    charts = [chart.chart("Loss", "loss per token", losses, run.resumes)]
    if run.scores:
        charts.append(chart.chart("HumanEvalPack, pass@1", "percent", scores_of(run)))
    charts += [chart.chart(title, unit, [of_steps("", run, key)], run.resumes) for title, unit, key in charts_of([run])]
    note = "<p class=note>Dashed vertical lines mark resumes.</p>" if run.resumes else ""
    flags = f"<details><summary>Flags that were set</summary><pre>{as_html(run.settings)}</pre></details>"
    body = f"{table(facts_of(run))}{flags if run.settings else ''}{note}\n" + "\n".join(charts) + history(run.events)
    return page(f"Training report: {run.name}", started(run), body)


def render_several(runs: Sequence[RunLog]) -> str:
    """The page of several runs: a column for each, the flags in which they differ, and one chart
    for all curves of a kind."""
    names = distinct_names([run.name for run in runs])
    losses = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        losses.append(Curve(name, curve("", run.steps, "loss").points, color=number))
        for group, lines in run.groups.items():
            points = curve("", lines, "loss").points
            losses.append(Curve(f"{name}, {printable(group)}", points, dots=True, dashed=True, color=number))
    charts = [chart.chart("Loss", "loss per token", losses)]
    scores = [
        Curve(f"{name}, {c.name}", c.points, dots=True, color=number)
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
        for c in scores_of(run)
    ]
    charts += [chart.chart("HumanEvalPack, pass@1", "percent", scores)] if scores else []
    for title, unit, key in charts_of(runs):
        curves = [of_steps(name, run, key) for name, run in zip(names, runs, strict=True)]
        for number, c in enumerate(curves):
            c.color = number
        charts.append(chart.chart(title, unit, curves))
    facts = [dict(facts_of(run)) for run in runs]
    rows = [(name, *(of_run.get(name, "") for of_run in facts)) for name in dict.fromkeys(itertools.chain(*facts))]
    flags = [run.flags() for run in runs]
    changed = [
        (name, *(of_run.get(name, "default") for of_run in flags))
        for name in sorted(set().union(*flags) - {"save"})
        if len({of_run.get(name) for of_run in flags}) > 1
    ]
    body = table([("", *names), *rows])
    if changed:
        body += f"<h2>Flags that differ</h2>{table([('', *names), *changed])}"
    return page(f"{counted(len(runs), 'run')}: {', '.join(names)}", "", body + "\n" + "\n".join(charts))


def page(title: str, note: str, body: str) -> str:
    """A complete page; `body` is HTML."""
    return (
        f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>{as_html(title)}</title>"
        f"<style>{STYLE}{chart.STYLE}</style>\n<h1>{as_html(title)}</h1>\n<p class=note>{as_html(note)}</p>\n{body}</html>\n"
    )


def charts_of(runs: Sequence[RunLog]) -> list[tuple[str, str, str]]:
    """Title, unit and key of the charts that these runs have besides the loss."""
    charts = [
        ("Learning rate", "learning rate", "lr"),
        ("Gradient norm", "norm before clipping", "grad_norm"),
        ("Throughput", "tokens/s", "tokens_per_second"),
    ]
    if any(step["mfu"] is not None for run in runs for step in run.steps):
        charts.append(("Model FLOP/s utilization", "% of the GPU's peak", "mfu"))
    return charts


def of_steps(name: str, run: RunLog, key: str) -> Curve:
    """A curve of metrics.jsonl; fractions in percent."""
    return curve(name, run.steps, key, 100.0 if key == "mfu" else 1.0, noisy=key != "lr")


def scores_of(run: RunLog) -> list[Curve]:
    """A curve for each task and language of HumanEvalPack, in percent."""
    groups = dict.fromkeys(line["group"] for line in run.scores)
    by_group = [(group, [line for line in run.scores if line["group"] == group]) for group in groups]
    return [
        Curve(printable(group), curve("", lines, "pass_at_1", 100.0).points, dots=True) for group, lines in by_group
    ]


def started(run: RunLog) -> str:
    """When the run began and when its last step ended."""
    times = [step["time"] for step in run.steps if step["time"] is not None]
    starts = [event["time"] for event in run.events if event["event"] == "start" and event["time"] is not None]
    begin = starts[0] if starts else times[0] if times else None
    return "" if begin is None or not times else f"{clock_time(begin)} to {clock_time(times[-1])}"


def facts_of(run: RunLog) -> list[tuple[str, str]]:
    """What the run was, as its last start tells, and its results."""
    steps, last = run.steps, {key: value or 0 for key, value in run.steps[-1].items()}
    start: dict = next((event for event in reversed(run.events) if event["event"] == "start"), {})
    rows = [(name.capitalize(), start[name]) for name in FACTS if isinstance(start.get(name), str)]
    seconds = [step["step_seconds"] for step in steps if step["step_seconds"] is not None]
    speeds = [step for step in steps if step["step_seconds"] and step["tokens_per_second"]]
    rates = [step["lr"] for step in steps if step["lr"] is not None]
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    rows.append(("Steps", f"{last['iteration']:,} in {counted(last['part'] + 1, 'part')}"))
    rows.append(("Sequences, tokens", f"{last['consumed_samples']:,}, {last['consumed_tokens']:,}"))
    if rates:
        rows.append(("Peak learning rate", f"{max(rates):.3g}"))
    if speeds:
        tokens = sum(step["tokens_per_second"] * step["step_seconds"] for step in speeds)
        rows.append(("Mean throughput", f"{tokens / sum(step['step_seconds'] for step in speeds):,.0f} tokens/s"))
    time_in_steps = f"{sum(seconds) / 3600:.2f} h, {1e3 * sum(seconds) / max(1, len(seconds)):,.0f} ms per step"
    rows.append(("Time in steps", time_in_steps))
    if last["skipped_iterations"] or last["spikes"]:
        rows.append(("Skipped steps, loss spikes", f"{last['skipped_iterations']}, {last['spikes']}"))
    if losses:
        tail = losses[-max(1, len(losses) // 20) :]
        end = f"{sum(tail) / len(tail):.4f} over the last {counted(len(tail), 'step')}"
        rows.append(("Training loss", f"{losses[0]:.4f} at first, {end}"))
    for group, lines in run.groups.items():
        measured = [line for line in lines if line["loss"] is not None]
        found = [f"{line['loss']:.4f} before the first step" for line in measured if line["iteration"] == 0]
        if trained := [line for line in measured if line["iteration"] > 0]:
            best = min(trained, key=lambda line: line["loss"])
            found.append(f"last {trained[-1]['loss']:.4f}, best {best['loss']:.4f} at {best['iteration']:,}")
        if found:
            rows.append((f"Validation {printable(group)}", ", ".join(found)))
    return rows


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names of runs, without the directory that all of them are in; numbered if they are the same.

    >>> distinct_names(["runs/a", "runs/b"]), distinct_names(["x/a", "y/a"])
    (['a', 'b'], ['x/a', 'y/a'])
    """
    last = [name.rpartition("/")[2] for name in names]
    if len(set(last)) == len(last):
        return last
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a name and one or more values."""
    cells = (f"<tr><th>{as_html(row[0])}" + "".join(f"<td>{as_html(text)}" for text in row[1:]) for row in rows)
    return f'<div class="wide"><table>{"".join(cells)}</table></div>'


def history(events: list[dict]) -> str:
    """Table of the last events: starts, checkpoints, stops."""
    if not events:
        return ""
    rows = []
    for event in events[-MAX_EVENTS:]:
        when = "" if event["time"] is None else clock_time(event["time"])
        what = event["event"] + "".join(
            f"; {name.replace('_', ' ')}: {text}"
            for name, text in event.items()
            if name not in ("event", "iteration", "time", "part", *FACTS) and isinstance(text, (str, int))
        )
        rows.append(f"<tr><td>{when}<td class=n>{event['iteration'] or 0:,}<td>{as_html(what)}")
    head = "<tr><th>when<th>step<th>what"
    return f"\n<h2>Events</h2><table class=events>{head}{''.join(rows)}</table>"


def clock_time(seconds: float) -> str:
    """Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def as_html(text: str) -> str:
    """Text of a file or a path, which may have control characters and lone surrogates."""
    return html.escape(printable(text, keep="\n"))
