"""Politeness: how often a server is asked, and for how long nobody asks after it refused."""

import random
import threading
import time

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 900.0  # seconds, of the back-off
LONGEST_RETRY_AFTER = 86400.0  # seconds; a server that asks for more is asked again after a day
MAX_FAILURES = 14  # in a row; their pauses add up to an hour and more


class Stopped(Exception):
    """The run is stopping: nothing is to be asked any more."""


class ServerUnavailable(Exception):
    """The server failed MAX_FAILURES times in a row; the message is its last failure."""


class Pace:
    """Decides for all workers when the next repository may be fetched.

    At most `rate` per second start. After a refusal or a failure of the server every worker pauses:
    as long as the server asks for, else for a random time around a bound that doubles from
    SHORTEST_PAUSE to LONGEST_PAUSE with every failure in a row.
    """

    def __init__(self, rate: float, stop: threading.Event, seed: int | None = None):
        self.stop = stop
        self._interval, self._random, self._lock = 1 / rate, random.Random(seed), threading.Lock()
        self._next = self._resume_at = self._paused_at = 0.0  # monotonic seconds
        self._failures = 0

    def wait(self) -> None:
        """Return when the caller may start. Raises Stopped if the run is stopping."""
        with self._lock:
            slot = max(time.monotonic(), self._next)
            self._next = slot + self._interval
        while True:
            with self._lock:
                seconds = max(slot, self._resume_at) - time.monotonic()
            if self.stop.wait(max(0.0, seconds)):
                raise Stopped
            if seconds <= 0:
                return

    def succeeded(self) -> None:
        """The server answered: the next failure is the first one."""
        with self._lock:
            self._failures = 0

    def failed(self, started: float, reason: str, retry_after: float | None) -> float:
        """Pause all workers after a request that started at `started` (monotonic); returns the
        seconds.

        Requests that were already running when the pause began do not prolong it by themselves.
        Raises ServerUnavailable after MAX_FAILURES in a row.
        """
        with self._lock:
            now = time.monotonic()
            if started >= self._paused_at:
                self._failures += 1
                self._paused_at = now
            if self._failures >= MAX_FAILURES:
                raise ServerUnavailable(reason)
            if retry_after is None:
                bound = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** (self._failures - 1))
                retry_after = self._random.uniform(bound / 2, bound)
            seconds = min(retry_after, LONGEST_RETRY_AFTER)
            self._resume_at = max(self._resume_at, now + seconds)
            return seconds
