"""An alarm for a job that hangs: a line in the log when there has been no progress for a while."""

import sys
import time

from megatron_ft.files.lease import Heartbeat

CHECKS = 20  # per period of the alarm


class StallAlarm:
    """Prints a line on stderr after each `minutes` without a call of `progressed`; 0 disables it.
    Use as a context manager."""

    def __init__(self, task: str, minutes: float, remedy: str):
        self._task, self._seconds, self._remedy = task, minutes * 60, remedy
        self._last = self._quiet_since = time.monotonic()
        self._timer = Heartbeat(self._check, self._seconds / CHECKS)

    def progressed(self) -> None:
        """Start the time again."""
        self._last = self._quiet_since = time.monotonic()

    def _check(self) -> bool:
        now = time.monotonic()
        if now - self._quiet_since >= self._seconds:
            self._quiet_since = now
            minutes = (now - self._last) / 60
            print(f"{self._task}: no new sample for {minutes:.3g} minutes; {self._remedy}", file=sys.stderr, flush=True)
        return True

    def __enter__(self) -> "StallAlarm":
        if self._seconds:
            self._timer.start()
        return self

    def __exit__(self, *exception) -> None:
        self._timer.stop()
