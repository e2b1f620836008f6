"""Check the nodes of a job before its ranks start, one process per node.

Each must see the data, the weights and the save directory, have usable GPUs, enough free disk space
and the same software as the others.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.data.splits import prefixes_of
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import free_bytes
from megatron_ft.files.json_file import require
from megatron_ft.files.log_lines import parse_log_line
from megatron_ft.launcher.command import PROGRAMS, ROOT, local_gpus, training_python
from megatron_ft.launcher.slurm_job import Job, expects_gpus, start_slurm
from megatron_ft.launcher.slurm_ranks import srun_command
from megatron_ft.model.cost import checkpoint_bytes
from megatron_ft.model.shape import padded_vocab_size

SECONDS = 90  # a node that has not answered by then is unresponsive
TORCH_SECONDS = 60  # of these, for the training program's Python to import torch
PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class NodeReport:
    """What launch/preflight.py finds on one node."""

    node: str
    problems: list[str]
    software: str  # versions and a digest of the checkout, to compare nodes

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "NodeReport | None":
        """The report on a line of srun's output; None for other text, such as a site's greeting."""
        record = parse_log_line(line + "\n")
        if record is None:
            return None
        try:
            return cls(
                require(record, "node", str, "report"),
                require(record, "problems", list, "report", of=str),
                require(record, "software", str, "report"),
            )
        except UserError:
            return None


def check_nodes(job: Job, config: Config) -> dict[str, str]:
    """Nodes that cannot take part, each with the reason.

    Raises UserError if no node can: then no single node is at fault.
    """
    command = [sys.executable, "-P", str(PROGRAMS / "launch" / "preflight.py")]
    command += ["--gpus", str(job.tasks_per_node if expects_gpus() else 0)]
    command += ["--need-gb", f"{checkpoint_gigabytes(config):.3f}"]
    command += ["--save", config.checkpoint.save] if config.checkpoint.save else []
    command += needed_files(config)
    srun = srun_command(job, command, tasks_per_node=1, options=["--job-name=preflight", "--kill-on-bad-exit=0"])
    process = start_slurm(srun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    reports = [report for line in out.splitlines() if (report := NodeReport.from_json(line))]
    return _unusable_nodes(job.nodes, {report.node: report for report in reports}, err)


def _unusable_nodes(nodes: Sequence[str], reports: dict[str, NodeReport], err: str) -> dict[str, str]:
    """What `check_nodes` returns; `err` is what srun wrote to stderr."""
    unusable = {node: "does not answer" for node in nodes if node not in reports}
    for node in unusable:
        messages = [line.split(": ", 2)[-1] for line in err.splitlines() if node in line and "error" in line]
        unusable[node] += f" ({messages[0]})" if messages else ""
    unusable.update({node: "; ".join(report.problems) for node, report in reports.items() if report.problems})
    software = Counter(report.software for report in reports.values())
    for node, report in reports.items():
        usual = software.most_common(1)[0][0]
        if report.software != usual and node not in unusable:
            unusable[node] = f"other software than the rest: {report.software}, the rest have {usual}"
    if len(unusable) == len(nodes):
        node, reason = next(iter(unusable.items()))
        cause = f" ({err.strip().splitlines()[-1]})" if not reports and err.strip() else ""
        raise UserError(f"no node of the job can run this; {node}: {reason}{cause}")
    return unusable


def needed_files(config: Config) -> list[str]:
    """Absolute paths that every node must see: data, tokenizer, weights to start from."""
    data = [
        f"{prefix}_{side}_document.{suffix}"
        for prefix in prefixes_of(config)
        for side in ("inputs", "targets")
        for suffix in ("bin", "idx")
    ]
    return [
        os.path.abspath(path)
        for path in [*data, config.data.tokenizer_file, *([config.checkpoint.load] if config.checkpoint.load else [])]
    ]


def checkpoint_gigabytes(config: Config) -> float:
    """Size of one checkpoint in GB (10^9 bytes); 0 with --skip-train."""
    if config.shape is None or config.validation.skip_train:
        return 0.0
    padded = padded_vocab_size(
        config.shape.vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor
    )
    return checkpoint_bytes(config.shape, padded, config.layout()) / 1e9


def check_this_node(save: Path | None, files: Sequence[Path], gpus: int, need_gb: float) -> NodeReport:
    """Check this node: `gpus` GPUs, readable `files`, `need_gb` GB free in `save`."""
    problems = [f"{path} not found" for path in files if not path.exists()]
    problems += [f"{path} cannot be read" for path in files if path.exists() and not os.access(path, os.R_OK)]
    found = local_gpus()
    if found < gpus:
        problems.append(f"{found} usable GPUs, {gpus} needed (cluster.env: GPUS_PER_NODE=0 for a run on the CPU)")
    elif gpus:
        problems += _torch_problems(gpus)
    if save:
        free = free_bytes(save) / 1e9
        existing = next(path for path in (save, *save.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK):
            problems.append(f"--save {save}: {existing} cannot be written")
        if free < need_gb:
            problems.append(f"--save {save}: {free:.1f} GB free, one checkpoint takes {need_gb:.1f} GB")
    return NodeReport(
        node=os.environ.get("SLURMD_NODENAME", platform.node()),
        problems=problems,
        software=f"Python {platform.python_version()}, {_versions()}, checkout {_source_digest()}",
    )


def _torch_problems(gpus: int) -> list[str]:
    """Why the training program's torch cannot use `gpus` GPUs.

    Nothing if it does not answer in time: each rank checks again.
    """
    python = training_python()
    count = [*python, "-c", "import torch; print('GPUS', torch.cuda.device_count())"]
    try:
        done = subprocess.run(
            count,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TORCH_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return []
    except OSError as error:
        return [f"{python[0]} cannot be started: {error.strerror}"]
    counted = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("GPUS ")]
    if not counted:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"{shlex.join(python)} cannot import torch: {reason}"]
    if counted[-1] < gpus:
        causes = "a build without CUDA, an old driver, or a container without --nv"
        return [f"torch can use {counted[-1]} GPUs, {gpus} needed ({causes})"]
    return []


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _source_digest() -> str:
    """Short digest of the package's Python files, which tells a node with an old checkout."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "megatron_ft").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
