"""What srun starts for each task: sets up the rank's variables, log and signals, and runs training.

    srun ... python launch/rank.py LOGDIR COMMAND...

Rank 0 writes to srun's output, the others append to LOGDIR/rank-NNN.log. Signals are forwarded to
training, since SLURM with proctrack/cgroup signals only the first process of a task. With
proctrack/pgid it signals all of them; receiving a signal twice is harmless. Until training has
installed its handlers, SIGUSR1 and SIGUSR2 are ignored instead of killing it; the launcher repeats
them.

One line on stderr tells the launcher how the rank ended (`rank_ended`). For srun, a rank that saved
in order to be resumed ends with 0, so that --kill-on-bad-exit does not end slower ranks.

This file runs on every node before anything is known about it, and imports only the standard
library.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXIT_RESUME = 75  # as in megatron_ft/errors.py


def rank_ended(rank: int, node: str, status: int) -> str:
    """The line that launcher/slurm_ranks.py reads; the time is in seconds since the epoch."""
    return f"rank-ended rank={rank} node={node} status={status} time={time.time():.3f}"


def set_variables(rank: int) -> None:
    """Name the rank in torchrun's variables."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    one_gpu_visible = visible and "," not in visible  # the site binds tasks: the rank's GPU is number 0
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK="0" if one_gpu_visible else str(int(os.environ["SLURM_LOCALID"])),
        LOCAL_WORLD_SIZE=os.environ["MEGATRON_FT_RANKS_ON_NODE"],
    )


def redirect_output(rank: int, node: str, logs: Path) -> None:
    """Send stdout and stderr to the rank's log; for rank 0, stderr to stdout."""
    if rank == 0:
        os.dup2(1, 2)
        return
    logs.mkdir(parents=True, exist_ok=True)
    log = os.open(logs / f"rank-{rank:03d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"=== job {os.environ['SLURM_JOB_ID']}, rank {rank} on {node}, {when}", flush=True)


def run_training(command: list[str]) -> int:
    """Run training, forwarding signals; its exit status, 128 + N if signal N ended it.

    MEGATRON_FT_STOP_SIGNAL is set for an engine that saves only at that signal and then ends with
    0: it is sent in place of any other, and the status is then EXIT_RESUME.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # inherited by training
    training = subprocess.Popen(command)
    stop_signal = int(os.environ.get("MEGATRON_FT_STOP_SIGNAL", "0"))
    forwarded = []

    def forward(number: int, frame: object) -> None:
        forwarded.append(number)
        training.send_signal(stop_signal or number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    status = training.wait()
    if stop_signal and forwarded and status == 0:
        return EXIT_RESUME
    return 128 - status if status < 0 else status


def main() -> int:
    """Become one rank; the status for srun."""
    logs, command = Path(sys.argv[1]), sys.argv[2:]
    rank, node = int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
    set_variables(rank)
    launcher = os.dup(2)
    redirect_output(rank, node, logs)
    status = run_training(command)
    os.write(launcher, (rank_ended(rank, node, status) + "\n").encode())
    return 0 if status == EXIT_RESUME else status


if __name__ == "__main__":
    sys.exit(main())
