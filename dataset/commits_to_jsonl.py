"""Turn commits into training rows: `inputs` is what the model reads, `outputs` what it writes.

    python dataset/commits_to_jsonl.py --input commits.jsonl --output rows.jsonl

--format starcoder (StarCoder's commit format, with its special tokens):
    inputs   <commit_before>{old contents}<commit_msg>{subject}<commit_after>
    outputs  {new contents}
--format octocoder (OctoCoder's question and answer):
    inputs   Question: {subject}\\n\\n{old contents}\\n\\nAnswer:
    outputs  {a space}{new contents}

Commits without a subject or without new contents are skipped. The keys commit, lang, license and
repos are copied into the row.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

from megatron_ft.commits.row import TEXT_FIELDS, parse_commit
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import open_sources, read_blocks, shard_bytes
from megatron_ft.files.jsonl_row import BadRow, to_line
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress
from megatron_ft.prompts import COMMIT_FORMATS

COPIED = ("commit", "lang", "license", "repos")
EXPECTED = "expected rows of dataset/git_commits.py or CommitPack"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="rows of git_commits.py or CommitPack: JSONL files (also .gz, .zst), directories of them, or - for stdin",
    )
    add("--output", required=True, metavar="FILE", help="JSONL file to write, .gz and .zst compressed; - for stdout")
    add("--format", choices=sorted(COMMIT_FORMATS), default="starcoder", help="prompt format, as shown above")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    sources = open_sources(args.input, [args.output])
    to_texts = COMMIT_FORMATS[args.format]
    written = skipped = 0
    with (
        OutputFile(args.output) as output,
        writing(args.output),
        Progress("commits to rows", shard_bytes(sources), "B") as progress,
    ):
        for block in read_blocks(sources):
            for i, line in block.rows():
                try:
                    commit = parse_commit(line)
                except BadRow as reason:
                    raise block.error(i, reason, EXPECTED) from reason
                old, new, subject = (commit[name] for name in TEXT_FIELDS)
                if not new or not subject:
                    skipped += 1
                    continue
                inputs, outputs = to_texts(old, new, subject)
                row = {"inputs": inputs, "outputs": outputs, **{key: commit[key] for key in COPIED if key in commit}}
                output.write(to_line(row))
                written += 1
            progress.update(block.consumed)
        if not written:
            raise UserError(f"{sources[0].name}: no commit with a subject and new contents; {EXPECTED}")
        output.commit()
    note = f"; {skipped:,} commits without a subject or new contents skipped" if skipped else ""
    print(f"{written:,} rows -> {args.output}{note}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
