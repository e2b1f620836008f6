"""Show the runs in a directory: job, state, step, loss, speed, time left, restarts, checkpoint.

    python launch/status.py runs

Reads the logs that training writes next to its checkpoints, and asks squeue (and sacct, if the site
has accounting) for the states of jobs. Without SLURM these columns are empty.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.launcher.slurm_job import STARTS, read_starts
from megatron_ft.metrics.lines import EVENTS, METRICS, read_log
from megatron_ft.printable import printable
from megatron_ft.weights.directory import iteration_directory, list_iterations

COLUMNS = ("RUN", "JOB", "STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "CHECKPOINT")
JOB_ID = "[0-9]+([_+][0-9]+)?"
TAIL_BYTES = 64 << 10  # of a metrics file, from its end


@dataclass
class Run:
    """One run's line of the table; the fields in the order of COLUMNS."""

    name: str
    job: str = ""
    state: str = ""
    step: str = ""
    loss: str = ""
    speed: str = ""
    eta: str = ""
    restarts: str = ""
    checkpoint: str = ""


def main() -> None:
    """Print the table."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=Path("."), help="directory that contains runs, or one run"
    )
    args = parser.parse_args()
    if not args.directory.is_dir():
        raise UserError(f"{args.directory} is not a directory; expected the one that contains runs")
    saves = find_runs(args.directory)
    if not saves:
        raise UserError(f"{args.directory}: no runs found (no {METRICS} up to three levels below it)")
    starts = {save: read_starts(save) for save in saves}
    states = job_states([job_of(lines[-1]) for lines in starts.values() if lines])
    rows = [COLUMNS, *(astuple(describe(save, args.directory, starts[save], states)) for save in saves)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def find_runs(directory: Path) -> list[Path]:
    """Directories that training has written to, at most three levels down."""
    found = {
        path.parent
        for depth in ("", "*/", "*/*/", "*/*/*/")
        for name in (METRICS, STARTS)
        for path in directory.glob(depth + name)
    }
    return sorted(found)


def describe(save: Path, root: Path, starts: Sequence[dict], states: dict[str, str]) -> Run:
    """The line of the run in `save`; `states` maps jobs to states. A run whose directory cannot be
    read has the reason in place of its numbers."""
    run = Run(name=printable(save.relative_to(root) if save != root else save.name))
    if starts:
        run.job = job_of(starts[-1])
        run.state = states.get(run.job, "ended")
        run.restarts = str(len(starts) - 1)
    try:
        describe_progress(run, save)
        iterations = list_iterations(save)
        if iterations:
            age = time.time() - os.stat(iteration_directory(save, iterations[0])).st_mtime
            run.checkpoint = f"{iterations[0]}, {duration(max(0, age))} ago"
    except OSError as error:
        run.checkpoint = f"cannot be read ({error.strerror})"
    return run


def describe_progress(run: Run, save: Path) -> None:
    """Fill in the step, loss, speed and time left of the run in `save`."""
    steps = read_log(save, METRICS, last_bytes=TAIL_BYTES)
    if not steps:
        return
    last = steps[-1]
    starts = [event["train_iters"] for event in read_log(save, EVENTS) if event["event"] == "start"]
    total = next((count for count in reversed(starts) if count), None)
    run.step = f"{last['iteration']}" + (f"/{total}" if total else "")
    run.loss = "" if last["loss"] is None else f"{last['loss']:.4f}"
    run.speed = f"{last['tokens_per_second']:,.0f}" if last["tokens_per_second"] else ""
    if total and last["step_seconds"]:
        recent = [step["step_seconds"] for step in steps[-20:] if step["step_seconds"]]
        left = (total - last["iteration"]) * sum(recent) / len(recent)
        run.eta = duration(left) if left > 0 else "done"


def job_of(start: dict) -> str:
    """The job of a line of starts.jsonl."""
    return printable(start["job"])


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """{job: state} of the jobs that squeue still lists, or else sacct."""
    states = dict(_lines("squeue", "--noheader", "--states=all", "--format=%i %T"))
    unknown = [job for job in jobs if job not in states and re.fullmatch(JOB_ID, job)]
    if unknown:
        states |= dict(
            _lines("sacct", "--noheader", "--allocations", "--format=JobID,State%20", f"--jobs={','.join(unknown)}")
        )
    return states


def _lines(*command: str) -> list[tuple[str, str]]:
    """The first two words of each line that a command prints; nothing if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [(words[0], printable(words[1])) for line in lines if len(words := line.split()) >= 2]


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min` or `2 d 4 h`."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


if __name__ == "__main__":
    run_program(main)
