"""What srun starts for each task: becomes the training process of that rank, with its name, its log and its signals in order.

    srun ... python launch/rank.py LOGDIR COMMAND...

Rank 0 writes to srun's output, the others append to LOGDIR/rank-NNN.log. Signals are handed on to training: with proctrack/cgroup SLURM signals
a task's first process alone, with proctrack/pgid all of them, and two of a kind do no harm. Until training has its handlers, SIGUSR1 and SIGUSR2 are
ignored instead of killing it; the launcher repeats them. How the rank ended is said in one
line on stderr (`ended` below), for the launcher; a rank that has saved and wants to be resumed ends well for srun, so that --kill-on-bad-exit
does not end the ranks that are a moment slower.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXIT_RESUME = 75  # megatron_ft.errors'; this file imports nothing that a node could lack


def ended(rank: int, node: str, status: int) -> str:
    """The line that tells the launcher how a rank ended, and when."""
    return f"rank-ended rank={rank} node={node} status={status} time={time.time():.3f}"


def main() -> int:
    logs, command = Path(sys.argv[1]), sys.argv[2:]
    rank, local_rank = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_LOCALID"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=str(
            local_rank if visible.count(",") or not visible else 0
        ),  # a site that binds tasks shows each one GPU
        LOCAL_WORLD_SIZE=os.environ["MEGATRON_FT_RANKS_ON_NODE"],
    )
    messages = os.dup(2)
    if rank:
        logs.mkdir(parents=True, exist_ok=True)
        log = os.open(logs / f"rank-{rank:03d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        print(
            f"=== job {os.environ['SLURM_JOB_ID']}, rank {rank} on {os.environ['SLURMD_NODENAME']}, {when}", flush=True
        )
    else:
        os.dup2(1, 2)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what training inherits
    training = subprocess.Popen(command)
    stop_signal = int(
        os.environ.get("MEGATRON_FT_STOP_SIGNAL", "0")
    )  # for an engine that saves at one signal only, and then ends with 0
    stopped = []

    def hand_on(number: int, frame) -> None:
        stopped.append(number)
        training.send_signal(stop_signal or number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, hand_on)
    status = training.wait()
    if stop_signal and stopped and status == 0:
        status = EXIT_RESUME
    status = 128 - status if status < 0 else status
    os.write(messages, (ended(rank, os.environ["SLURMD_NODENAME"], status) + "\n").encode())
    return 0 if status == EXIT_RESUME else status


if __name__ == "__main__":
    sys.exit(main())
