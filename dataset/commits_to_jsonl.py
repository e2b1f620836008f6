"""Turn commits into training rows: what the model reads as `inputs`, what it learns to write as `outputs`.

    python dataset/commits_to_jsonl.py --input commits.jsonl --output rows.jsonl

--format starcoder (StarCoder's own, with its special tokens):
    inputs   <commit_before>{old contents}<commit_msg>{subject}<commit_after>
    outputs  {new contents}
--format octocoder (OctoCoder's questions and answers):
    inputs   Question: {subject}\\n\\n{old contents}\\n\\nAnswer:
    outputs  {a space}{new contents}

Commits without a subject or that left an empty file teach nothing and are left out. commit, lang, license and repos stay in the row.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import json
from collections.abc import Sequence

from megatron_ft.commits.row import TEXT_FIELDS, parse_commit
from megatron_ft.config.flags import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import BadRow, open_sources, read_blocks, shard_bytes
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress

KEPT = ("commit", "lang", "license", "repos")


def starcoder(old: str, new: str, subject: str) -> tuple[str, str]:
    """Inputs and outputs as StarCoder saw commits in pre-training (arXiv 2305.06161, section 3.3)."""
    return f"<commit_before>{old}<commit_msg>{subject}<commit_after>", new


def octocoder(old: str, new: str, subject: str) -> tuple[str, str]:
    """Inputs and outputs in OctoCoder's format (arXiv 2308.07124): the subject is the instruction."""
    return f"Question: {subject}\n\n{old}\n\nAnswer:", f" {new}"


FORMATS = {"starcoder": starcoder, "octocoder": octocoder}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="rows of commits.py or CommitPack (.gz, .zst, directories, - for standard input)",
    )
    add("--output", required=True, metavar="FILE", help="JSONL file to write; - for standard output")
    add("--format", choices=sorted(FORMATS), default="starcoder", help="how a commit becomes inputs and outputs")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    sources = open_sources(args.input, [args.output])
    form = FORMATS[args.format]
    written = left_out = 0
    with (
        OutputFile(args.output) as output,
        writing(args.output),
        Progress("commits to rows", shard_bytes(sources), "B") as progress,
    ):
        for block in read_blocks(sources):
            for i, line in block.rows():
                try:
                    row = parse_commit(line)
                except BadRow as reason:
                    raise block.error(i, reason, "expected rows as dataset/git_commits.py writes them") from reason
                if not row["new_contents"] or not row["subject"]:
                    left_out += 1
                    continue
                inputs, outputs = form(*(row[name] for name in TEXT_FIELDS))
                kept = {name: row[name] for name in KEPT if name in row}
                output.write(
                    json.dumps({"inputs": inputs, "outputs": outputs, **kept}, ensure_ascii=False).encode() + b"\n"
                )
                written += 1
            progress.update(block.consumed)
        if not written:
            raise UserError(
                f"{sources[0].name}: no commit with a subject and new contents; expected rows as dataset/git_commits.py writes them"
            )
        output.commit()
    print(
        f"{written:,} rows -> {args.output}"
        + (f", {left_out:,} without subject or new contents left out" if left_out else ""),
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_program(main)
