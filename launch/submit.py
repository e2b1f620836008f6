"""sbatch with the checks first: the same command line, and what is wrong is said now instead of after the queue.

    python launch/submit.py [sbatch options] slurm/finetune_starcoderbase.sh [flags]
    bash slurm/finetune_starcoderbase.sh [flags]                                       (the same, without sbatch options)

Reads slurm/cluster.env for account, partition and the size of a node: a recipe for 8 GPUs a node asks for twice the nodes where a node has 4.
Then the script's flags are checked against that layout, and the resources by `sbatch --test-only`. MEGATRON_FT_DRY_RUN=1 prints the command instead.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others' of the same name

from megatron_ft.errors import EXIT_DONE, UserError, run_program
from megatron_ft.launcher.command import ROOT

SIZES = {
    "-N": "nodes",
    "--nodes": "nodes",
    "--ntasks-per-node": "tasks",
    "--gpus-per-node": "gpus",
    "-c": "cpus",
    "--cpus-per-task": "cpus",
}


def main() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return EXIT_DONE
    options, script, arguments = split_command(words)
    if not any(os.access(Path(folder) / "sbatch", os.X_OK) for folder in os.get_exec_path()):
        raise UserError(
            "sbatch is not on PATH: this is no SLURM login node; without SLURM, use python launch/finetune.py"
        )
    site = read_cluster_env()
    header = re.findall(r"^#SBATCH (.+)$", script.read_text(), flags=re.MULTILINE)
    wanted = sizes([word for line in header for word in shlex.split(line)])
    given = sizes(options)
    adapted = adapt(wanted, given, site)
    nodes = (wanted | {k: v for k, v in adapted.items() if k == "nodes"} | given).get("nodes", 1)
    tasks = (wanted | adapted | given).get("tasks", 1)
    command = ["sbatch", *as_options(adapted), *options, str(script), *arguments]
    environment = {
        **os.environ,
        **{name: value for name, value in site.items() if name.startswith("SBATCH_") and value},
    }

    checked = subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "MEGATRON_FT_CHECK": str(nodes * tasks)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if checked.returncode:
        return checked.returncode  # the script has said what is wrong
    tested = subprocess.run([command[0], "--test-only", *command[1:]], env=environment, capture_output=True, text=True)
    if tested.returncode:
        raise UserError(f"SLURM refuses {shlex.join(command)}: {' '.join(tested.stderr.split())}")
    if os.environ.get("MEGATRON_FT_DRY_RUN"):
        print(shlex.join(command))
        return EXIT_DONE
    return subprocess.run(command, env=environment).returncode


def split_command(words: Sequence[str]) -> tuple[list[str], Path, list[str]]:
    """sbatch's options, the script (the first word that is a file), and its arguments."""
    for i, word in enumerate(words):
        if not word.startswith("-") and Path(word).is_file():
            return list(words[:i]), Path(word).absolute(), list(words[i + 1 :])
    raise UserError(f"no script among: {shlex.join(words)}; expected [sbatch options] slurm/SCRIPT.sh [flags]")


def read_cluster_env() -> dict[str, str]:
    """Variables that slurm/cluster.env sets, as bash sees them."""
    path = Path(os.environ.get("CLUSTER_ENV") or ROOT / "slurm" / "cluster.env")
    if not path.is_file():
        raise UserError(f"{path} is not there: cp '{ROOT}/slurm/cluster.env.example' '{path}', and fill it in")
    read = subprocess.run(
        ["bash", "-euc", 'set -a; source "$1"; exec env -0', "bash", str(path)],
        env={**os.environ, "MEGATRON_FT": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if read.returncode:
        raise UserError(f"{path} does not run: {' '.join(read.stderr.split())}")
    return dict(pair.split("=", 1) for pair in read.stdout.split("\0") if "=" in pair)


def sizes(words: Sequence[str]) -> dict[str, int]:
    """Nodes, tasks, GPUs a node and cpus a task among sbatch options: `-N 2`, `-N2`, `--nodes=2`, `--gpus-per-node=h100:4`."""
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


def adapt(wanted: dict[str, int], given: dict[str, int], site: dict[str, str]) -> dict[str, int]:
    """The recipe's GPUs on the site's nodes, where the user says nothing else. Raises UserError when they do not divide."""
    adapted: dict[str, int] = {}
    text = site.get("GPUS_PER_NODE") or "0"
    if not text.isdigit():
        raise UserError(f"GPUS_PER_NODE={text} in cluster.env: expected a number, like 8")
    per_node = int(text)
    if per_node and "gpus" in wanted and not given.keys() & {"nodes", "tasks", "gpus"}:
        total = wanted.get("nodes", 1) * wanted["gpus"]
        here = min(per_node, total)
        if total % here:
            raise UserError(
                f"the script's {total} GPUs cannot be spread over nodes of {per_node}; give --nodes, --ntasks-per-node and --gpus-per-node"
            )
        adapted = {"nodes": total // here, "tasks": here, "gpus": here}
    if site.get("CPUS_PER_TASK") and "cpus" not in given:
        adapted["cpus"] = int(site["CPUS_PER_TASK"])
    return adapted


def as_options(adapted: dict[str, int]) -> list[str]:
    """The same as sbatch options."""
    long = {short: name for name, short in SIZES.items() if name.startswith("--")}
    return [f"{long[name]}={value}" for name, value in adapted.items()]


if __name__ == "__main__":
    run_program(main)
