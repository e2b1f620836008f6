"""Compare two scored evaluations problem by problem: is B better than A, or is it chance?

    python evaluation/run/compare.py evaluations/base evaluations/first --data humanevalpack

A paired bootstrap over problems, or McNemar's exact test if both have one sample per problem, with
Holm's correction over the languages of a task; the smallest difference that so many problems can
detect; the problems that only one of them solves. Standard output gets Markdown, --json a file.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
from collections.abc import Sequence

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.evaluation.comparison import compare, to_markdown
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.problems import data_directory
from megatron_ft.evaluation.scores import load_evaluation
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import writing


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="directory of an evaluation")
    add("b", type=Path, metavar="B", help="directory of the evaluation to compare with it")
    add("--data", metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl (default: $HUMANEVALPACK)")
    add("--mode", choices=MODES, default="faithful", help="mode of score.py to compare")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    data = data_directory(args.data)
    found = compare(*(load_evaluation(directory, data, args.mode) for directory in (args.a, args.b)))
    if args.json:
        with writing(args.json):
            replace_file(args.json, json.dumps(found, ensure_ascii=False, indent=2).encode() + b"\n")
    print(to_markdown(found), end="")


if __name__ == "__main__":
    run_program(main)
