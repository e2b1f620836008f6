"""Draw the curves of training runs on one self-contained page, one run or several overlaid.

    python launch/report.py runs/first                              # writes runs/first/report.html
    python launch/report.py runs/lr-1e-5 runs/lr-5e-5 --output lr.html

A run writes its own report.html when it ends; this also draws one that is in progress or was
killed. With several runs, the page has a column for each, the flags in which they differ, and one
chart for all curves of a kind.
"""

import sys
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.files.output import STANDARD_OUTPUT, OutputFile, writing
from megatron_ft.metrics.report import RunLog, render, render_several
from megatron_ft.printable import printable


def main() -> None:
    """Write the page and print its name."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="--save directory of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page to write (default: RUN/report.html, or report.html here for several runs)",
    )
    args = parser.parse_args()
    runs = [RunLog.read(run) for run in args.runs]
    page = render(runs[0]) if len(runs) == 1 else render_several(runs)
    path = args.output or (args.runs[0] if len(runs) == 1 else Path()) / "report.html"
    with writing(path), OutputFile(path) as output:
        output.write(page.encode())
        output.commit()
    if str(path) not in STANDARD_OUTPUT:
        print(printable(path))


if __name__ == "__main__":
    run_program(main)
