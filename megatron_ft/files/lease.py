"""Leases on a shared file system: who holds one, whether the holder is alive, and its heartbeat.

A process takes a lease by writing a file that names it (`ProcessIdentity`) and keeps it by touching
that file (`Heartbeat`). Another process asks `ProcessIdentity.liveness` first; only the holder's
own host can answer. From any other host it watches the heartbeat (`HeartbeatWatch`).
`data.build_once` and `checkpoint.lease` are built on these three.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import psutil

START_TIME_TOLERANCE = 1.0  # seconds; a process that started at another time has a reused pid


class Liveness(Enum):
    """Whether the holder of a lease is alive; UNKNOWN if it cannot be determined yet."""

    ALIVE = auto()
    DEAD = auto()
    UNKNOWN = auto()


@dataclass(frozen=True)
class ProcessIdentity:
    """One process among all hosts of a cluster.

    `namespace` is its pid namespace with the boot id of its kernel: two containers, or two nodes of
    a misconfigured cluster, may share a host name. `process_started` is its start time in seconds
    since the kernel booted, which tells it from a later process with the same pid; a time since the
    epoch would change when the clock is set.
    """

    host: str
    namespace: str
    pid: int
    process_started: float

    @classmethod
    def of_this_process(cls) -> "ProcessIdentity":
        """The identity of the calling process."""
        process = psutil.Process()
        return cls(socket.gethostname(), _pid_namespace(), process.pid, _started(process))

    def liveness(self) -> Liveness:
        """Whether the process is running; UNKNOWN from another host or pid namespace."""
        if (self.host, self.namespace) != (socket.gethostname(), _pid_namespace()):
            return Liveness.UNKNOWN
        try:
            process = psutil.Process(self.pid)
            same = abs(_started(process) - self.process_started) < START_TIME_TOLERANCE
            running = same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return Liveness.DEAD
        return Liveness.ALIVE if running else Liveness.DEAD


def _started(process: psutil.Process) -> float:
    """Seconds from the kernel's boot to the start of a process."""
    boot = psutil.boot_time()  # first: psutil may keep it for create_time
    return process.create_time() - boot


def _pid_namespace() -> str:
    """`pid:[4026531836] ` and the boot id, as far as /proc has them. The number is the same in the
    initial namespaces of all hosts; the boot id differs."""
    parts = []
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return " ".join(parts)


class Heartbeat:
    """Calls `beat` every `seconds` on a daemon thread, from `start` until `stop`, or until `beat`
    returns False.

    An OSError in `beat` is ignored: the next write reports a full or missing disk.
    """

    def __init__(self, beat: Callable[[], bool], seconds: float):
        self._beat, self._seconds = beat, seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start beating; can be called once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating, if started; returns when no call of `beat` is in progress."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            with suppress(OSError):
                if not self._beat():
                    return

    def __enter__(self) -> "Heartbeat":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()


class HeartbeatWatch:
    """Judges a holder by its heartbeat, timed by this process's clock; clocks of hosts differ."""

    def __init__(self, stale_seconds: float):
        self._stale_seconds = stale_seconds
        self._last_beat: int | None = None
        self._last_change = 0.0  # when this process first saw `_last_beat`

    def observe(self, beat: int) -> Liveness:
        """`beat` is the current mtime of the lease file.

        ALIVE if it changed since the last call, DEAD if it has not changed for `stale_seconds`,
        otherwise UNKNOWN, as on the first call.
        """
        now, previous = time.monotonic(), self._last_beat
        if beat != previous:
            self._last_beat, self._last_change = beat, now
            return Liveness.UNKNOWN if previous is None else Liveness.ALIVE
        return Liveness.DEAD if now - self._last_change >= self._stale_seconds else Liveness.UNKNOWN
