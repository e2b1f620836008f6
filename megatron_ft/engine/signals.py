"""Signals that ask a run to save and stop, and the watchdog that ends a run that hangs.

Imports nothing heavy: handlers are set before torch is imported, so that a signal during start-up is not lost.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_received: list[str] = []


def install() -> None:
    """Remember SIGTERM, SIGUSR1 and SIGUSR2 instead of dying of them; the training loop looks after each step."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


def _remember(number: int, frame) -> None:
    _received.append(signal.Signals(number).name)


def received() -> str | None:
    """Name of the first stop signal this process got, or None."""
    return _received[0] if _received else None


def forget() -> None:
    """Start anew, for another run in the same process."""
    _received.clear()


class Watchdog:
    """Ends this process with the stack traces of all its threads when `alive` was not called for `minutes`.

    Every rank has one, and a rank that hangs makes all others wait, so each writes its own traces:
    `rank_00000.txt` ... in `folder` and on stderr. A second timer, in C, ends even a process whose interpreter is stuck.
    """

    def __init__(self, minutes: float, rank: int, folder: Path | None) -> None:
        self._seconds = minutes * 60
        self._rank = rank
        self._folder = folder
        self._last = time.monotonic()
        self._stopped = threading.Event()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            self.alive()

    def alive(self) -> None:
        """A step, a validation batch or a checkpoint is finished: count from here."""
        self._last = time.monotonic()
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds * 1.5 + 5, exit=True)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        message = f"rank {self._rank}: nothing finished for {silent / 60:.1f} minutes (--watchdog-mins); ending with stack traces"
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"rank_{self._rank:05d}.txt", "w") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
