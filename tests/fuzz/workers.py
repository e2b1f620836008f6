"""Runs mutated inputs in forked workers, so that a crash or a hang belongs to one input.

A `Failure` is an input that one_input.py judges so, a crash of its process, or more CPU time,
waiting or memory than an input of a few KB may take. A crash or a hang ends one worker; another
worker takes the remaining inputs. Processes are forked from the server of ranks.py, which has
imported torch.
"""

import contextlib
import faulthandler
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from one_input import ROOT, Failure, Reader, is_ours, run_input, watch_opened_files
from ranks import _context

_fork = get_context("fork")
CPU_SECONDS = 10.0
WAITED_SECONDS = 60.0  # an input that waits for something uses no CPU
ADDRESS_SPACE = 3 << 30  # bytes of address space that one worker may add
FILE_SIZE = 256 << 20  # bytes of the longest file


@dataclass
class Report:
    """How the inputs of one reader ended."""

    reader: str
    inputs: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    peak: int = 0  # bytes of resident memory that an input added, at most
    slowest: float = 0.0  # seconds
    cpu: float = 0.0  # seconds of all processes

    def kinds(self) -> dict[str, list[Failure]]:
        """Failures by kind, most frequent first; of a kind the shortest mutation first."""
        kinds: dict[str, list[Failure]] = {}
        for failure in self.failures:
            kinds.setdefault(failure.kind, []).append(failure)
        for failures in kinds.values():
            failures.sort(key=lambda failure: (len(failure.mutation), failure.number))
        return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))

    def __str__(self) -> str:
        lines = [
            f"{self.reader}: {len(self.failures)} of {self.inputs} inputs ended wrongly, {self.refused} were refused; "
            f"at most {self.slowest:.1f} s and {self.peak >> 20} MiB per input, {self.cpu:.0f} s of CPU time"
        ]
        for kind, failures in self.kinds().items():
            first = failures[0]
            lines.append(f"  {len(failures)} x {kind}")
            lines.append(f"      input {first.number}: {first.mutation}")
            lines.append(f"      {first.detail}" if first.detail else "")
        return "\n".join(filter(None, lines))


def fuzz(reader: Reader, folder: Path, numbers: Sequence[int] | None = None) -> Report:
    """Run the inputs `numbers` of a reader; by default all hand-written and `reader.count` random
    ones. Failures carry the number, which gives the same input again.

    A process of its own makes the intact input, reads it, and then forks the workers, so that each
    of them has imported and opened what the reader needs.
    """
    if numbers is None:
        random_inputs = round(reader.count * float(os.environ.get("MEGATRON_FT_FUZZ_TIMES", "1")))
        numbers = range(len(reader.fixed) + random_inputs)
    ours, theirs = _context.Pipe(duplex=False)
    supervisor = _context.Process(target=_supervise, args=(theirs, reader, folder, list(numbers)))
    supervisor.start()
    theirs.close()
    try:
        report = ours.recv()
    except EOFError:
        raise RuntimeError(f"{reader.name}: the process that runs the inputs died") from None
    finally:
        supervisor.join(5)
        if supervisor.is_alive():  # after Ctrl-C
            assert supervisor.pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(supervisor.pid, signal.SIGKILL)  # its group: it and its workers
    if isinstance(report, Failure):
        raise RuntimeError(f"{reader.name}: the intact input ended wrongly: {report.kind}: {report.detail}")
    return report


def _supervise(connection: Connection, reader: Reader, folder: Path, numbers: Sequence[int]) -> None:
    os.setpgid(0, 0)
    with open(folder / "supervisor.log", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        RAYON_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    sys.dont_write_bytecode = True  # would be a file outside the input's directory
    import torch

    torch.set_num_threads(1)
    watched = watch_opened_files()
    try:
        intact = run_input(reader, folder, None, None, watched)
    except Exception:  # noqa: BLE001 - `make` failed
        intact = Failure(-1, "not made", "none", traceback.format_exc())
    if isinstance(intact, Failure):
        connection.send(intact)
        return
    report = Report(reader.name)
    for outcome in _run(reader, folder, numbers, intact["value"], watched):
        report.inputs += 1
        if isinstance(outcome, Failure):
            report.failures.append(outcome)
            continue
        report.refused += outcome["status"] == 2
        report.peak = max(report.peak, outcome["memory"])
        report.slowest = max(report.slowest, outcome["seconds"])
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    report.cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    connection.send(report)


def check(reader: Reader, folder: Path) -> None:
    """Fail unless every input of a reader ends as it must.

    MEGATRON_FT_FUZZ_TIMES=20 reads 20 times as many random inputs, 0.1 a tenth.
    MEGATRON_FT_FUZZ_CASE=N reads only input N and keeps its directory.
    MEGATRON_FT_FUZZ_REPORT=FILE appends the report as JSON.
    """
    case = os.environ.get("MEGATRON_FT_FUZZ_CASE")
    report = fuzz(reader, folder, [int(case)] if case else None)
    if path := os.environ.get("MEGATRON_FT_FUZZ_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report)) + "\n")
    print(report)
    assert not report.failures, (
        f"{report}\ninput N again, kept in DIR: MEGATRON_FT_FUZZ_CASE=N .venv/bin/pytest -m fuzz --basetemp=DIR "
        f"'{os.environ['PYTEST_CURRENT_TEST'].removesuffix(' (call)')}'"
    )


class _Worker:
    """A forked process, the inputs it still has to read, what it used for the current one."""

    def __init__(self, reader: Reader, folder: Path, numbers: deque, reference: Any, watched: dict):
        self.numbers, self.log = numbers, folder / f"worker-{numbers[0]}.log"
        self.connection, theirs = _fork.Pipe(duplex=False)
        arguments = (theirs, reader, folder, list(numbers), reference, watched, self.log)
        self.process = _fork.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.cpu_before, self.waited, self.checked = 0.0, 0.0, time.monotonic()
        self.mutation = self.exceeded = ""

    def usage(self) -> tuple[bool, float]:
        """Whether the process waits, and its CPU time so far; a loaded machine changes neither."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return False, self.cpu_before
        state, *fields = stat.rpartition(")")[2].split()
        return state in "SD", (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")

    def begin(self, mutation: str) -> None:
        """An input begins, or with "" its preparation."""
        self.mutation, self.waited = mutation, 0.0
        self.cpu_before = self.usage()[1]

    def check_time(self) -> None:
        """End the process if its input takes too long, after it has written its stack."""
        waits, cpu = self.usage()
        now = time.monotonic()
        self.waited += (now - self.checked) * waits
        self.checked = now
        if self.exceeded:
            return
        if self.mutation and cpu - self.cpu_before > CPU_SECONDS:
            self.exceeded = f"hang: more than {CPU_SECONDS:.0f} s of CPU time"
        elif self.waited > WAITED_SECONDS * (1 if self.mutation else 5):
            self.exceeded = f"hang: waiting for more than {WAITED_SECONDS:.0f} s"
        if self.exceeded:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)
                time.sleep(0.5)
            self.process.kill()

    def death(self) -> Failure:
        """The failure of the input during which the process ended."""
        code = self.process.exitcode or 0
        how = self.exceeded or f"crash: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        frames = re.findall(r'File "(.+?)", line (\d+) in (\S+)', log)
        ours = next((f"{Path(f).relative_to(ROOT)}:{line} ({name})" for f, line, name in frames if is_ours(f)), "?")
        native = [line for line in log.splitlines() if "panicked" in line or "terminate" in line or "what()" in line]
        return Failure(self.numbers[0], f"{how} at {ours}", self.mutation, " ".join(native)[:300])


def _run(reader: Reader, folder: Path, numbers: Sequence[int], reference: Any, watched: dict) -> list:
    """The outcome of each input: a Failure, or {"value", "status", "memory", "seconds"}."""
    size = reader.inputs_per_worker
    waiting = deque(deque(numbers[i : i + size]) for i in range(0, len(numbers), size))
    running: list[_Worker] = []
    outcomes: list = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(_Worker(reader, folder, waiting.popleft(), reference, watched))
            ready = wait([worker.connection for worker in running], timeout=0.25)
            for worker in list(running):
                if worker.connection in ready:
                    try:
                        message = worker.connection.recv()
                    except EOFError:
                        running.remove(worker)
                        worker.process.join()
                        if worker.numbers:
                            outcomes.append(worker.death())
                            worker.numbers.popleft()
                        if worker.numbers:
                            waiting.append(worker.numbers)
                        continue
                    if isinstance(message, str):
                        worker.begin(message)
                    else:
                        worker.numbers.popleft()
                        worker.begin("")
                        outcomes.append(message)
                worker.check_time()
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()
    return outcomes


# In a worker


def _work(
    connection: Connection, reader: Reader, folder: Path, numbers: list[int], reference: Any, watched: dict, log: Path
) -> None:
    file = open(log, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
    os.dup2(file.fileno(), 2)  # what native code prints
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    _limit_resources()
    for number in numbers:
        connection.send(run_input(reader, folder, number, reference, watched, connection.send))
    connection.close()
    os._exit(0)


def _limit_resources() -> None:
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
