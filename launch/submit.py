"""sbatch with checks: errors are reported before the job is queued.

    python launch/submit.py [sbatch options] slurm/finetune_starcoderbase.sh [flags]
    bash slurm/finetune_starcoderbase.sh [flags]        (the same, without sbatch options)

Reads account, partition and GPUs per node from slurm/cluster.env: a script for nodes of 8 GPUs
requests twice the nodes where a node has 4. Then the script's flags are checked against that
layout, data, tokenizer and weights against each other, and the resources by `sbatch --test-only`.
MEGATRON_FT_DRY_RUN=1 prints the command lines of sbatch and of training instead of running them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.called_as import as_called
from megatron_ft.errors import EXIT_DONE, UserError, run_program
from megatron_ft.launcher.command import PROGRAMS, ROOT
from megatron_ft.launcher.slurm_job import parse_fields, run_slurm
from megatron_ft.printable import printable

SIZES = {
    "-N": "nodes",
    "--nodes": "nodes",
    "--ntasks-per-node": "tasks",
    "--gpus-per-node": "gpus",
    "-c": "cpus",
    "--cpus-per-task": "cpus",
}


def main() -> int:
    """Check and submit; returns sbatch's exit status."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(as_called(__doc__ or ""))
        return EXIT_DONE
    options, script, arguments = split_command(words)
    if not any(os.access(Path(folder) / "sbatch", os.X_OK) for folder in os.get_exec_path()):
        raise UserError(
            "sbatch is not on PATH, so this is not a SLURM login node; without SLURM, use python launch/finetune.py"
        )
    site = read_cluster_env(script)
    header = re.findall(r"^#SBATCH (.+)$", script.read_text("utf-8", "replace"), flags=re.MULTILINE)
    requested = sizes([word for line in header for word in shlex.split(line)])
    given = sizes(options)
    adapted = adapt(requested, given, site)
    nodes = (requested | {k: v for k, v in adapted.items() if k == "nodes"} | given).get("nodes", 1)
    tasks = (requested | adapted | given).get("tasks", 1)
    command = ["sbatch", *as_options(adapted), *options, str(script), *arguments]
    environment = {
        **os.environ,
        **{name: value for name, value in site.items() if name.startswith("SBATCH_") and value},
    }

    checked = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "MEGATRON_FT_CHECK": str(nodes * tasks)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if checked.returncode:
        return checked.returncode  # the script has reported the error
    tested = subprocess.run(
        [command[0], "--test-only", *command[1:]],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if tested.returncode:
        raise UserError(f"SLURM refuses {shlex.join(command)}: {' '.join(tested.stderr.split())}")
    if os.environ.get("MEGATRON_FT_DRY_RUN"):
        print(shlex.join(command))
        print(checked.stdout, end="")
        return EXIT_DONE
    if "--parsable" in options:  # for another program
        return subprocess.run(command, env=environment).returncode
    found, status = split_report(checked.stdout)
    print(found, end="", flush=True)
    submitted = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    print(submitted.stdout, end="")
    if submitted.returncode == EXIT_DONE:
        print(log_of(submitted.stdout) + status, end="")
    return submitted.returncode


def split_report(printed: str) -> tuple[str, str]:
    """What the script's check found, and the lines on how to follow the job."""
    lines = printed.splitlines(keepends=True)
    found = "".join(line for line in lines if not line.startswith("status: "))
    return found, "".join(line for line in lines if line.startswith("status: "))


def log_of(submitted: str) -> str:
    """A line with the log of the job in sbatch's output `submitted`, empty if SLURM tells none."""
    job = re.search(r"\d+", submitted)
    if not job or not shutil.which("scontrol"):
        return ""
    shown = run_slurm("scontrol", "show", "job", job[0])
    log = parse_fields(shown.stdout).get("StdOut")
    if shown.returncode or not log:
        return ""
    here = os.path.relpath(log)
    return printable(f"log: tail -F {shlex.quote(log if here.startswith('..') else here)}") + "\n"


def split_command(words: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """sbatch's options, the script (the first word that is a file), and its arguments.

    Raises UserError.
    """
    for i, word in enumerate(words):
        if not word.startswith("-") and Path(word).is_file():
            return list(words[:i]), Path(word).absolute(), list(words[i + 1 :])
    raise UserError(f"no script among: {shlex.join(words)}; expected [sbatch options] slurm/SCRIPT.sh [flags]")


def read_cluster_env(script: Path) -> dict[str, str]:
    """The environment after bash has sourced slurm/cluster.env, which for an installed package is
    next to the script. Raises UserError."""
    home = ROOT if PROGRAMS == ROOT else script.parents[1]
    path = Path(os.environ.get("CLUSTER_ENV") or home / "slurm" / "cluster.env")
    if not path.is_file():
        raise UserError(f"{path} not found: cp '{home}/slurm/cluster.env.example' '{path}', and fill it in")
    read = subprocess.run(
        ["bash", "-euc", 'set -a; source "$1"; exec env -0', "bash", str(path)],
        env={**os.environ, "MEGATRON_FT": str(home)}, capture_output=True, encoding="utf-8", errors="surrogateescape",
    )  # fmt: skip
    if read.returncode:
        raise UserError(f"{path} does not run: {' '.join(read.stderr.split())}")
    return dict(pair.split("=", 1) for pair in read.stdout.split("\0") if "=" in pair)


def sizes(words: Sequence[str]) -> dict[str, int]:
    """Nodes, tasks and GPUs per node, and CPUs per task in sbatch options.

    >>> sizes(["-N", "2", "-c4", "--gpus-per-node=h100:8"])
    {'nodes': 2, 'cpus': 4, 'gpus': 8}
    """
    found: dict[str, int] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if re.fullmatch(r"-[Nc]\d+", word):
            name, value = word[:2], word[2:]
        elif not equals and i + 1 < len(words):
            value = words[i + 1]
        if name in SIZES and (number := re.search(r"(\d+)$", value)):
            found[SIZES[name]] = int(number[1])
    return found


def adapt(requested: dict[str, int], given: dict[str, int], site: dict[str, str]) -> dict[str, int]:
    """The sizes to override so that the script's GPUs fit the site's nodes.

    Sizes that the user has given stay. Raises UserError if the nodes do not divide the GPUs.
    """
    adapted: dict[str, int] = {}
    text = site.get("GPUS_PER_NODE") or "0"
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"GPUS_PER_NODE={text} in cluster.env: expected a number, like 8")
    per_node = int(text)
    if per_node and "gpus" in requested and not given.keys() & {"nodes", "tasks", "gpus"}:
        total = requested.get("nodes", 1) * requested["gpus"]
        used = min(per_node, total)
        if total % used:
            raise UserError(
                f"the script's {total} GPUs cannot be spread over nodes of {per_node}; "
                "give --nodes, --ntasks-per-node and --gpus-per-node"
            )
        adapted = {"nodes": total // used, "tasks": used, "gpus": used}
    cpus = site.get("CPUS_PER_TASK")
    if cpus and not re.fullmatch("[0-9]{1,9}", cpus):
        raise UserError(f"CPUS_PER_TASK={cpus} in cluster.env: expected a number, like 12")
    if cpus and "cpus" not in given:
        adapted["cpus"] = int(cpus)
    return adapted


def as_options(adapted: dict[str, int]) -> list[str]:
    """Sizes as sbatch options."""
    long = {short: name for name, short in SIZES.items() if name.startswith("--")}
    return [f"{long[name]}={value}" for name, value in adapted.items()]


if __name__ == "__main__":
    run_program(main)
