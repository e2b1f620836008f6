"""Progress of a long job: a bar on a terminal, one line every 30 seconds in a log."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 30


class Progress:
    """Counts up to `total` (None if unknown) by `update(n)`. Use as a context manager.

    `task` is a short label. `unit` is what is counted; "B" is shown as KB, MB, and so on.
    """

    def __init__(self, task: str, total: int | None, unit: str = "rows"):
        self.task, self.total, self.unit = task, total, unit
        self.done, self.note, self.start = 0, "", time.monotonic()
        self._last_logged = self.start
        self._bar = (
            tqdm(desc=task, total=total, unit=unit, unit_scale=True, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, amount: int, note: str = "") -> None:
        """Add `amount` to the count; `note` is shown at the end of the line until the next one."""
        self.done += amount
        self.note = note or self.note
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last_logged >= LOG_SECONDS:
            self._last_logged = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start, above 0."""
        return max(time.monotonic() - self.start, 1e-9)

    def line(self) -> str:
        """One line for a log: count, total, rate, time spent and time left."""
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
