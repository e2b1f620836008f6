"""One life of a SLURM job: check the nodes, start the ranks, and decide what their end means for the job.

saved at a warning of the time limit or of preemption    requeue, resume in the next life
ended by SIGTERM                                         SLURM requeues a preempted job itself; a cancelled one stays cancelled
a node was lost                                          requeue without it
a rank failed on healthy nodes                           end with its status and its traceback
finished                                                 end with 0
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, UserError
from megatron_ft.launcher.local_ranks import print_end_of_log, start_log
from megatron_ft.launcher.node_check import check_nodes
from megatron_ft.launcher.slurm_job import Job, max_requeues, newest_iteration, read_starts, record_start
from megatron_ft.launcher.slurm_ranks import Signals, ranks_command, ranks_environment, run_ranks, srun_command

ROLL_CALL_SECONDS = 20  # what a healthy node needs to run one small process


def supervise(job: Job, config: Config, command: Sequence[str], extra_environment: Mapping[str, str]) -> int:
    """Run this life of the job and return the status its batch script ends with."""
    if not config.checkpoint.save:
        raise UserError("--save DIR is missing: a job's checkpoints, logs and history go there")
    signals = Signals()
    save = Path(config.checkpoint.save)
    began_at = newest_iteration(save)
    _say(
        f"start {len(read_starts(save)) + 1}: job {job.id}, restart {job.restarts}, {job.num_tasks} ranks on {', '.join(job.nodes)}; "
        + (f"resumes from iteration {began_at}" if began_at else "no checkpoint yet")
    )
    if job.restarts > max_requeues():
        raise UserError(
            f"restart {job.restarts} is over MAX_REQUEUES={max_requeues()}; raise it and submit again, the run resumes from iteration {began_at}"
        )
    record_start(
        save,
        job=job.id,
        restart=job.restarts,
        nodes=list(job.nodes),
        iteration=began_at,
        log=job.fields.get("StdOut"),
    )
    if signals.end:
        return EXIT_RESUME
    bad = check_nodes(job, config)
    if bad:
        for node, reason in bad.items():
            _say(f"node {node} cannot take part: {reason}")
        return _come_back(job, exclude=list(bad))
    logs = save / "logs"
    ends = {rank: start_log(logs / f"rank-{rank:03d}.log") for rank in range(1, job.num_tasks)}
    environment = {**ranks_environment(job), **extra_environment}
    end = run_ranks(ranks_command(job, command, logs), environment, signals)
    reached = newest_iteration(save)
    if end.status == EXIT_DONE:
        _say(f"finished at iteration {reached}")
        return EXIT_DONE
    if signals.end:  # SLURM ends the job: it knows whether the job comes back
        _say(f"ended by SLURM; the newest checkpoint is of iteration {reached}")
        return EXIT_RESUME if end.status == EXIT_RESUME else end.status or EXIT_RESUME
    if end.status == EXIT_RESUME:
        if reached <= began_at:
            raise UserError(
                f"no progress: this start began at iteration {began_at} and ends there, so the job is not requeued; "
                "give it more time, or look at the log for what slows it down"
            )
        _say(f"saved at iteration {reached}")
        return _come_back(job)
    lost = sorted({*end.lost_nodes, *silent_nodes(job)})
    if lost and not signals.end:
        _say(f"node {', '.join(lost)} is lost")
        return _leave_nodes(job, lost, signals)
    if end.rank != 0 or end.status >= 128:  # rank 0's traceback stands last already
        where = "" if end.rank is None else f"rank {end.rank} on {end.node}: "
        _say(f"failed, {where}status {end.status}; the newest checkpoint is of iteration {reached}")
    if end.rank:
        print_end_of_log(end.rank, logs / f"rank-{end.rank:03d}.log", ends.get(end.rank, 0))
    return end.status


def silent_nodes(job: Job) -> list[str]:
    """Nodes of the job on which nothing can be started any more."""
    hello = srun_command(
        job,
        ["printenv", "SLURMD_NODENAME"],
        tasks_per_node=1,
        options=["--job-name=roll-call", "--overlap", "--kill-on-bad-exit=0"],
    )
    process = subprocess.Popen(
        hello, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, stdin=subprocess.DEVNULL
    )
    try:
        out, _ = process.communicate(timeout=ROLL_CALL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return [node for node in job.nodes if node not in out.split()]


def _leave_nodes(job: Job, lost: Sequence[str], signals: Signals) -> int:
    """Come back without lost nodes. SLURM requeues the job by itself once it has noticed, after its SlurmdTimeout.

    Requeueing before that is answered, in 22.05 at least, by a next life without its GPUs: the old allocation is cleaned up after the new one is made.
    """
    if job.may_requeue:
        seconds = job.slurmd_timeout() + 60
        _say(f"SLURM takes up to {seconds - 60} s to notice, and then requeues job {job.id} by itself")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if signals.end or job.has_moved_on():
                return EXIT_RESUME
            time.sleep(1)
    return _come_back(job, exclude=lost)


def _come_back(job: Job, exclude: Sequence[str] = ()) -> int:
    """Requeue within the limit. A job that SLURM is to start again must not look failed, so the status is 0 then."""
    if job.fields.get("BatchFlag") == "0":
        _say("an interactive allocation is not requeued; start the same command again, the run resumes by itself")
        return EXIT_RESUME
    if job.restarts >= max_requeues():
        raise UserError(
            f"MAX_REQUEUES={max_requeues()} is reached, so the job is not requeued; submit it again, the run resumes by itself"
        )
    _say(job.requeue(exclude))
    return EXIT_DONE


def _say(text: str) -> None:
    """One line of the launcher's own in the main log, recognisable among training's."""
    sys.stdout.flush()
    print(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)
