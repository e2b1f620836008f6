"""One srun of all ranks inside a job: its command line, its signals, and what its end means.

srun's own words go to stderr and rank 0's to stdout, each through this process, so that a failed rank's traceback can stand last in the log
and the exit status be that of the rank that failed first, not that of the ranks SLURM ended because of it.
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
from megatron_ft.launcher.command import ROOT, free_port, shared_environment
from megatron_ft.launcher.slurm_job import Job, expects_gpus

SETTLE_SECONDS = 3  # a user signal that meets a rank before its first lines have run would kill it, so it waits this long after srun's start
REPEAT_SECONDS = 10  # and it is ignored while Python still starts, so it is sent again
STRAGGLER_SECONDS = 45  # from the first failure until srun is ended from here: it waits for a dead node much longer
BINDS_GPUS = (  # what srun takes from sbatch --gpus-per-task, --gpu-bind and --ntasks-per-gpu
    "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_BIND", "SLURM_TRES_PER_TASK",
)  # fmt: skip
_ENDED = re.compile(r"rank-ended rank=(\d+) node=(\S+) status=(\d+) time=([\d.]+)")  # launch/rank.py's line
_LOST_TASK = re.compile(
    r"srun: error: (\S+): tasks? ([\d,-]+): (?!Exited with exit code)"
)  # ended so that rank.py could not say it
_LOST_NODE = re.compile(r"srun: error: Node failure on (\S+)")
_WAITING = re.compile(r"step creation temporarily disabled|Step created for")  # until the preflight step is cleaned up
_ENDED_BY_SLURM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


@dataclass
class End:
    """How a step ended. `rank` is the one that failed first, None when none did; `lost_nodes` are those srun itself missed."""

    status: int
    rank: int | None = None
    node: str | None = None
    lost_nodes: list[str] = field(default_factory=list)


class Signals:
    """What SLURM asked of the batch script: `save` by a user signal, `end` by SIGTERM."""

    def __init__(self) -> None:
        self.save: int | None = None
        self.end = False
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._save)
        signal.signal(signal.SIGTERM, self._end)

    def _save(self, number: int, frame) -> None:
        self.save = number

    def _end(self, number: int, frame) -> None:
        self.end = True


def srun_command(
    job: Job, command: Sequence[str], *, tasks_per_node: int | None = None, options: Sequence[str] = ()
) -> list[str]:
    """srun over all nodes of the job. The environment is given whole: sbatch --export=NONE would else leave ranks without PATH."""
    per_node = tasks_per_node or job.tasks_per_node
    cpus = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task and tasks_per_node is None else []
    return [
        *_all_gpus_visible("srun"), "--export=ALL", f"--nodes={len(job.nodes)}", f"--ntasks={len(job.nodes) * per_node}", f"--ntasks-per-node={per_node}",
        *cpus, *options, *command,
    ]  # fmt: skip


def _all_gpus_visible(srun: str) -> list[str]:
    """`srun` such that each task sees all GPUs of its node, also where the job binds GPUs to tasks: with one GPU visible, NCCL cannot copy
    directly between ranks. (--gpu-bind=none would do, but leaves CUDA_VISIBLE_DEVICES out: ranks might take other jobs' GPUs.)"""
    binds = [name for name in BINDS_GPUS if name in os.environ]
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    if not (binds and gpus):
        return [srun]
    return ["env", *(word for name in binds for word in ("-u", name)), srun, f"--gpus-per-node={gpus}"]


def ranks_command(job: Job, command: Sequence[str], logs: Path) -> list[str]:
    """srun's command line for all ranks: any failed rank ends the step on all nodes."""
    wrapped = [sys.executable, "-P", str(ROOT / "launch" / "rank.py"), str(logs), *command]
    return srun_command(job, wrapped, options=["--kill-on-bad-exit=1", "--unbuffered", "--job-name=ranks"])


def ranks_environment(job: Job) -> dict[str, str]:
    """The rendezvous is the job's first node, where this runs, on a free port that the job's id and restart decide."""
    port = free_port(20000 + (int(job.id) * 7 + job.restarts * 101) % 12000)
    return {
        **shared_environment(job.tasks_per_node, job.tasks_per_node if expects_gpus() else 0),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or job.nodes[0],
        "MASTER_PORT": str(port),
        "MEGATRON_FT_RANKS_ON_NODE": str(job.tasks_per_node),
    }


def run_ranks(command: Sequence[str], environment: Mapping[str, str], signals: Signals) -> End:
    """Run the step to its end. A user signal is passed on, again and again until the ranks end."""
    srun = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    heard = _Heard()
    threads = [
        threading.Thread(target=_relay, args=(srun.stdout,), daemon=True),
        threading.Thread(target=heard.listen, args=(srun.stderr,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    started, sent = time.monotonic(), -math.inf
    while srun.poll() is None:
        settled = time.monotonic() - started > SETTLE_SECONDS
        if signals.save and not signals.end and settled and time.monotonic() - sent > REPEAT_SECONDS:
            if sent < 0:
                name = signal.Signals(signals.save).name
                print(
                    f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} warned by {name}: every rank saves after this step",
                    flush=True,
                )
            sent = time.monotonic()
            srun.send_signal(signals.save)
        if heard.first_failure and time.monotonic() - heard.first_failure > STRAGGLER_SECONDS:
            srun.kill()
        time.sleep(0.1)
    for thread in threads:
        thread.join(5)
    return heard.end(srun.returncode)


def _relay(pipe: IO[bytes]) -> None:
    """Copy as it comes, half lines too: a progress bar has no line ends."""
    while data := os.read(pipe.fileno(), 65536):
        os.write(1, data)


class _Heard:
    """What srun and the ranks' launchers said on stderr."""

    def __init__(self) -> None:
        self.first_failure: float | None = None
        self._ended: list[tuple[float, int, str, int]] = []  # time, rank, node, status
        self._lost_tasks: list[tuple[int, str]] = []
        self._lost_nodes: list[str] = []

    def listen(self, pipe: IO[bytes]) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace")
            if ended := _ENDED.search(line):
                rank, node, status, when = int(ended[1]), ended[2], int(ended[3]), float(ended[4])
                self._ended.append((when, rank, node, status))
                failed = status not in (EXIT_DONE, EXIT_RESUME)
            elif lost := _LOST_TASK.match(line):
                self._lost_tasks.extend((rank, lost[1]) for rank in _task_numbers(lost[2]))
                failed = True
            elif gone := _LOST_NODE.match(line):
                self._lost_nodes.append(gone[1])
                failed = True
            elif (
                self.first_failure is None
            ):  # what follows a failure is its consequence, and the traceback must stand last
                os.write(2, raw)
                continue
            else:
                continue
            if failed and self.first_failure is None:
                self.first_failure = time.monotonic()

    def end(self, srun_status: int) -> End:
        """A rank that failed by itself comes before those that SLURM ended because of it, and the earliest first."""
        failed = [e for e in self._ended if e[3] not in (EXIT_DONE, EXIT_RESUME)]
        by_themselves = [e for e in failed if e[3] not in _ENDED_BY_SLURM]
        if by_themselves:
            mistakes = [
                e for e in by_themselves if e[1] == 0 and e[3] == EXIT_USER_ERROR
            ]  # every rank notices; rank 0 has said it
            _, rank, node, status = min(mistakes or by_themselves)
            return End(status, rank, node, self._lost_nodes)
        if self._lost_tasks:
            rank, node = self._lost_tasks[0]
            return End(128 + signal.SIGKILL, rank, node, self._lost_nodes)
        if failed:
            _, rank, node, status = min(failed)
            return End(status, rank, node, self._lost_nodes)
        if srun_status == 0 and any(e[3] == EXIT_RESUME for e in self._ended):
            return End(EXIT_RESUME)
        return End(srun_status if srun_status >= 0 else 128 - srun_status, lost_nodes=self._lost_nodes)


def _task_numbers(text: str) -> list[int]:
    """`0,2-3` to [0, 2, 3]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
