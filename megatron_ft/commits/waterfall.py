"""`Waterfall`: how many rows of each language each rule dropped."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from megatron_ft.printable import printable

SAMPLES = 3  # subjects per rule
SAMPLE_CHARS = 80
WIDTH = 24


class Waterfall:
    """Counts the rows of a filter; `steps` are the names of its rules in order.

    Per language, rows read are rows dropped by any rule plus rows kept.
    """

    def __init__(self, steps: Sequence[str]):
        self.steps = list(steps)
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)  # language -> rule -> rows
        self.kept: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = defaultdict(list)

    def drop(self, language: str, step: str, subject: str) -> None:
        """Count a row dropped by a rule; the first subjects are kept as samples."""
        self.dropped[language][step] += 1
        samples = self.samples[step]
        if len(samples) < SAMPLES:
            samples.append(printable(subject, SAMPLE_CHARS))

    def keep(self, language: str) -> None:
        self.kept[language] += 1

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.kept.total() + sum(counts.total() for counts in self.dropped.values())

    def by_step(self) -> dict[str, int]:
        """Rows dropped by each rule, in the order of the rules."""
        total: Counter[str] = Counter()
        for counts in self.dropped.values():
            total.update(counts)
        return {step: total[step] for step in self.steps}

    def languages(self) -> list[str]:
        """All languages, those with most rows first."""
        rows = Counter({name: counts.total() for name, counts in self.dropped.items()})
        rows.update(self.kept)
        return sorted(rows, key=lambda name: (-rows[name], name))

    def report(self) -> dict[str, Any]:
        """The counts as JSON; those of shards add up."""
        return {
            "rows_in": self.rows,
            "rows_out": self.kept.total(),
            "dropped": self.by_step(),
            "languages": {name: self._of(name) for name in self.languages()},
            "samples": {step: self.samples[step] for step in self.steps if step in self.samples},
        }

    def _of(self, language: str) -> dict[str, Any]:
        counts = self.dropped.get(language, Counter())
        return {
            "rows_in": counts.total() + self.kept[language],
            "dropped": {step: counts[step] for step in self.steps if counts[step]},
            "rows_out": self.kept[language],
        }

    def lines(self, most_languages: int = 15) -> list[str]:
        """A table for the terminal: the rules that dropped rows, what was left after each, and the
        largest languages."""
        left = self.rows
        lines = [f"{'rule':{WIDTH}} {'dropped':>12} {'left':>12}  samples", f"{'':{WIDTH}} {'':>12} {left:>12,}"]
        for step, dropped in self.by_step().items():
            if dropped:
                left -= dropped
                samples = " | ".join(self.samples[step])
                lines.append(f"{step:{WIDTH}} {dropped:>12,} {left:>12,}  {samples}")
        lines.append(f"{'language':{WIDTH}} {'rows':>12} {'kept':>12}")
        names = self.languages()
        for name in names[:most_languages]:
            counts = self._of(name)
            lines.append(f"{printable(name, WIDTH):{WIDTH}} {counts['rows_in']:>12,} {counts['rows_out']:>12,}")
        if len(names) > most_languages:
            lines.append(f"and {len(names) - most_languages} more languages in the report")
        return lines
