"""The runs under a directory at a glance: job and state, step, loss, speed, time left, restarts, age of the last checkpoint.

    python launch/status.py runs

Reads what training writes beside its checkpoints, and asks squeue (and sacct, where the site keeps accounts) for the jobs. Without SLURM the job columns stay empty.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others' of the same name

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.log_lines import read_lines
from megatron_ft.launcher.slurm_job import STARTS, read_starts
from megatron_ft.weights.directory import iteration_directory, list_iterations

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
COLUMNS = ("RUN", "JOB", "STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "CHECKPOINT")
TAIL_BYTES = 64 << 10  # the last lines of a long log are enough


@dataclass
class Run:
    """One run's row, as text."""

    name: str
    job: str = ""
    state: str = ""
    step: str = ""
    loss: str = ""
    speed: str = ""
    eta: str = ""
    restarts: str = ""
    checkpoint: str = ""

    def row(self) -> tuple[str, ...]:
        return (
            self.name,
            self.job,
            self.state,
            self.step,
            self.loss,
            self.speed,
            self.eta,
            self.restarts,
            self.checkpoint,
        )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=Path("."), help="directory with runs in it, or one run"
    )
    args = parser.parse_args()
    if not args.directory.is_dir():
        raise UserError(f"{args.directory} is no directory; expected the one that runs are saved under")
    saves = find_runs(args.directory)
    if not saves:
        raise UserError(f"{args.directory}: no runs found (no {METRICS} in it or up to three levels below)")
    starts = {save: read_starts(save) for save in saves}
    states = job_states([str(start["job"]) for lines in starts.values() for start in lines[-1:]])
    rows = [COLUMNS, *(describe(save, args.directory, starts[save], states).row() for save in saves)]
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
    """What the files of one run say."""
    run = Run(name=str(save.relative_to(root)) if save != root else save.name)
    total = next((e["train_iters"] for e in reversed(read_lines(save / EVENTS)) if e["event"] == "start"), None)
    if starts:
        run.job = str(starts[-1]["job"])
        run.state = states.get(run.job, "ended")
        run.restarts = str(len(starts) - 1)
    steps = last_steps(save / METRICS)
    if steps:
        last = steps[-1]
        run.step = f"{last['iteration']}" + (f"/{total}" if total else "")
        run.loss = "" if last.get("loss") is None else f"{last['loss']:.4f}"
        run.speed = f"{last['tokens_per_second']:,.0f}" if last.get("tokens_per_second") else ""
        if total and last.get("step_seconds"):
            recent = [step["step_seconds"] for step in steps[-20:] if step.get("step_seconds")]
            left = (total - last["iteration"]) * sum(recent) / len(recent)
            run.eta = duration(left) if left > 0 else "done"
    iterations = list_iterations(save)
    if iterations:
        age = time.time() - os.stat(iteration_directory(save, iterations[0])).st_mtime
        run.checkpoint = f"{iterations[0]}, {duration(age)} ago"
    return run


def last_steps(path: Path) -> list[dict]:
    """The last lines of a metrics file; a half-written one is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """State of each job that squeue, or else sacct, still knows."""
    states = dict(_lines("squeue", "--noheader", "--states=all", "--format=%i %T"))
    unknown = [job for job in jobs if job not in states]
    if unknown:
        states |= dict(
            _lines("sacct", "--noheader", "--allocations", "--format=JobID,State%20", f"--jobs={','.join(unknown)}")
        )
    return states


def _lines(*command: str) -> list[tuple[str, str]]:
    """First two words of each line a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return (
        [(words[0], words[1]) for line in done.stdout.splitlines() if len(words := line.split()) >= 2]
        if done.returncode == 0
        else []
    )


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
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
