"""The SLURM job that this process runs in: its resources, and how it is requeued after a stop.

SLURM itself requeues a job that was preempted or lost a node. A job that stops before its time
limit requeues itself, under the same job id; where the site or `sbatch --no-requeue` forbids that,
it resubmits itself as a new job.
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
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.log_lines import read_lines
from megatron_ft.weights.directory import list_iterations, parse_iteration, read_tracker

# In the save directory: one line per run of the job, read by launch/status.py.
STARTS = "starts.jsonl"
DEFAULT_MAX_REQUEUES = 100


def inside_batch_job() -> bool:
    """True in a job's batch script or an `salloc` shell, where srun can start steps on all nodes.

    False inside a step, such as `srun --pty bash`, which has its nodes already.
    """
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


@dataclass(frozen=True)
class Job:
    """A job as its environment and scontrol describe it.

    `restarts` includes resubmissions; `fields` are those of `scontrol show job`.
    """

    id: str
    name: str
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int | None
    restarts: int
    fields: Mapping[str, str]

    @property
    def num_tasks(self) -> int:
        """Ranks on all nodes."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def may_requeue(self) -> bool:
        """False after `sbatch --no-requeue`, or where that is the site's default."""
        return self.fields.get("Requeue") != "0"

    def slurmd_timeout(self) -> int:
        """Seconds until SLURM marks an unresponsive node as down (300, its default, if unknown)."""
        found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", _output("scontrol", "show", "config"), flags=re.MULTILINE)
        return int(found[1]) if found else 300

    @classmethod
    def from_environment(cls) -> "Job":
        """The job of this process. Raises UserError if its tasks do not fit its nodes and GPUs."""
        job_id = os.environ["SLURM_JOB_ID"]
        if not re.fullmatch("[0-9]+", job_id) or not os.environ.get("SLURM_JOB_NODELIST"):
            raise UserError(
                f"SLURM_JOB_ID={job_id} is set, but not by SLURM: the id is not a number, or SLURM_JOB_NODELIST is missing; "
                "unset SLURM_JOB_ID, or give --num-processes N"
            )
        nodes = tuple(_output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split())
        if not nodes:
            raise UserError(f"SLURM_JOB_NODELIST={os.environ['SLURM_JOB_NODELIST']} names no node; unset SLURM_JOB_ID")
        gpus = _number("SLURM_GPUS_ON_NODE")
        tasks, all_tasks = _number("SLURM_NTASKS_PER_NODE"), _number("SLURM_NTASKS")
        if not tasks and all_tasks:
            if all_tasks % len(nodes):
                raise UserError(
                    f"{all_tasks} tasks cannot be spread evenly over {len(nodes)} nodes; give sbatch --ntasks-per-node"
                )
            tasks = all_tasks // len(nodes)
        tasks = tasks or gpus or 1
        if expects_gpus() and gpus and gpus != tasks:
            raise UserError(
                f"{tasks} tasks and {gpus} GPUs per node: one task per GPU is needed; "
                f"give sbatch --ntasks-per-node={gpus}"
            )
        fields = parse_fields(_output("scontrol", "show", "job", job_id))
        return cls(
            id=job_id,
            name=os.environ.get("SLURM_JOB_NAME", job_id),
            nodes=nodes,
            tasks_per_node=tasks,
            cpus_per_task=_number("SLURM_CPUS_PER_TASK") or None,
            restarts=_number("SLURM_RESTART_COUNT") + _number("MEGATRON_FT_RESUBMITTED"),
            fields=fields,
        )

    def was_requeued(self) -> bool:
        """True once SLURM has requeued this job.

        This process, on a node that lost contact, is then stale.
        """
        now = parse_fields(_output("scontrol", "show", "job", self.id)).get("Restarts")
        return now is not None and now.isdecimal() and int(now) > _number("SLURM_RESTART_COUNT")

    def requeue(self, exclude: Sequence[str] = ()) -> str:
        """Requeue this job without the nodes in `exclude`, or resubmit it.

        Returns a line for the log. Raises UserError if the site refuses both. After a success,
        SLURM ends this process with SIGTERM, and a few seconds later with SIGKILL.
        """
        if self.was_requeued():
            return f"job {self.id} was already requeued"
        asked = run_slurm("scontrol", "requeue", self.id)
        if asked.returncode == 0:
            if exclude:  # only a pending job can be updated, hence after the requeue
                excluded = f"ExcNodeList={self._excluded(exclude)}"
                run_slurm("scontrol", "update", f"JobId={self.id}", excluded)
            return f"job {self.id} is requeued" + (f" without {','.join(exclude)}" if exclude else "")
        state = parse_fields(_output("scontrol", "show", "job", self.id)).get("JobState", "")
        if state in ("COMPLETING", "PENDING", "REQUEUED", "PREEMPTED", "CANCELLED"):
            return f"job {self.id} is already {state}"
        command = self.resubmission(exclude)
        again = run_slurm(*command, env=self._environment_to_submit())
        if again.returncode:
            raise UserError(
                f"job {self.id} can neither be requeued ({_line(asked.stderr)}) nor resubmitted "
                f"({_line(again.stderr)}); submit it yourself, it resumes from its last checkpoint"
            )
        new = again.stdout.split(";")[0].strip()
        self._move_dependents(new)
        without = f" without {','.join(exclude)}" if exclude else ""
        return f"requeueing is not allowed ({_line(asked.stderr)}); resubmitted as job {new}{without}"

    def resubmission(self, exclude: Sequence[str] = ()) -> list[str]:
        """sbatch's command line for a new job with the same script, arguments and resources.

        The new job waits until this one has ended.
        """
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
            "exclude": self._excluded(exclude),
            "export": self._export(),
        }
        given = [f"--{name}={value}" for name, value in options.items() if value]
        requeue = [] if self.may_requeue else ["--no-requeue"]
        return ["sbatch", "--parsable", *given, *requeue, script, *arguments]

    def _excluded(self, exclude: Sequence[str]) -> str:
        """`exclude` and nodes excluded before, by the user or an earlier run, as SLURM's list."""
        return ",".join(filter(None, [_value(self.fields.get("ExcNodeList")), *exclude]))

    def _export(self) -> str | None:
        """The job's own --export with the count of restarts; None if it exports everything."""
        export = os.environ.get("SLURM_EXPORT_ENV")
        if export is None or export.startswith("ALL"):
            return None
        count = f"MEGATRON_FT_RESUBMITTED={self.restarts + 1}"
        return count if export == "NONE" else f"{export},{count}"

    def _environment_to_submit(self) -> dict[str, str]:
        """This environment, with a raised count of restarts and nothing that describes this job."""
        of_the_cluster = ("SLURM_CONF", "SLURM_CLUSTERS")
        env = {k: v for k, v in os.environ.items() if k in of_the_cluster or not k.startswith("SLURM_")}
        return {**env, "MEGATRON_FT_RESUBMITTED": str(self.restarts + 1)}

    def _move_dependents(self, new: str) -> None:
        """Make jobs that wait for the success of this one wait for the job `new` instead."""
        for line in _output("squeue", "-h", "--me", "--states=PENDING", "-o", "%i %E").splitlines():
            waiting, _, dependency = line.partition(" ")
            if f"afterok:{self.id}" in dependency:
                run_slurm("scontrol", "update", f"JobId={waiting}", f"Dependency=afterok:{new}")


def script_and_arguments(command: str) -> tuple[str, list[str]]:
    """Split scontrol's `Command`, a path and arguments joined by spaces.

    The script is the shortest prefix that names a file. Arguments that contain spaces cannot be
    recovered from it, so the scripts export theirs in MEGATRON_FT_ARGUMENTS. Raises UserError.
    """
    words = command.split(" ")
    for end in range(1, len(words) + 1):
        path = " ".join(words[:end])
        if Path(path).is_file():
            kept = os.environ.get("MEGATRON_FT_ARGUMENTS")
            return path, shlex.split(kept) if kept is not None else words[end:]
    raise UserError(
        f"the job's script no longer exists: {command}; submit one yourself, the run resumes from its last checkpoint"
    )


def expects_gpus() -> bool:
    """False if cluster.env sets GPUS_PER_NODE=0: ranks run on the CPU even in a job with GPUs."""
    return os.environ.get("GPUS_PER_NODE") != "0"


def newest_iteration(save: Path) -> int:
    """Iteration of the newest checkpoint in `save`, of either engine; 0 if there is none."""
    tracker = read_tracker(save) or ""
    return max([0, *list_iterations(save)[:1], parse_iteration(tracker) or 0])


def record_start(save: Path, **facts: Any) -> None:
    """Append a start, with these facts about it, to the run's history. Raises OSError."""
    save.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}).encode() + b"\n"
    with open(save / STARTS, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that a crash or a full disk truncated
                line = b"\n" + line
        file.write(line)


def read_starts(save: Path) -> list[dict[str, Any]]:
    """All starts of the run in `save`, oldest first, without damaged lines; [] if the file cannot
    be read. Each has a "job"."""
    try:
        return read_lines(save / STARTS, {"job": str})
    except OSError:
        return []


def max_requeues() -> int:
    """MAX_REQUEUES, as set by the site or the user. Raises UserError."""
    text = os.environ.get("MAX_REQUEUES") or str(DEFAULT_MAX_REQUEUES)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"MAX_REQUEUES={text}: expected a number of restarts, like {DEFAULT_MAX_REQUEUES}")
    return int(text)


def _output(*command: str) -> str:
    done = run_slurm(*command)
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {_line(done.stderr)}")
    return done.stdout


def run_slurm(*command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's programs; its output as text. Raises UserError if it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)
    except OSError as error:
        raise not_started(command[0], error) from error


def start_slurm(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """As subprocess.Popen without stdin; UserError if the program cannot be started."""
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    except OSError as error:
        raise not_started(command[0], error) from error


def not_started(program: str, error: OSError) -> UserError:
    """The error for one of SLURM's programs that cannot be started."""
    return UserError(
        f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID', '')} is set, but {program} cannot be started ({error.strerror}): "
        "add SLURM's programs to PATH, or give --num-processes N (or unset SLURM_JOB_ID) to train on this machine only"
    )


def parse_fields(shown: str) -> dict[str, str]:
    """scontrol's `Key=value` pairs. Values that may contain spaces are on lines of their own."""
    fields: dict[str, str] = {}
    for line in shown.splitlines():
        line = line.strip()
        key, equals, value = line.partition("=")
        if key == "JobId":
            job, _, name = line.partition(" JobName=")
            fields.update(JobId=job.removeprefix("JobId="), JobName=name)
        elif equals and key in ("Command", "WorkDir", "StdOut", "StdErr"):
            fields[key] = value
        else:
            pairs = (word.partition("=") for word in line.split() if "=" in word)
            fields.update({key: value for key, _, value in pairs})
    return fields


def _number(name: str) -> int:
    """A number in the environment, 0 if it is not set. Raises UserError."""
    text = os.environ.get(name) or "0"
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name}={text}: expected a number; it is set by SLURM, unset it outside of a job")
    return int(text)


def _value(text: str | None) -> str | None:
    return None if text in (None, "(null)", "N/A", "") else text


def _line(text: str) -> str:
    return " ".join(text.split()) or "no reason given"
