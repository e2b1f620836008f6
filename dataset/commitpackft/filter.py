"""Keep the commits whose message is an instruction and whose change follows it: CommitPack to
CommitPackFT.

    python dataset/commitpackft/filter.py --input commits.jsonl --output filtered.jsonl \\
        --tokenizer-file starcoder/ --licenses permissive --decontaminate humanevalpack/

Rows have CommitPack's schema. Rules are applied in the order of a preset until one drops the row;
a table shows how many rows each rule dropped, and OUTPUT's _report.json has it per language.
--preset commitpackft has the published rules (arXiv 2308.07124), --preset edit those of later
datasets of edits. Random choices are hashes of the commit and --seed: shards and the order of rows
do not change them. A row is written as it was read, unless its subject was cleaned, a secret was
masked or a license header removed. Parquet output has CommitPack's ten columns.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import dataclasses
import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ft.commits.candidate import Candidate, read_candidates
from megatron_ft.commits.contamination import ProblemIndex
from megatron_ft.commits.input_rules import ContaminationRule, LicenseRule, OptOutRule
from megatron_ft.commits.licenses import parse_licenses
from megatron_ft.commits.opt_out import read_owners
from megatron_ft.commits.presets import PRESETS, Preset, Rule
from megatron_ft.commits.row import CommitRow
from megatron_ft.commits.rules import Limits
from megatron_ft.commits.scores import read_scores, run_scores
from megatron_ft.commits.secrets import mask_secrets, secret
from megatron_ft.commits.token_rule import TokenRule
from megatron_ft.commits.waterfall import Waterfall
from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_row_flags
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import Source, shard_bytes
from megatron_ft.files.jsonl_row import to_line
from megatron_ft.files.output import STANDARD_OUTPUT, OutputFile, check_not_input, scratch_directory, writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import TableWriter, open_tables
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress
from megatron_ft.tokenizer.tokenizer import load_tokenizer

PROBLEMS_VARIABLE = "HUMANEVALPACK"
COLUMNS = {column.name: "string" for column in dataclasses.fields(CommitRow)}
# Flags that change a threshold of the preset; names are those of Limits.
THRESHOLDS = {
    "max_old_chars": "characters of the old contents at most",
    "min_subject_chars": "characters of the subject at least",
    "max_subject_chars": "characters of the subject at most",
    "min_subject_words": "words of the subject at least",
    "max_subject_words": "words of the subject at most",
    "mass_update_fraction": "fraction to keep of version bumps",
    "min_tokens": "tokens of old and new contents at least",
    "max_tokens": "tokens of old and new contents at most",
    "min_changed_lines": "lines that differ at least (preset edit)",
    "max_changed_lines": "lines that differ at most (preset edit)",
    "min_edit_distance": "characters that differ at least (preset edit)",
    "data_fraction": "fraction to keep of data and prose, such as YAML (preset edit)",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_row_flags(parser, "commit rows: JSONL (also .gz, .zst) or parquet files, directories of them, or - for stdin")
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="commitpackft", help="rules and thresholds")
    add("--without", nargs="+", default=[], metavar="RULE", help="rules of the preset to leave out")
    add("--tokenizer-file", metavar="PATH", help="tokenizer for the rule on tokens (default: rule left out)")
    add(
        "--licenses", metavar="LIST", help="permissive, published or mit,isc,...; unknown must be listed (default: any)"
    )
    add("--opt-out", metavar="FILE", help="owners of repositories, one per line, whose rows are dropped")
    add(
        "--secrets",
        choices=("drop", "mask", "off"),
        help="rows with credentials, e-mail or IP addresses: drop, or mask these (default: commitpackft off, edit mask)",
    )
    add(
        "--decontaminate",
        default=os.environ.get(PROBLEMS_VARIABLE),
        metavar="DIR",
        help=f"drop rows with a problem of HumanEvalPack, files LANG.jsonl of DIR; off for none (default: ${PROBLEMS_VARIABLE})",
    )
    add("--score-command", metavar="CMD", help="reads the rows left as JSONL, writes one number per line")
    add("--min-score", type=float, default=0.5, metavar="X", help="lowest score to keep")
    add("--seed", type=int, default=Limits.seed, help="seed of the random choices")
    group = parser.add_argument_group("thresholds (default: the preset's)")
    for name, text in THRESHOLDS.items():
        kind = type(getattr(Limits, name))
        group.add_argument(flag_of(name), type=kind, metavar="X" if kind is float else "N", help=text)
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    preset = PRESETS[args.preset]
    limits = limits_of(args, preset)
    rules = rules_of(args, preset)
    check_not_input(args.output, [args.opt_out, args.tokenizer_file])
    sources = open_tables(args.input, [args.output])
    waterfall = Waterfall([*(rule.name for rule in rules), *(["score"] if args.score_command else [])])
    bad: Counter[str] = Counter()
    # Rows hold no reference cycles; looking for some in every chunk takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000)
    with TableWriter(args.output, COLUMNS) as output, writing(args.output):
        survivors = filter_rows(sources, args.shard, rules, limits, waterfall, bad if args.skip_bad_rows else None)
        if args.score_command:
            survivors = scored(survivors, args, waterfall)
        for candidate in survivors:
            if (line := candidate.unchanged_line) is None:
                output.write(candidate.row())
            else:
                output.write_line(line)
            waterfall.keep(candidate.language)
        if not waterfall.rows and args.shard == (1, 1):
            raise UserError(
                f"{sources[0].name}: no row{' that is not bad' if bad else ''}; expected rows of CommitPack"
            )
        output.commit()
    write_report(args.output, report_of(args, limits, rules, waterfall, bad))
    for text in waterfall.lines():
        print(text, file=sys.stderr)
    note = f"; {counted(bad.total(), 'bad row')} skipped" if bad else ""
    print(f"{counted(waterfall.rows, 'row')}, {output.rows:,} kept -> {args.output}{note}", file=sys.stderr)


def limits_of(args: argparse.Namespace, preset: Preset) -> Limits:
    """The thresholds of the preset, changed by flags; UserError if they contradict each other."""
    given = {name: getattr(args, name) for name in THRESHOLDS if getattr(args, name) is not None}
    limits = dataclasses.replace(preset.limits, seed=args.seed, **given)
    for name, value in given.items():
        flag = f"{flag_of(name)} {value}"
        if value < 0:
            raise UserError(f"{flag}: must not be negative")
        if name.endswith("_fraction") and value > 1:
            raise UserError(f"{flag}: must be from 0 to 1")
        lower, upper = name.replace("max_", "min_", 1), name.replace("min_", "max_", 1)
        if hasattr(limits, lower) and hasattr(limits, upper) and getattr(limits, lower) > getattr(limits, upper):
            raise UserError(
                f"{flag}: no row passes {flag_of(lower)} {getattr(limits, lower)} and "
                f"{flag_of(upper)} {getattr(limits, upper)}"
            )
    return limits


def flag_of(threshold: str) -> str:
    return f"--{threshold.replace('_', '-')}"


def rules_of(args: argparse.Namespace, preset: Preset) -> list[Rule]:
    """The rules to apply, those that take longest last. Prints which ones lack their input."""
    names = [rule.name for rule in preset.rules]
    if unknown := [name for name in args.without if name not in names]:
        raise UserError(f"--without {unknown[0]}: not a rule of preset {args.preset}; it has {', '.join(names)}")
    rules = []
    if args.licenses:
        rules.append(Rule("license", LicenseRule(parse_licenses(args.licenses))))
    if args.opt_out:
        rules.append(Rule("opt_out", OptOutRule(read_owners(args.opt_out))))
    rules += [rule for rule in preset.rules if rule.name not in args.without]
    secrets = args.secrets or preset.secrets
    if secrets != "off":
        rules.append(Rule("secret", secret) if secrets == "drop" else Rule("mask_secrets", mask_secrets))
    if not args.decontaminate:
        print(
            "not decontaminated: give --decontaminate DIR, or set "
            f"{PROBLEMS_VARIABLE}, to the directory with HumanEvalPack's python.jsonl and others",
            file=sys.stderr,
        )
    elif args.decontaminate != "off":
        rules.append(Rule("contaminated", ContaminationRule(ProblemIndex.load(args.decontaminate))))
    if args.tokenizer_file:
        tokenizer = load_tokenizer(args.tokenizer_file)
        for notice in tokenizer.notices:
            print(printable(notice), file=sys.stderr)
        rules.append(Rule("tokens", TokenRule(tokenizer)))
    else:
        print("tokens are not counted: give --tokenizer-file PATH to apply the rule on tokens", file=sys.stderr)
    return rules


def filter_rows(
    sources: list[Source],
    shard: tuple[int, int],
    rules: list[Rule],
    limits: Limits,
    waterfall: Waterfall,
    bad: Counter[str] | None,
) -> Iterator[Candidate]:
    """The rows that no rule drops; counts the others.

    Raises UserError at a bad row, unless they are counted in `bad`.
    """
    steps = [(rule.name, rule.drops) for rule in rules]  # unpacked faster than named tuples
    with Progress("filter", shard_bytes(sources, shard), "B") as progress:
        for candidates, consumed in read_candidates(sources, shard, bad):
            for candidate in candidates:
                for name, drops in steps:
                    if drops(candidate, limits):
                        waterfall.drop(candidate.language, name, candidate.subject)
                        break
                else:
                    yield candidate
            progress.update(consumed)


def scored(survivors: Iterator[Candidate], args: argparse.Namespace, waterfall: Waterfall) -> Iterator[Candidate]:
    """The rows that --score-command gives --min-score or more; counts the others.

    Rows wait in a file, so that the command reads them at its own pace.
    """
    parent = Path(tempfile.gettempdir()) if args.output in STANDARD_OUTPUT else Path(args.output).resolve().parent
    with scratch_directory(parent, ".scores") as scratch:
        rows, scores = scratch / "rows.jsonl", scratch / "scores.txt"
        count = 0
        with OutputFile(rows) as spool:
            for candidate in survivors:
                spool.write(candidate.unchanged_line or to_line(candidate.row()))
                count += 1
            spool.commit()
        if not count:
            return
        run_scores(args.score_command, rows, scores)
        in_order = read_scores(args.score_command, scores, count)
        for candidates, _ in read_candidates(open_tables([rows])):
            for candidate in candidates:
                if next(in_order) >= args.min_score:
                    yield candidate
                else:
                    waterfall.drop(candidate.language, "score", candidate.subject)
        next(in_order, None)  # raises if there are more


def report_of(
    args: argparse.Namespace, limits: Limits, rules: list[Rule], waterfall: Waterfall, bad: Counter[str]
) -> dict[str, Any]:
    """The report of a run; settings are texts, so that the counts of shards can be added up."""
    tasks = next((rule.drops.tasks for rule in rules if isinstance(rule.drops, ContaminationRule)), Counter())
    settings = {
        "preset": args.preset,
        "without": " ".join(args.without),
        "licenses": args.licenses or "any",
        "secrets": args.secrets or PRESETS[args.preset].secrets,
        "tokenizer_file": args.tokenizer_file or "",
        "decontaminate": args.decontaminate or "",
        "score_command": args.score_command or "",
        "min_score": str(args.min_score) if args.score_command else "",
        **{name: str(value) for name, value in dataclasses.asdict(limits).items()},
    }
    return waterfall.report() | {
        "contaminated_by": dict(sorted(tasks.items())),
        "bad_rows": dict(bad),
        "settings": settings,
    }


if __name__ == "__main__":
    run_program(main)
