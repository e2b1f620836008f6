"""Ranks on this machine: started together, ended together, one exit status.

Only rank 0 writes to the terminal; the others write to log files. Signals that ask for a stop are
forwarded, and every rank answers them by saving after its current step. When one rank fails, the
others are ended, and the failure is the last thing printed.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR
from megatron_ft.launcher.command import free_port, rank_environment, shared_environment
from megatron_ft.training.signals import STOP_SIGNALS

# With a process group, torch puts the rank in front.
_TRACEBACK = re.compile(r"(\[rank\d+\]: )?Traceback \(most recent")
# What ranks get to end after another has failed, and when in that time they get SIGTERM: most are
# waiting in a collective and would stay there.
SECONDS_TO_END = 10
SECONDS_TO_SIGTERM = 2


def local_environment(num_processes: int, gpus: int) -> dict[str, str]:
    """What all local ranks have in common, with the rendezvous address.

    `gpus` is how many this machine has.
    """
    port = free_port(10000 + os.getpid() % 10000)  # runs that start at the same time search from different ports
    return {**shared_environment(num_processes, gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@dataclass(frozen=True)
class RankLog:
    """The log file of a rank above 0, and the size it had when this run began; None: no file."""

    rank: int
    path: Path | None
    start: int = 0

    @classmethod
    def prepare(cls, rank: int, directory: Path | None) -> "RankLog":
        """The log of a rank in `directory`, which is created."""
        if directory is None or rank == 0:
            return cls(rank, None)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank-{rank:03d}.log"
        return cls(rank, path, path.stat().st_size if path.exists() else 0)

    def print_end(self) -> None:
        """Print how the rank ended: its last traceback, or its last 20 lines.

        Called last, so that it is the first thing a user sees.
        """
        print(f"\n--- rank {self.rank} failed first" + (f"; end of {self.path}" if self.path else ""), file=sys.stderr)
        if self.path and self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self.start)
                lines = file.read().decode(errors="replace").splitlines()
            begin = max((i for i, line in enumerate(lines) if _TRACEBACK.match(line)), default=len(lines) - 20)
            print(*lines[max(begin, len(lines) - 100, 0) :], sep="\n", file=sys.stderr, flush=True)


def run_local_ranks(
    command: Sequence[str],
    num_processes: int,
    environment: Mapping[str, str],
    log_dir: Path | None,
    stop_signal: signal.Signals | None = None,
    output: int | None = None,
) -> int:
    """Run `command` on `num_processes` ranks; rank 0 writes to the file descriptor `output`, or to
    the terminal.

    Returns EXIT_DONE, EXIT_RESUME, or the status of the rank that failed first (128 + N when signal
    N ended it). Ranks above 0 append to `log_dir`/rank-NNN.log; without a directory their output is
    dropped. An engine that saves only at `stop_signal`, and then ends with 0, is sent that signal
    in place of any other.
    """
    stop = _StopRequests(stop_signal)
    ranks: list[subprocess.Popen] = []
    logs = [RankLog.prepare(rank, log_dir) for rank in range(num_processes)]
    try:
        for rank, log in enumerate(logs):
            variables = rank_environment(rank, num_processes, local_rank=rank, ranks_on_node=num_processes)
            ranks.append(_start(command, {**environment, **variables}, log, output))
        failed = _wait(ranks, stop)
        if failed is None:
            resume = any(rank.returncode == EXIT_RESUME for rank in ranks) or (stop_signal and stop.forwarded)
            return EXIT_RESUME if resume else EXIT_DONE
        status = ranks[failed].returncode
        _end(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        stop.restore()
    if failed and not (status == EXIT_USER_ERROR == ranks[0].returncode):  # rank 0 has reported the same error
        logs[failed].print_end()
    if status < 0:
        print(f"rank {failed} was ended by {signal.Signals(-status).name}", file=sys.stderr)
    return 128 - status if status < 0 else status


def _start(
    command: Sequence[str], environment: Mapping[str, str], log: RankLog, rank_0: int | None
) -> subprocess.Popen:
    """Start one rank: rank 0 on the descriptor `rank_0` or the terminal, others on their log."""
    with contextlib.ExitStack() as stack:
        output: IO[bytes] | int | None = rank_0 if log.rank == 0 else subprocess.DEVNULL
        if log.path:
            output = stack.enter_context(open(log.path, "ab"))
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL if log.rank else None,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it as a save request
        )


class _StopRequests:
    """Signals received since the start, in order, until `restore` reinstates the old handlers.

    None are received in a thread other than the main one, where Python allows no handlers.
    """

    def __init__(self, forwarded_as: signal.Signals | None) -> None:
        self.received: list[int] = []
        self.forwarded_as = forwarded_as
        self.forwarded = False
        self._old = {
            number: signal.signal(number, lambda number, _: self.received.append(number))
            for number in (STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ())
            # under nohup, a closed terminal is not a request to stop
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], stop: _StopRequests) -> int | None:
    """Wait until a rank fails and return its number, or None once all have ended well.

    Forwards signals meanwhile. A thread waits for each rank, so that they are seen in the order in
    which they end: a rank that fails because of the first does so within milliseconds.
    """
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait_for(number: int) -> None:
        ranks[number].wait()
        ended.put(number)

    for number in range(len(ranks)):
        threading.Thread(target=wait_for, args=(number,), daemon=True).start()
    running, interrupted = len(ranks), False
    while running:
        while stop.received:
            received = stop.received.pop(0)
            if received == signal.SIGINT:
                if interrupted:
                    raise KeyboardInterrupt
                interrupted = True
                print("\nstopping: every rank saves after this step (Ctrl-C again ends them at once)", file=sys.stderr)
            stop.forwarded = True
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(stop.forwarded_as or received)
        try:
            number = ended.get(timeout=0.05)
        except queue.Empty:
            continue
        if ranks[number].returncode not in (EXIT_DONE, EXIT_RESUME):
            return number
        running -= 1
    return None


def _end(ranks: list[subprocess.Popen]) -> None:
    """End the other ranks after a failure.

    Rank 0 first gets a moment to fail by itself, and so to print the reason on the terminal.
    """
    started = time.monotonic()
    while time.monotonic() < started + SECONDS_TO_END and any(rank.poll() is None for rank in ranks):
        if time.monotonic() > started + SECONDS_TO_SIGTERM:
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        time.sleep(0.1)
