"""Time what commands cost before they work: --help, errors, the way to the first training step.

    git worktree add /tmp/before d8c1191 && cp megatron_ft/data/*.so /tmp/before/megatron_ft/data
    python bench/start.py --before /tmp/before

Runs the same commands of this checkout and of another one in turn, and prints the CPU seconds of
the fastest of --times, of all processes of a command. The first step is one of the preset tiny on
one CPU rank, timed from the command to its line on the screen, without what follows it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import psutil

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/fixtures"
HELP = "convert/hf_to_megatron.py convert/megatron_to_hf.py convert/reshard.py convert/verify.py launch/finetune.py"
TRAIN = "launch/finetune.py --preset tiny --from-scratch --seq-length 256 --train-iters 1 --num-processes 1"
STEP = b" iteration 1/1 "  # how the line of the step begins


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, to compare with")
    parser.add_argument("--times", type=int, default=3, help="runs of each command")
    bench(parser.parse_args())


def bench(args: argparse.Namespace) -> None:
    checkouts = [ROOT, *([args.before] if args.before else [])]
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        for file in filter(Path.is_file, FIXTURES.glob("data_*")):  # a copy, since packing writes next to it
            shutil.copy(file, directory)
        files = ["--data-prefix", str(data), "--tokenizer-file", str(FIXTURES / "tokenizer.json")]
        train = [*TRAIN.split(), *files]
        missing = [str(data) + "-missing" if word == str(data) else word for word in train]
        commands = {f"{program} --help": ([program, "--help"], 0) for program in HELP.split()}
        commands["convert/reshard.py, --load missing"] = (
            ["convert/reshard.py", "--load", "nowhere", "--save", f"{directory}/new", "--tensor-parallel", "2"], 2
        )  # fmt: skip
        commands["launch/finetune.py, data missing"] = (missing, 2)
        for name, (words, status) in commands.items():
            show(name, [fastest(args.times, checkout, words, status) for checkout in checkouts])
        show("first training step", [fastest(args.times, checkout, train, 0, STEP) for checkout in checkouts])


def show(name: str, seconds: Sequence[float]) -> None:
    """A line: seconds here, and before with their ratio."""
    before = f"{seconds[1]:8.2f} s before, {seconds[1] / seconds[0]:5.1f}x" if len(seconds) > 1 else ""
    print(f"{name:40} {seconds[0]:6.2f} s{before}", flush=True)


def fastest(times: int, checkout: Path, words: Sequence[str], status: int, until: bytes | None = None) -> float:
    """CPU seconds of a command and its children, to the first line that begins with `until`."""
    return min(cpu_seconds(checkout, words, status, until) for _ in range(times))


def cpu_seconds(checkout: Path, words: Sequence[str], status: int, until: bytes | None) -> float:
    command = [sys.executable, "-P", str(checkout / words[0]), *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    used = os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        lines, seconds = [], None
        for line in process.stdout or []:
            lines.append(line)
            if until and line.startswith(until):
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                seconds = sum(sum(member.cpu_times()[:2]) for member in tree)
        process.wait()
    if process.returncode != status:
        raise UserError(f"{' '.join(command)}: ended with {process.returncode}: {b''.join(lines)[-300:]!r}")
    if seconds is not None:
        return seconds
    now = os.times()
    return now.children_user + now.children_system - used.children_user - used.children_system


if __name__ == "__main__":
    run_program(main)
