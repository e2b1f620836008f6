"""Signals that request a run to save and stop, and the watchdog that ends a run that hangs.

Imports nothing heavy, because handlers are set before torch is imported: no signal is lost at
startup.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_received: list[str] = []


def install() -> None:
    """Record stop signals, which the training loop checks after every step.

    A second Ctrl-C ends the process at once. Under nohup, a closed terminal is ignored.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _remember)


def _remember(number: int, frame) -> None:
    _received.append(signal.Signals(number).name)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)


def received() -> str | None:
    """Name of the first stop signal that this process received, or None."""
    return _received[0] if _received else None


def reason() -> str:
    """What stops a run because of a signal to any of its ranks."""
    return received() or "a signal to another rank"


def forget() -> None:
    """Clear the received signals, for another run in the same process."""
    _received.clear()


class Watchdog:
    """Ends this process with stack traces of all threads if `alive` was not called for `minutes`.

    A hanging rank makes all others wait, so every rank has a watchdog and writes its own traces, to
    stderr and to `rank_00000.txt` ... in `folder`. A second timer, in C, ends even a process whose
    interpreter is stuck. 0 `minutes` disables both.
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
        """Restart the timers: a step, a validation batch or a checkpoint is finished."""
        self._last = time.monotonic()
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds * 1.5 + 5, exit=True)

    def stop(self) -> None:
        """Stop both timers."""
        self._stopped.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(5.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        message = (
            f"rank {self._rank}: no progress for {silent / 60:.1f} minutes (--watchdog-mins); ending with stack traces"
        )
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"rank_{self._rank:05d}.txt", "w", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
