"""Charts of report.html: curves over optimizer steps, as inline SVG that follows the page's colors.

No scripts and no libraries. A curve keeps its shape when thinned: each bucket keeps its lowest and
its highest value. Many points get a smoothed curve on top of a faint one.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

POINTS = 600  # at most, per curve
SMOOTHED = 100  # points from which a curve is smoothed too, over a fiftieth of them
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 860, 280, 70, 12, 44, 26
NUM_COLORS = 6  # of STYLE
STYLE = """
:root { --c0: #1f5fa8; --c1: #c0561a; --c2: #2d7d46; --c3: #8b3a9e; --c4: #8a6d00; --c5: #b0264b; --grid: #e4e7eb }
@media (prefers-color-scheme: dark) { :root { --c0: #6cb2ff; --c1: #ff9d5c; --c2: #5fd08a; --c3: #d59cff; --c4: #e2c044;
  --c5: #ff8aa5; --grid: #2b3138 } }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 12px system-ui, sans-serif; fill: var(--dim) } svg path { stroke: var(--grid) }
svg polyline, svg line { fill: none; stroke-width: 1.6; stroke-linejoin: round } svg .faint { opacity: .3; stroke-width: 1 }
svg .dashed { stroke-dasharray: 6 4 } svg path.resume { stroke: var(--dim); stroke-dasharray: 3 4; opacity: .7 }
.key { display: flex; flex-wrap: wrap; gap: .1em 1.4em; margin: 0 0 .3em; font-size: .9em; color: var(--dim) }
.key svg { display: inline-block; width: 26px; height: 10px; vertical-align: middle; margin-right: .4em }
"""


@dataclass
class Curve:
    """One line of a chart: (step, value) points in order.

    `dots` marks each point, `dashed` breaks the line; one that is not `noisy` is never smoothed.
    `color` is one of STYLE's, by number; by default the curve's place in the chart.
    """

    name: str
    points: list[tuple[int, float]]
    dots: bool = False
    dashed: bool = False
    noisy: bool = True
    color: int | None = None


def curve(name: str, lines: Iterable[dict], key: str, scale: float = 1.0, *, noisy: bool = True) -> Curve:
    """Curve of `key`, times `scale`, over iterations; missing values are left out."""
    points = [(line["iteration"], scale * line[key]) for line in lines if line.get(key) is not None]
    return Curve(name, points, noisy=noisy)


def chart(title: str, unit: str, curves: Sequence[Curve], resumes: Sequence[int] = ()) -> str:
    """A titled chart with axes, the curves, and a dashed line at each resume.

    `unit` labels the vertical axis.
    """
    curves = [c for c in curves if c.points]
    heading = f"<h2>{html.escape(title)}</h2>"
    if not curves:
        return f"{heading}<p class=note>nothing recorded</p>"
    for number, drawn in enumerate(curves):
        drawn.color = number if drawn.color is None else drawn.color
    axes = Axes.of([point for c in curves for point in c.points])
    parts = axes.draw(unit)
    parts += [f'<path class="resume" d="M{axes.x(step - 0.5):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for step in resumes]
    parts += [part for c in curves for part in draw(c, axes)]
    key = f'<div class="key">{"".join(map(_key, curves))}</div>' if len(curves) > 1 else ""
    label = html.escape(f"{title}: {unit} over optimizer steps", quote=True)
    return f'{heading}{key}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Axes:
    """The ranges that a chart shows, and round numbers in them."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    ticks: list[float]  # of the vertical axis

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> "Axes":
        """Axes that hold all points."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ticks = nice_ticks(min(ys), max(ys))
        # Of extreme values, the rounded ticks may leave some out.
        return cls(min(xs), max(max(xs), min(xs) + 1), min(ticks[0], min(ys)), max(ticks[-1], max(ys)), ticks)

    def x(self, step: float) -> float:
        """Horizontal place of a step."""
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def draw(self, unit: str) -> list[str]:
        """Lines, numbers and names of both axes."""
        parts = [f'<text x="{LEFT}" y="{TOP - 12}">{html.escape(unit)}</text>']
        for tick in self.ticks:
            parts.append(f'<path d="M{LEFT} {self.y(tick):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
        for tick in nice_ticks(self.x_low, self.x_high):
            if self.x_low <= tick <= self.x_high and tick == int(tick):
                place = f'x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}"'
                parts.append(f'<text {place} text-anchor="middle">{int(tick):,}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        return [*parts, f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">optimizer step</text>']


def draw(c: Curve, axes: Axes) -> list[str]:
    """A curve's lines and dots; a smoothed one above the curve itself if it has many points."""
    many = c.noisy and len(c.points) >= SMOOTHED and not c.dots
    layers = [("faint" if many else "dashed" if c.dashed else "", c.points)]
    if many:
        layers.append(("dashed" if c.dashed else "", smooth(c.points)))
    color, parts = _color(c), []
    for style, points in layers:
        line = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in thin(points))
        parts.append(f'<polyline class="{style}" points="{line}" style="stroke: {color}"/>')
    if c.dots or len(c.points) == 1:
        parts += [
            f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3" style="fill: {color}">'
            f"<title>step {x:,}: {number(y)}</title></circle>"
            for x, y in thin(c.points)
        ]
    return parts


def _key(c: Curve) -> str:
    style = ' class="dashed"' if c.dashed else ""
    dot = f'<circle cx="13" cy="5" r="3" style="fill: {_color(c)}"/>' if c.dots else ""
    line = f'<line{style} x1="0" y1="5" x2="26" y2="5" style="stroke: {_color(c)}"/>'
    return f'<span><svg viewBox="0 0 26 10" aria-hidden="true">{line}{dot}</svg>{html.escape(c.name)}</span>'


def _color(c: Curve) -> str:
    return f"var(--c{(c.color or 0) % NUM_COLORS})"


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over the neighbors of each point, a fiftieth of all points at most.

    >>> smooth([(step, float(step % 2)) for step in range(1, 151)])[50:52]
    [(51, 0.3333333333333333), (52, 0.6666666666666666)]
    """
    reach = max(1, len(points) // 100)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)  # both ends stay where they are
        smoothed.append((step, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return smoothed


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS points: the lowest and the highest of every bucket, in order of iteration."""
    if len(points) <= POINTS:
        return list(points)
    buckets = POINTS // 2
    kept: list[tuple[int, float]] = []
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def number(value: float) -> str:
    """A tick's label.

    >>> number(269_000), number(0.00012), number(5e-05)
    ('269,000', '0.00012', '5e-05')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span [low, high].

    >>> nice_ticks(0.3, 2.1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    if high - low < 1e-100:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
