"""Progress of a long job: a bar on a terminal, one line every 30 seconds in a log."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 30


class Progress:
    """Counts towards `total` (None where it is not known); `update(n)` as work is done. Use as a context manager.

    `unit` is what is counted: "B" is shown in KB, MB, ...; `task` is a word or two in front.
    """

    def __init__(self, task: str, total: int | None, unit: str = "rows"):
        self.task, self.total, self.unit = task, total, unit
        self.done, self.note, self.start = 0, "", time.monotonic()
        self._told = self.start
        self._bar = (
            tqdm(desc=task, total=total, unit=unit, unit_scale=True, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, amount: int, note: str = "") -> None:
        """`amount` more is done; `note` stands at the end of the line."""
        self.done += amount
        self.note = note or self.note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._told >= LOG_SECONDS:
            self._told = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """One line for a log: how much of how much, rate, time left."""
        seconds = self.seconds
        of = f"/{_scaled(self.total)}" if self.total else ""
        left = (
            f", {_clock(seconds / self.done * max(0, self.total - self.done))} left" if self.total and self.done else ""
        )
        note = f", {self.note}" if self.note else ""
        rate = f"{_scaled(self.done / seconds)}{self.unit}/s"
        return f"{self.task}: {_scaled(self.done)}{of}{self.unit}, {rate}{note}, {_clock(seconds)} spent{left}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()


def _scaled(number: float) -> str:
    return tqdm.format_sizeof(number) if number >= 1000 else f"{number:.3g}"


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
