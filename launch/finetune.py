r"""Start a training run: as local processes, or in a SLURM job as tasks of srun.

    python launch/finetune.py --preset tiny --from-scratch --data-prefix data/commits \
        --tokenizer-file data/tokenizer.json --train-iters 100 --save runs/first \
        --tensor-model-parallel-size 2

The same command resumes the run. Flags are checked before anything starts. On SIGTERM, SIGUSR1,
SIGUSR2, Ctrl-C and a closed terminal every rank saves after its step, and the exit status is 75.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.called_as import as_called
from megatron_ft.config.arguments import print_settings
from megatron_ft.config.command_line import build_parser, with_config
from megatron_ft.config.config_file import LAUNCHED_WITH, PRINT_CONFIG
from megatron_ft.config.flag import MEGATRON, TRANSFORMERS
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_DONE, run_program
from megatron_ft.launcher.command import as_shell, local_gpus, rank_environment
from megatron_ft.launcher.local_ranks import local_environment, run_local_ranks
from megatron_ft.launcher.slurm_job import Job, inside_batch_job
from megatron_ft.launcher.slurm_ranks import ranks_command, ranks_environment
from megatron_ft.launcher.start_check import Checked, check_start
from megatron_ft.launcher.supervise import supervise
from megatron_ft.launcher.training import Training, check_gpus, check_training, local_processes
from megatron_ft.printable import printable


def launch_parser() -> Parser:
    """The launcher's own flags; all others are those of the training program."""
    parser = Parser(prog="launch/finetune.py", description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--num-processes",
        type=int,
        metavar="N",
        help="start N local processes, even in a job (default: the number of GPUs; TP x PP x CP on the CPU)",
    )
    add(
        "--engine",
        choices=[MEGATRON, TRANSFORMERS, "mtf"],
        default=MEGATRON,
        help="transformers trains any causal model with its Trainer; mtf runs the checkout of BigCode's branch at "
        "MEGATRON_PATH",
    )
    add(
        "--check",
        action="store_true",
        help="check flags, data, tokenizer, weights and the mtf checkout, start nothing (used before submission)",
    )
    add("--dry-run", action="store_true", help="print the exact command and environment, start nothing")
    return parser


def split_flags(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The words for `parser` and all other words, each in order."""
    takes_value = {name: action.nargs != 0 for name, action in parser.actions.items()}
    ours: list[str] = []
    theirs: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in takes_value:
            theirs.append(word)
            continue
        ours.append(name + word[len(name) :])
        if takes_value[name] and not equals:
            ours.extend(value for value in [next(words, None)] if value is not None)
    return ours, theirs


def report_check(training: Training, checked: Checked, *, dry_run: bool) -> int:
    """Print what was checked and how to follow the run, or with `dry_run` the command of a rank."""
    for warning in checked.warnings:
        print(printable(warning), file=sys.stderr)
    print(printable(f"checked: {'; '.join(checked.found)}"))
    if dry_run:
        print(f"training command of each rank: {shlex.join(training.command)}")
    elif training.config.checkpoint.save:
        print(as_called(f"status: python launch/status.py {shlex.quote(training.config.checkpoint.save)}"))
    return EXIT_DONE


def run_in_job(job: Job, training: Training, engine: str, *, dry_run: bool) -> int:
    """Run all ranks of a SLURM job; returns the exit status of its batch script."""
    extra = {"MEGATRON_FT_STOP_SIGNAL": str(int(training.stop_signal))} if training.stop_signal else {}
    if dry_run:
        print(
            f"# job {job.id}: {job.num_tasks} ranks on {', '.join(job.nodes)}; "
            "launch/rank.py sets RANK, LOCAL_RANK and WORLD_SIZE from srun's variables"
        )
        command = ranks_command(job, training.command, training.logs or Path("logs"))
        print(as_shell({**ranks_environment(job), **extra}, command))
        return EXIT_DONE
    return supervise(job, training.config, training.command, extra, lambda: check_start(training.config, engine))


def run_locally(training: Training, num_processes: int, gpus: int, *, dry_run: bool) -> int:
    """Run all ranks on this machine, which has `gpus` GPUs; returns the exit status."""
    environment = local_environment(num_processes, gpus)
    if dry_run:
        print(f"# rank 0 of {num_processes}; the others differ in RANK and LOCAL_RANK")
        print(as_shell({**environment, **rank_environment(0, num_processes, 0, num_processes)}, training.command))
        return EXIT_DONE
    return run_local_ranks(training.command, num_processes, environment, training.logs, training.stop_signal)


def print_help(parser: argparse.ArgumentParser) -> None:
    """The launcher's flags, then the training program's."""
    print(parser.format_help() + "\nAll other flags go to the training program:\n")
    print(build_parser(reads_config=False).format_help())


def main() -> int:
    """Check the flags, then start the ranks; returns the exit status."""
    parser = launch_parser()
    words = with_config(sys.argv[1:], parser)
    own, flags = split_flags(words, parser)
    if "--help" in own or "-h" in own:
        print_help(parser)
        return EXIT_DONE
    if PRINT_CONFIG in own:
        print_settings(parser, words)
        return EXIT_DONE
    launch = parser.parse_args(own)
    os.environ[LAUNCHED_WITH] = json.dumps(parser.settings_of(launch, all_of_them=False))
    job = Job.from_environment() if inside_batch_job() and launch.num_processes is None else None
    gpus = local_gpus()
    num_processes = job.num_tasks if job else local_processes(launch.num_processes, gpus, flags)
    training = check_training(launch.engine, flags, num_processes)
    if not (job or launch.check or launch.dry_run):
        check_gpus(num_processes, gpus)
    if launch.check:
        return report_check(training, check_start(training.config, launch.engine), dry_run=launch.dry_run)
    if not (job or launch.dry_run):  # in a job, each node is checked
        check_start(training.config, launch.engine)
    if job:
        return run_in_job(job, training, launch.engine, dry_run=launch.dry_run)
    return run_locally(training, num_processes, gpus, dry_run=launch.dry_run)


if __name__ == "__main__":
    run_program(main)
