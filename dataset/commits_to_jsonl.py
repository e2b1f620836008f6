"""Turn commits into training rows: `inputs` is what the model reads, `outputs` what it writes.

    python dataset/commits_to_jsonl.py --input commits.jsonl --output rows.jsonl

--format starcoder (StarCoder's commit format, with its special tokens):
    inputs   <commit_before>{old contents}<commit_msg>{subject}<commit_after>
    outputs  {new contents}
--format octocoder (a question and answer, with a blank line after the subject):
    inputs   Question: {subject}\\n\\n{old contents}\\n\\nAnswer:
    outputs  {a space}{new contents}
--format octocoder-published (as OctoCoder was trained, and as HumanEvalPack's octocoder prompts):
    inputs   Question: {subject}\\n{old contents}\\n\\nAnswer:
    outputs  {a space}{new contents}
--format plain (OctoPack's: the model learns to write the subject, too):
    inputs   <commit_before>{old contents}<commit_msg>
    outputs  {subject}<commit_after>{new contents}
--format with-filename (OctoPack's: plain, with the name of the file in half of the rows):
    inputs   <filename>{name}<commit_before>{old contents}<commit_msg>
--format fenced (OctoPack's, without special tokens):
    inputs   ```\\n{old contents}\\n```\\n
    outputs  {subject}\\n```\\n{new contents}\\n```
--format line-diff (SantaCoder's: stripped files with numbered lines, of which only those that
change are written; apply_line_diff in megatron_ft/commits/line_diff.py is the inverse):
    inputs   <commit_before>\\n{numbered old}\\n<commit_msg>\\n{subject}\\n<commit_after>\\n
    outputs  -{numbered line}\\n+{numbered line}

Evaluate a model with the prompts it was trained on: octocoder-published is what HumanEvalPack's
octocoder prompts match. End-of-text is not written: preprocess/tokenize.py appends it.

Commits without a subject or without new contents are skipped, and with line-diff those that change
only surrounding white space. The keys commit, lang, license and repos are copied into the row. The
report OUTPUT_report.json counts what was skipped.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_ft.commits.row import TEXT_FIELDS, check_commit
from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_row_flags
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.hash_order import fraction_of
from megatron_ft.files.jsonl import shard_bytes
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.files.output import writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import Row, TableWriter, open_tables, read_table
from megatron_ft.printable import counted
from megatron_ft.progress import Progress
from megatron_ft.prompts import COMMIT_FORMATS, FILE_NAME_FORMATS

COPIED = ("commit", "lang", "license", "repos")
COLUMNS = dict.fromkeys(("inputs", "outputs", *COPIED), "string")
EXPECTED = "expected rows of dataset/git_commits.py or CommitPack"
DEFAULT_FRACTION = {"with-filename": 0.5}  # of rows with a file name; 0 for line-diff


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_row_flags(
        parser,
        "rows of git_commits.py or CommitPack: JSONL files (also .gz, .zst), parquet files, directories of them, "
        "or - for stdin",
    )
    add = parser.add_argument
    add("--format", choices=list(COMMIT_FORMATS), default="starcoder", help="prompt format, as shown above")
    add(
        "--filename-fraction",
        type=float,
        metavar="F",
        help="fraction of rows, chosen by a hash of commit and seed, whose inputs begin with the file's name (default: "
        "0.5 for with-filename, 0 for line-diff)",
    )
    add("--seed", type=int, default=1234, help="seed of the choice of rows with a file name")
    args = parser.parse_args(argv)
    if args.filename_fraction is None:
        args.filename_fraction = DEFAULT_FRACTION.get(args.format, 0.0)
    elif args.format not in FILE_NAME_FORMATS:
        raise UserError(
            f"--filename-fraction: --format {args.format} has no file names; use --format {' or '.join(FILE_NAME_FORMATS)}"
        )
    if not 0 <= args.filename_fraction <= 1:
        raise UserError(f"--filename-fraction {args.filename_fraction:g}: must be 0 to 1, such as 0.5")
    return args


def main() -> None:
    args = parse_args()
    sources = open_tables(args.input, [args.output])
    counts, bad = Counter[str](), Counter[str]()
    with (
        TableWriter(args.output, COLUMNS) as output,
        writing(args.output),
        Progress("commits to rows", shard_bytes(sources, args.shard), "B") as progress,
    ):
        for chunk in read_table(sources, args.shard, bad if args.skip_bad_rows else None):
            for row in chunk.rows:
                counts["rows"] += 1
                try:
                    check_commit(row.fields, row.line)
                    converted = convert(row, args, counts)
                except BadRow as reason:
                    if not args.skip_bad_rows:
                        raise UserError(f"{row.error(str(reason))}; {EXPECTED}") from None
                    bad[str(reason)] += 1
                    counts["rows"] -= 1
                    continue
                if converted is not None:
                    output.write(converted)
            progress.update(chunk.consumed)
        if not output.rows and args.shard[1] == 1:
            raise UserError(f"{sources[0].name}: no commit with a subject and new contents; {EXPECTED}")
        output.commit()
    report = {
        "rows_in": counts.pop("rows", 0) + bad.total(),
        "rows_out": output.rows,
        "with_file_name": counts.pop("with file name", 0),
        "dropped": dict(sorted(counts.items())),
        "bad_rows": dict(sorted(bad.items())),
    }
    write_report(args.output, report)
    skipped = counts["no subject"] + counts["no new contents"]
    note = f"; {counted(skipped, 'commit')} without a subject or new contents skipped" if skipped else ""
    note += f"; {counts['no change']:,} without a change skipped" if counts["no change"] else ""
    note += f"; {counted(bad.total(), 'bad row')} skipped" if bad else ""
    print(f"{counted(output.rows, 'row')} -> {args.output}{note}", file=sys.stderr)


def convert(row: Row, args: argparse.Namespace, counts: Counter[str]) -> dict[str, Any] | None:
    """The training row of a commit; None if it is skipped, which is counted in `counts`."""
    old, new, subject = (row.fields[name] for name in TEXT_FIELDS)
    if not new or not subject:
        counts["no subject" if new else "no new contents"] += 1
        return None
    inputs, outputs = COMMIT_FORMATS[args.format](old, new, subject)
    if not outputs:
        counts["no change"] += 1
        return None
    if args.filename_fraction:
        path = row.fields.get("old_file")
        if not isinstance(path, str) or not path:
            raise BadRow("no key 'old_file' with the path of the file, which --filename-fraction needs")
        commit = row.fields.get("commit")
        key = commit if isinstance(commit, str) else f"{subject}\n{old}\n{new}"
        if fraction_of([key], args.seed) < args.filename_fraction:
            inputs = FILE_NAME_FORMATS[args.format].format(name=PurePosixPath(path).name) + inputs
            counts["with file name"] += 1
    return {"inputs": inputs, "outputs": outputs, **{key: row.fields[key] for key in COPIED if key in row.fields}}


if __name__ == "__main__":
    run_program(main)
