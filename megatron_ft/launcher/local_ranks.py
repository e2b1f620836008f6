"""Ranks on this machine: started together, ended together, one exit status.

Rank 0 has the terminal to itself; the others write into files of their own. Signals that ask for a stop are passed on,
and every rank answers them by saving after its current step. When one rank fails the rest are ended, and the failure is the last thing printed.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR
from megatron_ft.launcher.command import free_port, rank_environment, shared_environment

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_TRACEBACK = re.compile(
    r"(\[rank\d+\]: )?Traceback \(most recent"
)  # torch names the rank once there is a process group
SECONDS_TO_END = (
    10  # what a rank whose peer failed gets between SIGTERM and SIGKILL: it mostly waits in a collective for ever
)


def local_environment(num_processes: int, gpus: int) -> dict[str, str]:
    """What all local ranks share, the meeting point included; `gpus` is how many this machine has."""
    port = free_port(10000 + os.getpid() % 10000)  # another start at the same moment begins elsewhere
    return {**shared_environment(num_processes, gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_local_ranks(
    command: Sequence[str],
    num_processes: int,
    environment: Mapping[str, str],
    log_dir: Path | None,
    stop_signal: signal.Signals | None = None,
) -> int:
    """Run `command` on `num_processes` ranks and return the status the whole ended with (EXIT_DONE, EXIT_RESUME, or the first failure's).

    Ranks above 0 append to `log_dir`/rank-NNN.log, or say nothing without a directory. An engine that saves at `stop_signal` alone
    (and then ends with 0) gets that one whatever came.
    """
    stop = _StopRequests(stop_signal)
    ranks: list[subprocess.Popen] = []
    logs = [log_dir / f"rank-{rank:03d}.log" if log_dir and rank else None for rank in range(num_processes)]
    ends = [start_log(log) if log else 0 for log in logs]
    try:
        for rank, log in enumerate(logs):
            output = None if rank == 0 else open(log, "ab") if log else subprocess.DEVNULL  # noqa: SIM115
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **environment, **rank_environment(rank, num_processes, rank, num_processes)},
                    stdin=subprocess.DEVNULL if rank else None,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C comes here alone, and is passed on as a wish to save
                )
            )
            if log:
                output.close()
        failed = _wait(ranks, stop)
        if failed is None:
            resume = any(rank.returncode == EXIT_RESUME for rank in ranks) or (stop_signal and stop.passed_on)
            return EXIT_RESUME if resume else EXIT_DONE
        status = ranks[failed].returncode
        _end(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        stop.restore()
    if failed and not (status == EXIT_USER_ERROR == ranks[0].returncode):  # rank 0 has said the same mistake already
        print_end_of_log(failed, logs[failed], ends[failed])
    if status < 0:
        print(f"rank {failed} was ended by {signal.Signals(-status).name}", file=sys.stderr)
    return 128 - status if status < 0 else status


def start_log(log: Path) -> int:
    """Make the log's folder; returns where this start's lines will begin."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.stat().st_size if log.exists() else 0


def print_end_of_log(rank: int, log: Path | None, start: int = 0) -> None:
    """Show how a rank ended: its traceback, or its last lines when it left none. Printed last, so it is what one sees first."""
    print(f"\n--- rank {rank} failed first" + (f"; from the end of {log}" if log else ""), file=sys.stderr)
    if log and log.exists():
        with open(log, "rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
        begin = max((i for i, line in enumerate(lines) if _TRACEBACK.match(line)), default=len(lines) - 20)
        print(*lines[max(begin, len(lines) - 100, 0) :], sep="\n", file=sys.stderr, flush=True)


class _StopRequests:
    """Signals caught since the start, in order, until `restore` gives the old handlers back."""

    def __init__(self, passed_on_as: signal.Signals | None) -> None:
        self.caught: list[int] = []
        self.passed_on_as = passed_on_as
        self.passed_on = False
        self._old = {
            number: signal.signal(number, lambda number, _: self.caught.append(number))
            for number in STOP_SIGNALS
            if number != signal.SIGHUP
            or signal.getsignal(number) != signal.SIG_IGN  # nohup: a closed terminal is no wish
        }

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], stop: _StopRequests) -> int | None:
    """Wait until all ranks have ended well (None), or one has not (its number), passing signals on meanwhile.

    A thread waits for each rank, so that they are heard in the order they end: a peer that fails because of the first follows it
    by milliseconds.
    """
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number, rank in enumerate(ranks):
        threading.Thread(target=lambda n=number, r=rank: (r.wait(), ended.put(n)), daemon=True).start()
    running, interrupted = len(ranks), False
    while running:
        while stop.caught:
            number = stop.caught.pop(0)
            if number == signal.SIGINT:
                if interrupted:
                    raise KeyboardInterrupt
                interrupted, number = True, signal.SIGTERM
                print("\nstopping: every rank saves after this step (Ctrl-C again ends them at once)", file=sys.stderr)
            if number == signal.SIGHUP:
                number = signal.SIGTERM
            stop.passed_on = True
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(stop.passed_on_as or number)
        try:
            number = ended.get(timeout=0.05)
        except queue.Empty:
            continue
        if ranks[number].returncode not in (EXIT_DONE, EXIT_RESUME):
            return number
        running -= 1
    return None


def _end(ranks: list[subprocess.Popen]) -> None:
    """End what is left after a failure. Rank 0 first gets a moment to fail by itself, and so to say why on the terminal."""
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline - SECONDS_TO_END + 2:
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        time.sleep(0.1)
