"""One srun of all ranks inside a job: its command line, its signals, and how the ranks ended.

The stderr of srun and the stdout of rank 0 both pass through this process, so that the traceback of
the failed rank is the last thing in the log, and the exit status is that of the rank that failed
first rather than of the ranks that SLURM ended because of it.
"""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR
from megatron_ft.launcher.command import PROGRAMS, free_port, shared_environment
from megatron_ft.launcher.slurm_job import Job, expects_gpus, start_slurm

# A user signal would kill a rank that has not installed its handlers, so it is held back this long
# after srun's start; it is ignored while Python is still starting, so it is repeated.
SETTLE_SECONDS = 3
REPEAT_SECONDS = 10
# From the first failure until srun is killed; srun itself waits much longer for a dead node.
STRAGGLER_SECONDS = 45
# How srun learns of sbatch's --gpus-per-task, --gpu-bind and --ntasks-per-gpu.
GPU_BINDINGS = (
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPU_BIND",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_TRES_BIND",
    "SLURM_TRES_PER_TASK",
)
_RANK_ENDED = re.compile(r"rank-ended rank=(\d+) node=(\S+) status=(\d+) time=([\d.]+)")  # by launch/rank.py
# Killed together with its rank.py, which therefore reported nothing.
_TASK_LOST = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (?!Exited with exit code)")
_NODE_LOST = re.compile(r"srun: error: Node failure on (\S+)")
_ENDED_BY_SLURM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


@dataclass(frozen=True)
class RankExit:
    """How the ranks of one srun ended.

    `status` is the exit status of all together: that of the rank that failed first, on `node`, or
    EXIT_DONE or EXIT_RESUME with `rank` None. `lost_nodes` are those that srun lost contact with.
    `all_done`: every rank has reported EXIT_DONE, which srun's own status does not tell.
    """

    status: int
    rank: int | None = None
    node: str | None = None
    lost_nodes: Sequence[str] = ()
    all_done: bool = False


class Signals:
    """Signals that the batch script has received.

    `save` is the number of the user signal that requests a save, None before one arrived; `end` is
    True after SIGTERM. Installs its handlers for the rest of the process.
    """

    def __init__(self) -> None:
        self.save: int | None = None
        self.end = False
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_save)
        signal.signal(signal.SIGTERM, self._on_end)

    def _on_save(self, number: int, frame: object) -> None:
        self.save = number

    def _on_end(self, number: int, frame: object) -> None:
        self.end = True


def srun_command(
    job: Job, command: Sequence[str], *, tasks_per_node: int | None = None, options: Sequence[str] = ()
) -> list[str]:
    """srun's command line to run `command` on all nodes of the job.

    --export=ALL, since after sbatch --export=NONE the ranks would have no PATH.
    """
    per_node = tasks_per_node or job.tasks_per_node
    cpus = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task and tasks_per_node is None else []
    return [
        *_srun_with_all_gpus(),
        "--export=ALL",
        f"--nodes={len(job.nodes)}",
        f"--ntasks={len(job.nodes) * per_node}",
        f"--ntasks-per-node={per_node}",
        *cpus,
        *options,
        *command,
    ]


def _srun_with_all_gpus() -> list[str]:
    """`srun`, such that each task sees all GPUs of its node even if the job binds GPUs to tasks.

    With one GPU visible, NCCL cannot copy directly between ranks. (--gpu-bind=none is not enough:
    it leaves CUDA_VISIBLE_DEVICES unset, and ranks might take the GPUs of other jobs.)
    """
    bindings = [name for name in GPU_BINDINGS if name in os.environ]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    if not (bindings and gpus):
        return ["srun"]
    return ["env", *(word for name in bindings for word in ("-u", name)), "srun", f"--gpus-per-node={gpus}"]


def ranks_command(job: Job, command: Sequence[str], logs: Path) -> list[str]:
    """srun's command line for all ranks: a failed rank ends the step on all nodes."""
    wrapped = [sys.executable, "-P", str(PROGRAMS / "launch" / "rank.py"), str(logs), *command]
    return srun_command(job, wrapped, options=["--kill-on-bad-exit=1", "--unbuffered", "--job-name=ranks"])


def ranks_environment(job: Job) -> dict[str, str]:
    """Variables that all ranks have in common, with the rendezvous address.

    That is the job's first node, where this process runs, and a free port, searched from a number
    that depends on the job's id and restarts.
    """
    port = free_port(20000 + (int(job.id) * 7 + job.restarts * 101) % 12000)
    return {
        **shared_environment(job.tasks_per_node, job.tasks_per_node if expects_gpus() else 0),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or job.nodes[0],
        "MASTER_PORT": str(port),
        "MEGATRON_FT_RANKS_ON_NODE": str(job.tasks_per_node),
    }


def run_ranks(command: Sequence[str], environment: Mapping[str, str], signals: Signals, num_ranks: int) -> RankExit:
    """Run the ranks until they end. A user signal is forwarded, repeatedly, until they do. Raises
    UserError if srun cannot be started."""
    srun = start_slurm(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert srun.stdout and srun.stderr
    messages = _SrunMessages()
    threads = [
        threading.Thread(target=_relay, args=(srun.stdout,), daemon=True),
        threading.Thread(target=messages.read, args=(srun.stderr,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    started, sent = time.monotonic(), -math.inf
    while srun.poll() is None:
        settled = time.monotonic() - started > SETTLE_SECONDS
        if signals.save and not signals.end and settled and time.monotonic() - sent > REPEAT_SECONDS:
            if sent < 0:
                name = signal.Signals(signals.save).name
                log_line(f"warned by {name}: every rank saves after this step")
            sent = time.monotonic()
            srun.send_signal(signals.save)
        if messages.first_failure and time.monotonic() - messages.first_failure > STRAGGLER_SECONDS:
            srun.kill()
        time.sleep(0.1)
    for thread in threads:
        thread.join(5)
    return messages.rank_exit(srun.returncode, num_ranks)


def log_line(text: str) -> None:
    """Print one line of the launcher to the main log, marked to stand out among training's."""
    sys.stdout.flush()
    print(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _relay(pipe: IO[bytes]) -> None:
    """Copy to stdout as it arrives, incomplete lines too: a progress bar has no line ends."""
    while data := os.read(pipe.fileno(), 65536):
        os.write(1, data)


@dataclass(frozen=True, order=True)
class _RankReport:
    """The end of one rank, as its launch/rank.py reports it; ordered by time."""

    time: float  # seconds since the epoch, by the clock of its node
    rank: int
    node: str
    status: int

    @property
    def failed(self) -> bool:
        return self.status not in (EXIT_DONE, EXIT_RESUME)


@dataclass(frozen=True)
class _LostTask:
    """A rank that srun reports as killed."""

    rank: int
    node: str


@dataclass
class _SrunMessages:
    """What srun and launch/rank.py write to stderr."""

    first_failure: float | None = None  # time.monotonic()
    reports: list[_RankReport] = field(default_factory=list)
    lost_tasks: list[_LostTask] = field(default_factory=list)
    lost_nodes: list[str] = field(default_factory=list)

    def read(self, pipe: IO[bytes]) -> None:
        """Take in every line; copy other text to stderr.

        After a failure nothing is copied: it is a consequence, and the traceback must come last.
        """
        for raw in pipe:
            failed = self._take_in(raw.decode(errors="replace"))
            if self.first_failure is not None:
                continue
            if failed:
                self.first_failure = time.monotonic()
            elif failed is None:
                os.write(2, raw)

    def _take_in(self, line: str) -> bool | None:
        """Whether the line reports a failure; None for other text."""
        if match := _RANK_ENDED.search(line):
            report = _RankReport(float(match[4]), int(match[1]), match[2], int(match[3]))
            self.reports.append(report)
            return report.failed
        if match := _TASK_LOST.match(line):
            self.lost_tasks.extend(_LostTask(rank, match[1]) for rank in _task_numbers(match[2]))
            return True
        if match := _NODE_LOST.match(line):
            self.lost_nodes.append(match[1])
            return True
        return None

    def rank_exit(self, srun_status: int, num_ranks: int) -> RankExit:
        """The exit of all ranks, given srun's own status and how many there are.

        A rank that failed by itself takes precedence over those that SLURM ended because of it, and
        the earliest over the others. A user error is noticed by every rank, and rank 0 reports it.
        """
        failed = [report for report in self.reports if report.failed]
        by_themselves = [report for report in failed if report.status not in _ENDED_BY_SLURM]
        if by_themselves:
            user_errors = [r for r in by_themselves if r.rank == 0 and r.status == EXIT_USER_ERROR]
            return self._exit_of(min(user_errors or by_themselves))
        if self.lost_tasks:
            first = self.lost_tasks[0]
            return RankExit(128 + signal.SIGKILL, first.rank, first.node, self.lost_nodes)
        if failed:
            return self._exit_of(min(failed))
        if srun_status == 0 and any(report.status == EXIT_RESUME for report in self.reports):
            return RankExit(EXIT_RESUME)
        all_done = {report.rank for report in self.reports if report.status == EXIT_DONE} == set(range(num_ranks))
        status = srun_status if srun_status >= 0 else 128 - srun_status
        return RankExit(status, lost_nodes=self.lost_nodes, all_done=all_done)

    def _exit_of(self, report: _RankReport) -> RankExit:
        return RankExit(report.status, report.rank, report.node, self.lost_nodes)


def _task_numbers(text: str) -> list[int]:
    """srun's list of tasks as numbers.

    >>> _task_numbers("0,2-3")
    [0, 2, 3]
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
