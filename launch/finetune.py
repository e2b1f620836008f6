"""Start a training run: local processes on this machine, or srun's tasks inside a SLURM job. The same command resumes it.

    python launch/finetune.py --preset tiny --from-scratch --data-prefix data/commits --tokenizer-file data/tokenizer.json \
        --train-iters 100 --save runs/first --tensor-model-parallel-size 2

Flags are checked before anything starts. SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C make every rank save after its step; the status is then 75,
and the same command line goes on where it stopped.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others' of the same name

from megatron_ft.config.arguments import parse_args
from megatron_ft.config.command_line import build_parser
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_DONE, UserError, run_program
from megatron_ft.launcher import mtf
from megatron_ft.launcher.command import as_shell, local_gpus, model_parallel_size, rank_environment, training_command
from megatron_ft.launcher.local_ranks import local_environment, run_local_ranks
from megatron_ft.launcher.node_check import needed_files
from megatron_ft.launcher.slurm_job import Job, inside_batch_job
from megatron_ft.launcher.slurm_ranks import ranks_command, ranks_environment
from megatron_ft.launcher.supervise import supervise


def launch_parser() -> Parser:
    """The launcher's own flags; all others go to the training program."""
    parser = Parser(prog="launch/finetune.py", description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--num-processes",
        type=int,
        metavar="N",
        help="local processes, also inside a job; all GPUs, or TP x PP x CP on the CPU, when not given",
    )
    add(
        "--engine",
        choices=["megatron-core", "mtf"],
        default="megatron-core",
        help="mtf drives the branch's checkout at MEGATRON_PATH",
    )
    add(
        "--check",
        action="store_true",
        help="check flags, data and the mtf checkout, start nothing; what submission does",
    )
    add("--dry-run", action="store_true", help="print the exact command and environment, start nothing")
    return parser


def split_flags(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Words for `parser` and all other words, each in their order."""
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


def main() -> int:
    parser = launch_parser()
    own, flags = split_flags(sys.argv[1:], parser)
    if "--help" in own or "-h" in own:
        print(parser.format_help() + "\nAll other flags go to the training program:\n")
        print(build_parser().format_help())
        return EXIT_DONE
    launch = parser.parse_args(own)
    job = Job.from_environment() if inside_batch_job() and launch.num_processes is None else None
    num_processes = job.num_tasks if job else launch.num_processes
    gpus = local_gpus()
    if num_processes is None:
        num_processes = gpus or model_parallel_size(flags)
    if num_processes < 1:
        raise UserError(f"--num-processes {num_processes}: must be at least 1")

    if launch.engine == "mtf":
        checkout = mtf.megatron_path()
        common, branch_only = mtf.split_branch_only(flags, mtf.branch_flags(checkout))
        config = parse_args(common, world_size=num_processes)
        command = mtf.mtf_command(config, common, branch_only, checkout)
        stop_signal = mtf.STOP_SIGNAL
    else:
        config = parse_args(flags, world_size=num_processes)
        command, stop_signal = training_command(flags), None

    if launch.check:
        comes = os.environ.get("MEGATRON_FT_DATA_COMES")  # an earlier job of a pipeline writes them
        for path in filter(lambda path: not comes and not os.path.exists(path), needed_files(config)):
            raise UserError(f"{path} is not there; correct --data-prefix, the split files, --tokenizer-file or --load")
        return EXIT_DONE
    if job:
        extra = {"MEGATRON_FT_STOP_SIGNAL": str(int(stop_signal))} if stop_signal else {}
        if launch.dry_run:
            print(
                f"# job {job.id}: {job.num_tasks} ranks on {', '.join(job.nodes)}; srun sets RANK, LOCAL_RANK and WORLD_SIZE through launch/rank.py"
            )
            print(
                as_shell(
                    {**ranks_environment(job), **extra},
                    ranks_command(job, command, Path(config.checkpoint.save or ".") / "logs"),
                )
            )
            return EXIT_DONE
        return supervise(job, config, command, extra)

    environment = local_environment(num_processes, gpus)
    if launch.dry_run:
        print(f"# rank 0 of {num_processes}; the others differ in RANK and LOCAL_RANK")
        print(as_shell({**environment, **rank_environment(0, num_processes, 0, num_processes)}, command))
        return EXIT_DONE
    if 0 < gpus < num_processes:
        raise UserError(
            f"--num-processes {num_processes}: there are {gpus} GPUs here, and each takes one process; give at most {gpus}, "
            "or type CUDA_VISIBLE_DEVICES= before the command to train on the CPU"
        )
    return run_local_ranks(
        command,
        num_processes,
        environment,
        Path(config.checkpoint.save) / "logs" if config.checkpoint.save else None,
        stop_signal,
    )


if __name__ == "__main__":
    run_program(main)
