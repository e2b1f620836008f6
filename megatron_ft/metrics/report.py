"""report.html: the curves of a run on one self-contained page, easy to open and to email.

    python -m megatron_ft.metrics.report SAVE_DIR

Reads metrics.jsonl, validation.jsonl, evaluations.jsonl and events.jsonl of a save directory and
draws loss, scores, learning rate, gradient norm and throughput over all parts of a resumed run as
inline SVG. No scripts, no network, standard library only.
"""

import html
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError, run_program
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.os_error import remedy
from megatron_ft.metrics.evaluations import read_scores
from megatron_ft.metrics.lines import EVENTS, METRICS, VALIDATION, read_log
from megatron_ft.printable import printable

POINTS = 600  # at most, per curve: each bucket keeps its lowest and highest value, so spikes remain
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 64, 34, 14
COLORS = ("#1f5fa8", "#c0561a", "#2d7d46", "#8b3a9e", "#9c7a00", "#b0264b")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 780px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.05em; margin: 1.6em 0 .2em }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: left; vertical-align: top }
td:first-child { white-space: nowrap } td.n { text-align: right; font-variant-numeric: tabular-nums } svg { display: block; width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: #57606a } .key { font-size: .9em; color: #57606a }
"""


@dataclass
class Curve:
    """One line of a chart: (iteration, value) points in order; `dots` marks each point."""

    name: str
    points: list[tuple[int, float]]
    dots: bool = False


def write_report(save_dir: Path) -> Path:
    """Write report.html from the .jsonl files of `save_dir`, replacing an existing one; returns its
    path. Damaged lines are left out. Raises UserError if there are no steps, or if the page cannot
    be written."""
    steps = read_log(save_dir, METRICS)
    if not steps:
        raise UserError(f"{save_dir}: no {METRICS} with steps; give the --save directory of a training run")
    page = render(
        steps,
        read_log(save_dir, VALIDATION),
        read_log(save_dir, EVENTS),
        title=save_dir.resolve().name,
        scores=read_scores(save_dir),
    )
    path = save_dir / "report.html"
    try:
        replace_file(path, page.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy(error, 'free disk space')}") from error
    return path


def render(
    steps: list[dict], validations: list[dict], events: list[dict], title: str, scores: Sequence[dict] = ()
) -> str:
    """The page as text; lines as `lines.read_log` and `evaluations.read_scores` return them."""
    resumes = [b["iteration"] for a, b in itertools.pairwise(steps) if b["part"] != a["part"]]
    losses = [curve("training loss", steps, "loss")]
    for group in dict.fromkeys(line["group"] for line in validations):
        of_group = [line for line in validations if line["group"] == group]
        losses.append(Curve(f"validation: {printable(group)}", curve("", of_group, "loss").points, dots=True))
    charts = [
        chart("Loss", losses, resumes),
        chart("Learning rate", [curve("lr", steps, "lr")], resumes),
        chart("Gradient norm (before clipping)", [curve("gradient norm", steps, "grad_norm")], resumes),
        chart("Throughput, tokens per second", [curve("tokens/s", steps, "tokens_per_second")], resumes),
    ]
    if any(step["mfu"] is not None for step in steps):
        charts.append(chart("Model FLOP/s utilization", [curve("MFU", steps, "mfu")], resumes))
    if scores:
        groups = dict.fromkeys(line["group"] for line in scores)
        by_group = [(group, [line for line in scores if line["group"] == group]) for group in groups]
        passed = [Curve(printable(group), curve("", lines, "pass_at_1").points, dots=True) for group, lines in by_group]
        charts.insert(1, chart("HumanEvalPack, pass@1", passed, resumes))
    note = "<p class=key>Dashed lines mark resumes.</p>" if resumes else ""
    return (
        f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>{as_html(title)}</title><style>{STYLE}</style>\n"
        f"<h1>Training report: {as_html(title)}</h1>\n{summary(steps, validations)}{note}\n"
        + "\n".join(charts)
        + f"\n{history(events)}</html>\n"
    )


def summary(steps: list[dict], validations: list[dict]) -> str:
    """Table of the results of the run."""
    last = {key: value or 0 for key, value in steps[-1].items()}
    seconds = [step["step_seconds"] for step in steps if step["step_seconds"] is not None]
    losses = [step["loss"] for step in steps if step["loss"] is not None]
    rows = [
        ("Steps", f"{last['iteration']:,} in {last['part'] + 1} part{'s' if last['part'] else ''}"),
        ("Sequences, tokens", f"{last['consumed_samples']:,}, {last['consumed_tokens']:,}"),
        ("Time in steps", f"{sum(seconds) / 3600:.2f} h, {1e3 * sum(seconds) / max(1, len(seconds)):,.0f} ms per step"),
        ("Skipped steps, loss spikes", f"{last['skipped_iterations']}, {last['spikes']}"),
    ]
    if losses:
        tail = losses[-max(1, len(losses) // 20) :]
        rows.insert(
            2,
            (
                "Training loss",
                f"{losses[0]:.4f} at first, {sum(tail) / len(tail):.4f} over the last {len(tail)} step{'s' * (len(tail) > 1)}",
            ),
        )
    for group in dict.fromkeys(line["group"] for line in validations):
        of_group = [line for line in validations if line["group"] == group and line["loss"] is not None]
        if of_group:
            untrained = [f"{line['loss']:.4f} before the first step" for line in of_group if line["iteration"] == 0]
            trained = [line for line in of_group if line["iteration"] > 0]
            if trained:
                best = min(trained, key=lambda line: line["loss"])
                untrained.append(f"last {trained[-1]['loss']:.4f}, best {best['loss']:.4f} at {best['iteration']:,}")
            rows.append((f"Validation {printable(group)}", ", ".join(untrained)))
    return "<table>" + "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in rows) + "</table>"


def history(events: list[dict]) -> str:
    """Table of the last two hundred events: starts, checkpoints, stops."""
    if not events:
        return ""
    rows = []
    for event in events[-200:]:
        when = "" if event["time"] is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        what = event["event"] + "".join(
            f"; {name.replace('_', ' ')}: {text}"
            for name, text in event.items()
            if name not in ("event", "iteration", "time", "part") and isinstance(text, (str, int))
        )
        rows.append(f"<tr><td>{when}<td class=n>{event['iteration'] or 0:,}<td>{as_html(what)}")
    return "<h2>Events</h2><table><tr><th>when<th>step<th>" + "".join(rows) + "</table>"


def as_html(text: str) -> str:
    """Text of a file or a path, which may have control characters and lone surrogates."""
    return html.escape(printable(text, keep="\n"))


def curve(name: str, lines: list[dict], key: str) -> Curve:
    """Curve of `key` over iterations; missing values are left out."""
    return Curve(name, [(line["iteration"], line[key]) for line in lines if line.get(key) is not None])


def chart(title: str, curves: list[Curve], resumes: list[int]) -> str:
    """A titled SVG chart with axes, the curves, and a dashed line at each resume."""
    curves = [c for c in curves if c.points]
    if not curves:
        return f"<h2>{title}</h2><p class=key>nothing recorded</p>"
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    ticks = nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - 10)
        return across, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = at(x_low, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 10}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in nice_ticks(x_low, x_high):
        if x_low <= tick <= x_high and tick == int(tick):
            x, _ = at(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{int(tick):,}</text>')
    for resume in resumes:
        x, _ = at(resume - 0.5, y_low)
        parts.append(
            f'<path class="resume" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#8c959f" stroke-dasharray="4 4"/>'
        )
    for c, color in zip(curves, itertools.cycle(COLORS), strict=False):
        points = [at(x, y) for x, y in thin(c.points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if c.dots or len(points) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in points]
    key = ""
    if len(curves) > 1:
        names = [
            f'<span style="color:{k}">&#9632;</span> {html.escape(c.name)}'
            for c, k in zip(curves, itertools.cycle(COLORS), strict=False)
        ]
        key = f"<p class=key>{' &nbsp; '.join(names)}</p>"
    return f'<h2>{title}</h2>{key}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS points: the lowest and the highest of every bucket, in order of iteration."""
    if len(points) <= POINTS:
        return points
    buckets = POINTS // 2
    kept: list[tuple[int, float]] = []
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def number(value: float) -> str:
    """A tick's label.

    >>> number(269_000), number(0.00012)
    ('269,000', '0.00012')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span [low, high]."""
    if high - low < 1e-100:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def main() -> None:
    """Write the report of the save directory named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    print(printable(write_report(Path(sys.argv[1]))))


if __name__ == "__main__":
    run_program(main)
