"""One run of a SLURM job: check the nodes, start the ranks, and decide what follows when they end.

What happened, first match                      What the job does
every rank reported that it finished            end with 0
SLURM ends the job with SIGTERM                 end: SLURM requeues a preempted job by itself, and a
                                                canceled one stays canceled
saved after a warning, nothing new              end with an error: it would loop
saved after a warning, before a time limit      requeue; the next run of the job resumes
    or a preemption
a node is lost                                  requeue without it
a rank failed on responsive nodes               end with its status, its traceback last in the log
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, UserError
from megatron_ft.launcher.local_ranks import RankLog
from megatron_ft.launcher.node_check import check_nodes
from megatron_ft.launcher.slurm_job import (
    STARTS,
    Job,
    max_requeues,
    newest_iteration,
    read_starts,
    record_start,
    start_slurm,
)
from megatron_ft.launcher.slurm_ranks import (
    RankExit,
    Signals,
    log_line,
    ranks_command,
    ranks_environment,
    run_ranks,
    srun_command,
)

PROBE_SECONDS = 20  # a healthy node starts one small process within that time


def supervise(
    job: Job,
    config: Config,
    command: Sequence[str],
    extra_environment: Mapping[str, str],
    check_inputs: Callable[[], object] = lambda: None,
) -> int:
    """Run the ranks once and return the exit status of the batch script. Raises UserError.

    `command` is that of one rank; `extra_environment` is added to the environment of all ranks.
    `check_inputs` is called once the nodes are known to see the files: for jobs that were submitted
    without launch/submit.py.
    """
    if not config.checkpoint.save:
        raise UserError("--save DIR is missing: a job's checkpoints, logs and history are written there")
    signals = Signals()
    save = Path(config.checkpoint.save)
    began_at = newest_iteration(save)
    _announce(job, save, began_at)
    try:
        unusable = {} if signals.end else check_nodes(job, config)
    except UserError:
        if not signals.end:  # otherwise SLURM has ended the check as well
            raise
    if signals.end:
        log_line(f"ended by SLURM before its ranks started; the newest checkpoint is of iteration {began_at}")
        return EXIT_RESUME
    if unusable:
        for node, reason in unusable.items():
            log_line(f"node {node} cannot take part: {reason}")
        return _requeue(job, exclude=list(unusable))
    check_inputs()
    logs = save / "logs"
    rank_logs = [RankLog.prepare(rank, logs) for rank in range(job.num_tasks)]
    environment = {**ranks_environment(job), **extra_environment}
    end = run_ranks(ranks_command(job, command, logs), environment, signals, job.num_tasks)
    return _follow_up(job, end, signals, began_at, newest_iteration(save), rank_logs)


def _announce(job: Job, save: Path, began_at: int) -> None:
    """Log and record this run of the job. Raises UserError above MAX_REQUEUES."""
    log_line(
        f"start {len(read_starts(save)) + 1}: job {job.id}, restart {job.restarts}, {job.num_tasks} ranks on "
        f"{', '.join(job.nodes)}; " + (f"resumes from iteration {began_at}" if began_at else "no checkpoint yet")
    )
    if job.restarts > max_requeues():
        raise UserError(
            f"restart {job.restarts} exceeds MAX_REQUEUES={max_requeues()}; raise it and submit the job again, "
            f"the run resumes from iteration {began_at}"
        )
    try:
        record_start(
            save,
            job=job.id,
            restart=job.restarts,
            nodes=list(job.nodes),
            iteration=began_at,
            log=job.fields.get("StdOut"),
        )
    except OSError as error:
        log_line(f"warning: {save / STARTS}: {error.strerror}; launch/status.py will not show this start")


def _follow_up(
    job: Job, end: RankExit, signals: Signals, began_at: int, reached: int, rank_logs: Sequence[RankLog]
) -> int:
    """The table above; returns the exit status of the batch script.

    `began_at` and `reached` are the iterations of the newest checkpoint before and after.
    """
    if end.status == EXIT_DONE and (end.all_done or not signals.end):
        log_line(f"finished at iteration {reached}")
        return EXIT_DONE
    if signals.end:
        log_line(f"ended by SLURM; the newest checkpoint is of iteration {reached}")
        return end.status or EXIT_RESUME  # srun ends with 0 if SLURM canceled its step before the ranks started
    if end.status == EXIT_RESUME and reached <= began_at:
        raise UserError(
            f"no progress: this run of the job began at iteration {began_at} and ends there, so it is not requeued; "
            "give it more time, or look in the log for what slows it down"
        )
    if end.status == EXIT_RESUME:
        log_line(f"saved at iteration {reached}")
        return _requeue(job)
    lost = sorted({*end.lost_nodes, *unresponsive_nodes(job)})
    if lost and not signals.end:
        log_line(f"node {', '.join(lost)} is lost")
        return _requeue_without(job, lost, signals)
    if end.rank != 0 or end.status >= 128:  # otherwise the traceback of rank 0 already ends the log
        where = "" if end.rank is None else f"rank {end.rank} on {end.node}: "
        log_line(f"failed, {where}status {end.status}; the newest checkpoint is of iteration {reached}")
    if end.rank:
        rank_logs[end.rank].print_end()
    return end.status


def unresponsive_nodes(job: Job) -> list[str]:
    """Nodes of the job on which a probe, one small process, cannot be started."""
    probe = srun_command(
        job,
        ["printenv", "SLURMD_NODENAME"],
        tasks_per_node=1,
        options=["--job-name=probe", "--overlap", "--kill-on-bad-exit=0"],
    )
    process = start_slurm(probe, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace")
    try:
        out, _ = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return [node for node in job.nodes if node not in out.split()]


def _requeue_without(job: Job, lost: Sequence[str], signals: Signals) -> int:
    """Requeue without lost nodes, giving SLURM the time to do so itself (its SlurmdTimeout).

    If the job requeues itself earlier, SLURM, at least 22.05, starts it without its GPUs: the old
    allocation is cleaned up after the new one is made.
    """
    if job.may_requeue:
        seconds = job.slurmd_timeout()
        log_line(f"SLURM takes up to {seconds} s to notice, and then requeues job {job.id} by itself")
        deadline = time.monotonic() + seconds + 60
        while time.monotonic() < deadline:
            if signals.end or job.was_requeued():
                return EXIT_RESUME
            time.sleep(1)
    return _requeue(job, exclude=lost)


def _requeue(job: Job, exclude: Sequence[str] = ()) -> int:
    """Requeue within MAX_REQUEUES; the status is 0, since a requeued job must not look failed."""
    if job.fields.get("BatchFlag") == "0":
        log_line("an interactive allocation is not requeued; run the same command again to resume")
        return EXIT_RESUME
    if job.restarts >= max_requeues():
        raise UserError(
            f"MAX_REQUEUES={max_requeues()} is reached, so the job is not requeued; submit it again to resume the run"
        )
    log_line(job.requeue(exclude))
    return EXIT_DONE
