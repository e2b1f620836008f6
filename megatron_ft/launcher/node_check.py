"""Check the nodes of a job before a run starts on them: data and checkpoints visible, the same software everywhere, GPUs usable, disk space free."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import free_bytes
from megatron_ft.launcher.command import ROOT, local_gpus, training_python
from megatron_ft.launcher.slurm_job import Job, expects_gpus
from megatron_ft.launcher.slurm_ranks import srun_command
from megatron_ft.model.cost import checkpoint_bytes
from megatron_ft.model.shape import padded_vocab_size

SECONDS = 90  # a node that has not answered by then counts as lost
TORCH_SECONDS = 60  # of these, for starting the training program's Python
PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine")


def check_nodes(job: Job, config: Config) -> dict[str, str]:
    """Nodes that cannot take part, each with the reason. Raises UserError when none can: then the cause is not a node."""
    command = [
        sys.executable, "-P", str(ROOT / "launch" / "preflight.py"),
        "--gpus", str(job.tasks_per_node if expects_gpus() else 0), "--need-gb", f"{checkpoint_gigabytes(config):.3f}",
        *(["--save", config.checkpoint.save] if config.checkpoint.save else []), *needed_files(config),
    ]  # fmt: skip
    srun = srun_command(job, command, tasks_per_node=1, options=["--job-name=preflight", "--kill-on-bad-exit=0"])
    process = subprocess.Popen(
        srun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    seen = {
        found["node"]: found for found in map(json.loads, filter(lambda line: line.startswith("{"), out.splitlines()))
    }
    bad = {node: "does not answer" for node in job.nodes if node not in seen}
    for node in bad:
        said = [line.split(": ", 2)[-1] for line in err.splitlines() if node in line and "error" in line]
        bad[node] += f" ({said[0]})" if said else ""
    bad.update({node: "; ".join(found["problems"]) for node, found in seen.items() if found["problems"]})
    software = Counter(found["software"] for found in seen.values())
    for node, found in seen.items():
        usual = software.most_common(1)[0][0]
        if found["software"] != usual and node not in bad:
            bad[node] = f"other software than the rest: {found['software']}, the rest have {usual}"
    if len(bad) == len(job.nodes):
        node, reason = next(iter(bad.items()))
        raise UserError(
            f"no node of the job can run this; {node}: {reason}"
            + (f" ({err.strip().splitlines()[-1]})" if not seen and err.strip() else "")
        )
    return bad


def needed_files(config: Config) -> list[str]:
    """Files and directories every node must see: both fields of every data set, the tokenizer, the weights to start from."""
    prefixes = {
        part.prefix: None
        for split in ("train", "valid", "test")
        for group in groups_of(config, split)
        for part in group.parts
    }
    data = [
        f"{prefix}_{side}_document.{suffix}"
        for prefix in prefixes
        for side in ("inputs", "targets")
        for suffix in ("bin", "idx")
    ]
    return [
        os.path.abspath(path)
        for path in [*data, config.data.tokenizer_file, *([config.checkpoint.load] if config.checkpoint.load else [])]
    ]


def checkpoint_gigabytes(config: Config) -> float:
    """Room one checkpoint takes: the adapters' alone with LoRA, none with --skip-train."""
    if config.shape is None or config.validation.skip_train:
        return 0.0
    padded = padded_vocab_size(
        config.shape.vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor
    )
    return checkpoint_bytes(config.shape, padded, config.layout()) / 1e9


def look(save: Path | None, files: Sequence[Path], gpus: int, need_gb: float) -> dict:
    """What this node has, and what is wrong with that."""
    problems = [f"{path} is not there" for path in files if not path.exists()]
    problems += [f"{path} cannot be read" for path in files if path.exists() and not os.access(path, os.R_OK)]
    found = local_gpus()
    if found < gpus:
        problems.append(f"{found} usable GPUs, {gpus} are needed (cluster.env: GPUS_PER_NODE=0 for a run on the CPU)")
    elif gpus:
        problems += _torch_problems(gpus)
    if save:
        free = free_bytes(save) / 1e9
        existing = next(path for path in (save, *save.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK):
            problems.append(f"--save {save}: {existing} cannot be written")
        if free < need_gb:
            problems.append(f"--save {save}: {free:.1f} GB free, one checkpoint takes {need_gb:.1f} GB")
    return {
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "problems": problems,
        "software": f"Python {platform.python_version()}, {_versions()}, checkout {_source_digest()}",
    }


def _torch_problems(gpus: int) -> list[str]:
    """What keeps the training program's torch from using `gpus` GPUs; nothing where it does not say in time, since each rank looks again."""
    python = training_python()
    ask = [*python, "-c", "import torch; print('GPUS', torch.cuda.device_count())"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=TORCH_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return []
    except OSError as error:
        return [f"{python[0]} cannot be started: {error.strerror}"]
    counted = [int(line.split()[1]) for line in said.stdout.splitlines() if line.startswith("GPUS ")]
    if not counted:
        return [f"{shlex.join(python)} cannot import torch: {(said.stderr.strip().splitlines() or ['no word'])[-1]}"]
    if counted[-1] < gpus:
        causes = "a build without CUDA, an old driver, or a container without --nv"
        return [f"torch can use {counted[-1]} GPUs, {gpus} are needed ({causes})"]
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
    """Short fingerprint of the package's Python files, so that a node with a stale copy of the checkout is found."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "megatron_ft").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
