"""The SLURM job this program runs in: what it was given, how it comes back after a stop, and when it must not.

SLURM itself requeues a job that was preempted or lost a node. A job that stops before its time limit requeues itself, as the same job id;
where the site or `sbatch --no-requeue` forbids that, it hands itself in again as a new job.
"""

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.weights.directory import list_iterations, read_tracker

STARTS = "starts.jsonl"  # in the save directory: one line a start, read by status.py and by the limits below
DEFAULT_MAX_REQUEUES = 100


def inside_batch_job() -> bool:
    """True in a job's batch script or an `salloc` shell; not inside a step, where a person has already been given a node."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


@dataclass(frozen=True)
class Job:
    """A job as its environment and scontrol describe it."""

    id: str
    name: str
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int | None
    restarts: int
    fields: Mapping[str, str]  # of `scontrol show job`

    @property
    def num_tasks(self) -> int:
        return len(self.nodes) * self.tasks_per_node

    @property
    def may_requeue(self) -> bool:
        """False after `sbatch --no-requeue`, or where that is the site's default."""
        return self.fields.get("Requeue") != "0"

    def slurmd_timeout(self) -> int:
        """Seconds after which SLURM takes a silent node for down; its default where it does not say."""
        found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", _output("scontrol", "show", "config"), flags=re.MULTILINE)
        return int(found[1]) if found else 300

    @classmethod
    def from_environment(cls) -> "Job":
        """Raises UserError when the job's tasks do not go with its nodes and GPUs."""
        env = os.environ
        job_id = env["SLURM_JOB_ID"]
        nodes = tuple(_output("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split())
        gpus = int(env.get("SLURM_GPUS_ON_NODE") or 0)
        tasks = int(env.get("SLURM_NTASKS_PER_NODE") or 0)
        if not tasks and env.get("SLURM_NTASKS"):
            if int(env["SLURM_NTASKS"]) % len(nodes):
                raise UserError(
                    f"{env['SLURM_NTASKS']} tasks cannot be spread evenly over {len(nodes)} nodes; give sbatch --ntasks-per-node"
                )
            tasks = int(env["SLURM_NTASKS"]) // len(nodes)
        tasks = tasks or gpus or 1
        if expects_gpus() and gpus and gpus != tasks:
            raise UserError(
                f"{tasks} tasks and {gpus} GPUs a node: one task a GPU is needed; give sbatch --ntasks-per-node={gpus}"
            )
        cpus = env.get("SLURM_CPUS_PER_TASK")
        fields = _fields(_output("scontrol", "show", "job", job_id))
        restarts = int(env.get("SLURM_RESTART_COUNT") or 0) + int(env.get("MEGATRON_FT_RESUBMITTED") or 0)
        return cls(
            job_id, env.get("SLURM_JOB_NAME", job_id), nodes, tasks, int(cpus) if cpus else None, restarts, fields
        )

    def has_moved_on(self) -> bool:
        """True when SLURM has started this job anew, or has asked it to come back: on a node that was cut off, this process is a leftover."""
        now = _fields(_output("scontrol", "show", "job", self.id)).get("Restarts")
        return now is not None and int(now) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)

    def requeue(self, exclude: Sequence[str] = ()) -> str:
        """Bring this job back, not on the nodes in `exclude`; says in one line how. Raises UserError when the site refuses both ways.

        After a success SLURM ends this process with SIGTERM, and a few seconds later with SIGKILL.
        """
        if self.has_moved_on():
            return f"job {self.id} has been requeued already"
        asked = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
        if asked.returncode == 0:
            if exclude:  # only a pending job can be told, so after requeueing it
                barred = f"ExcNodeList={self._barred(exclude)}"
                subprocess.run(["scontrol", "update", f"JobId={self.id}", barred], capture_output=True)
            return f"job {self.id} is requeued" + (f" without {','.join(exclude)}" if exclude else "")
        state = _fields(_output("scontrol", "show", "job", self.id)).get("JobState", "")
        if state in ("COMPLETING", "PENDING", "REQUEUED", "PREEMPTED", "CANCELLED"):
            return f"job {self.id} is {state} already"
        command = self.resubmission(exclude)
        again = subprocess.run(command, capture_output=True, text=True, env=self._environment_to_submit())
        if again.returncode:
            raise UserError(
                f"job {self.id} can neither be requeued ({_line(asked.stderr)}) nor submitted again ({_line(again.stderr)}); "
                "submit it by hand, it resumes from its last checkpoint"
            )
        new = again.stdout.split(";")[0].strip()
        self._move_dependents(new)
        return f"requeueing is not allowed here ({_line(asked.stderr)}); submitted again as job {new}" + (
            f" without {','.join(exclude)}" if exclude else ""
        )

    def resubmission(self, exclude: Sequence[str] = ()) -> list[str]:
        """sbatch's command line for the same script, arguments and resources as a new job that waits for this one's end."""
        fields, env = self.fields, os.environ
        script, arguments = script_and_arguments(fields["Command"])
        options = {
            "dependency": f"afterany:{self.id}",
            "job-name": fields["JobName"],
            "chdir": fields["WorkDir"],
            "output": fields["StdOut"],
            "open-mode": "append",
            "partition": fields["Partition"],
            "nodes": str(len(self.nodes)),
            "ntasks-per-node": str(self.tasks_per_node),
            "cpus-per-task": str(self.cpus_per_task) if self.cpus_per_task else None,
            "gpus-per-node": env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE"),
            "time": fields["TimeLimit"],
            "account": _value(fields.get("Account")),
            "qos": _value(fields.get("QOS")),
            "constraint": _value(fields.get("Features")),
            "reservation": _value(fields.get("Reservation")),
            "exclude": self._barred(exclude),
            "export": self._export(),
        }
        given = [f"--{name}={value}" for name, value in options.items() if value]
        requeue = [] if self.may_requeue else ["--no-requeue"]
        return ["sbatch", "--parsable", *given, *requeue, script, *arguments]

    def _barred(self, exclude: Sequence[str]) -> str:
        """`exclude` and the nodes that were excluded before, by the user or by an earlier start, as SLURM writes a list."""
        return ",".join(filter(None, [_value(self.fields.get("ExcNodeList")), *exclude]))

    def _export(self) -> str | None:
        """The job's own --export, with the count of restarts added where it does not let the whole environment through."""
        export = os.environ.get("SLURM_EXPORT_ENV")
        if export is None or export.startswith("ALL"):
            return None
        count = f"MEGATRON_FT_RESUBMITTED={self.restarts + 1}"
        return count if export == "NONE" else f"{export},{count}"

    def _environment_to_submit(self) -> dict[str, str]:
        """This job's environment without what describes this job; the count of restarts goes on."""
        ours = ("SLURM_CONF", "SLURM_CLUSTERS")
        env = {k: v for k, v in os.environ.items() if k in ours or not k.startswith("SLURM_")}
        return {**env, "MEGATRON_FT_RESUBMITTED": str(self.restarts + 1)}

    def _move_dependents(self, new: str) -> None:
        """Jobs that wait for this one's success wait for its continuation instead."""
        for line in _output("squeue", "-h", "--me", "--states=PENDING", "-o", "%i %E").splitlines():
            waiting, _, dependency = line.partition(" ")
            if f"afterok:{self.id}" in dependency:
                subprocess.run(
                    ["scontrol", "update", f"JobId={waiting}", f"Dependency=afterok:{new}"], capture_output=True
                )


def script_and_arguments(command: str) -> tuple[str, list[str]]:
    """Take scontrol's `Command`, a path and arguments joined by spaces, apart: the shortest beginning that is a file is the script.

    Arguments that had spaces of their own cannot be told apart there, so the scripts keep theirs in MEGATRON_FT_ARGUMENTS.
    """
    words = command.split(" ")
    for end in range(1, len(words) + 1):
        path = " ".join(words[:end])
        if Path(path).is_file():
            kept = os.environ.get("MEGATRON_FT_ARGUMENTS")
            return path, shlex.split(kept) if kept is not None else words[end:]
    raise UserError(f"the job's script {command} is gone; submit it by hand, the run resumes from its last checkpoint")


def expects_gpus() -> bool:
    """False where cluster.env says GPUS_PER_NODE=0: ranks then run on the CPU, whatever the job was given."""
    return os.environ.get("GPUS_PER_NODE") != "0"


def newest_iteration(save: Path) -> int:
    """Iteration of the newest checkpoint in `save`, of either engine; 0 when there is none."""
    tracker = read_tracker(save) or ""
    return max([0, *list_iterations(save)[:1], *([int(tracker)] if tracker.isdigit() else [])])


def record_start(save: Path, **facts) -> None:
    """Append one start to the run's history."""
    save.mkdir(parents=True, exist_ok=True)
    with open(save / STARTS, "a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}) + "\n")


def read_starts(save: Path) -> list[dict]:
    """All starts of the run in `save`, oldest first."""
    path = save / STARTS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def max_requeues() -> int:
    """The site's or the user's MAX_REQUEUES."""
    text = os.environ.get("MAX_REQUEUES") or str(DEFAULT_MAX_REQUEUES)
    if not text.isdigit():
        raise UserError(f"MAX_REQUEUES={text}: expected a number of restarts, like {DEFAULT_MAX_REQUEUES}")
    return int(text)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {_line(done.stderr)}")
    return done.stdout


def _fields(shown: str) -> dict[str, str]:
    """scontrol's `Key=value` pairs; those whose value may hold spaces stand on lines of their own."""
    fields = {}
    for line in shown.splitlines():
        line = line.strip()
        whole = line.split("=", 1)[0] in ("Command", "WorkDir", "StdOut", "StdErr", "JobId") and "=" in line
        if line.startswith("JobId="):
            job, _, name = line.partition(" JobName=")
            fields.update(JobId=job.removeprefix("JobId="), JobName=name)
        elif whole:
            key, value = line.split("=", 1)
            fields[key] = value
        else:
            fields.update(word.split("=", 1) for word in line.split() if "=" in word)
    return fields


def _value(text: str | None) -> str | None:
    return None if text in (None, "(null)", "N/A", "") else text


def _line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
