"""Set up a directory for jobs: the scripts of slurm/, and a cluster.env to fill in.

    python launch/slurm.py init jobs
    cd jobs && bash slurm/finetune_starcoderbase_1b.sh --help

For an installed package; a checkout has the scripts already. Scripts that were changed are kept.
"""

import shutil
import sys
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import writing
from megatron_ft.launcher.command import PROGRAMS, ROOT
from megatron_ft.printable import printable

JOB = "launch/job.sh"  # what all scripts source


def main() -> None:
    """Write what is missing, and report what was kept."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("action", choices=["init"], metavar="init", help="write the scripts and cluster.env")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where slurm/ and launch/job.sh are written")
    args = parser.parse_args()
    if args.directory.resolve() == ROOT:
        raise UserError(f"{args.directory}: this checkout has the scripts; give another directory")
    names = sorted(str(path.relative_to(PROGRAMS)) for path in (PROGRAMS / "slurm").glob("*.sh"))
    settings, example = args.directory / "slurm/cluster.env", "slurm/cluster.env.example"
    with writing(args.directory):
        kept = [name for name in [JOB, *names, example] if not write(args.directory, name)]
        if settings.exists():
            kept.append("slurm/cluster.env")
        else:
            replace_file(settings, with_venv((PROGRAMS / example).read_text(encoding="utf-8")).encode())
    if kept:
        print(printable(f"kept your own files in {args.directory}: {', '.join(kept)}"))
    print(printable(f"edit {settings}, then: cd {args.directory} && bash slurm/finetune_starcoderbase_1b.sh"))


def write(directory: Path, name: str) -> bool:
    """Copy a script to `directory` unless another is there; whether it is now ours."""
    source, copy = PROGRAMS / name, directory / name
    if copy.exists():
        return copy.read_bytes() == source.read_bytes()
    copy.parent.mkdir(parents=True, exist_ok=True)
    replace_file(copy, source.read_bytes())
    shutil.copymode(source, copy)
    return True


def with_venv(settings: str) -> str:
    """cluster.env with the environment of this Python as VENV."""
    line = next(line for line in settings.splitlines() if line.startswith("#VENV="))
    return settings.replace(line, f"VENV=${{VENV:-{sys.prefix}}}")


if __name__ == "__main__":
    run_program(main)
