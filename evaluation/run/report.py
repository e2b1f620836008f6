"""Report the scores of an evaluation: Markdown, JSON and one self-contained HTML page.

    export HUMANEVALPACK=/data/humanevalpack
    python evaluation/run/report.py evaluations/first

DIR is the --output of generate.py, scored by score.py. report.md, report.json and report.html are
written into it, and the Markdown is printed. pass@k has bootstrap intervals over problems; the page
has prompts, texts, programs and outputs, filtered by status.

There is no score, and the exit status is 1, where a sample is missing or met an error of the
sandbox or the toolchain; --partial scores what there is of missing samples. --curve SAVE also
appends the scores to the report.html of the training run in SAVE, at --iteration.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
from collections.abc import Sequence

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.problems import data_directory
from megatron_ft.evaluation.records import read_generations
from megatron_ft.evaluation.report_page import page
from megatron_ft.evaluation.report_samples import samples_of
from megatron_ft.evaluation.report_tables import to_markdown
from megatron_ft.evaluation.scores import Evaluation, load_evaluation, report_of
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import writing
from megatron_ft.metrics.evaluations import append_scores
from megatron_ft.metrics.report import write_report

EXIT_NO_SCORE = 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="directory of the evaluation")
    add("--data", metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl (default: $HUMANEVALPACK)")
    add("--mode", choices=MODES, default="faithful", help="mode of score.py to report")
    add("--partial", action="store_true", help="score what there is, where samples are missing")
    add("--curve", type=Path, metavar="SAVE", help="training run whose report.html gets the scores, too")
    add("--iteration", type=int, metavar="N", help="iteration of that run that was evaluated")
    args = parser.parse_args(argv)
    if (args.curve is None) != (args.iteration is None):
        raise UserError("--curve SAVE and --iteration N belong together")
    if args.curve is not None and not args.curve.is_dir():
        raise UserError(f"--curve {args.curve}: not a directory; expected the --save directory of a run")
    return args


def main() -> int:
    args = parse_args()
    evaluation = load_evaluation(args.directory, data_directory(args.data), args.mode)
    report = report_of(evaluation, args.partial)
    groups = [
        (
            scored.task,
            scored.language,
            samples_of(scored, evaluation.manifest.get("eos"), descriptions(evaluation, scored)),
        )
        for scored in evaluation.scored
    ]
    markdown = to_markdown(report)
    for suffix, content in (
        ("json", json.dumps(report, ensure_ascii=False, indent=2) + "\n"),
        ("html", page(report, groups)),
        ("md", markdown),
    ):
        path = args.directory / f"report.{suffix}"
        with writing(path):
            replace_file(path, content.encode("utf-8", "backslashreplace"))
    print(markdown, end="")
    if args.curve:
        append_scores(args.curve, args.iteration, report)
        write_report(args.curve)
    return 0 if all(score["score"] for score in report["scores"]) else EXIT_NO_SCORE


def descriptions(evaluation: Evaluation, scored) -> dict:
    """The descriptions that a task answers; none but for explainsynthesize."""
    if scored.task != "explainsynthesize":
        return {}
    return read_generations(evaluation.directory, "explaindescribe", scored.language)


if __name__ == "__main__":
    run_program(main)
