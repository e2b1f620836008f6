"""Drop conversations in which an assistant refuses, moralizes, or writes about itself, by phrases.

    python dataset/other/filter_oasst.py --input oasst.jsonl --output filtered.jsonl

A conversation is dropped if one of its turns contains a phrase of oasst_phrases.txt, or of
--phrases FILE. Unlike OctoPack's list, which finds single words within words, phrases are matched
between word boundaries, so neutral text about bias or regulations stays. Rows that are kept are not
changed. A tree of replies is one conversation; OASST's messages, if they are one per row, are
joined by tree.

OUTPUT_report.json counts the dropped conversations by category, each by the first category found in
the order of the file; the conversations with each phrase, of which there may be several; and the
programming languages of those that are kept, by the tag of their first code fence. Input may have
any shape and be in any kind of file that dataset/other/to_rows.py reads.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
from collections import Counter
from collections.abc import Sequence

from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_row_flags
from megatron_ft.conversations.fences import fenced_language
from megatron_ft.conversations.phrases import phrases_in, read_phrases
from megatron_ft.conversations.recognize import ShapeFinder
from megatron_ft.conversations.records import join_trees, open_records, read_records
from megatron_ft.conversations.shapes import SHAPES
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import shard_bytes
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.files.output import check_not_input, writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import TableWriter
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress
from megatron_ft.prompts import ASSISTANT, Turn

PHRASES = Path(__file__).with_name("oasst_phrases.txt")
SHOWN = 5  # phrases printed at the end


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_row_flags(parser, "files and directories, as for to_rows.py")
    add = parser.add_argument
    add("--phrases", type=Path, default=PHRASES, metavar="FILE", help="one phrase per line, under [category]")
    add("--turns", choices=("all", "answers"), default="all", help="turns in which phrases are searched")
    add("--shape", choices=[shape.name for shape in SHAPES], help="shape of all rows (default: recognized)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    check_not_input(args.output, [args.phrases])
    phrases = read_phrases(args.phrases)
    sources = open_records(args.input, [args.output])
    shapes = ShapeFinder(args.shape, args.shard)
    dropped, found, languages, bad = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    rows = 0
    with (
        TableWriter(args.output) as output,
        writing(args.output),
        Progress("filter conversations", shard_bytes(sources, args.shard), "B") as progress,
    ):
        for chunk in join_trees(read_records(sources, args.shard, bad if args.skip_bad_rows else None)):
            for row in chunk.rows:
                shape = shapes.shape_of(row)
                try:
                    exchanges = list(shape.exchanges(row.fields))
                except BadRow as reason:
                    if not args.skip_bad_rows:
                        raise row.error(str(reason)) from None
                    bad[str(reason)] += 1
                    continue
                rows += 1
                # Answers to one conversation have the turns before in common: each counts once.
                turns = dict.fromkeys(turn for past, text in exchanges for turn in (*past, Turn(ASSISTANT, text)))
                searched = [text for role, text in turns if args.turns == "all" or role == ASSISTANT]
                matches = phrases_in("\n".join(searched), phrases)
                found.update(f"{phrase.category}: {phrase.text}" for phrase in matches)
                if matches:
                    dropped[matches[0].category] += 1
                else:
                    languages[fenced_language(text for _, text in turns)] += 1
                    output.write(row.fields, row.line)
            progress.update(chunk.consumed)
        if not rows and args.shard[1] == 1:
            raise UserError(
                f"{sources[0].name}: no conversation{' that is not bad' if bad else ''}; expected rows as of to_rows.py"
            )
        output.commit()
    report = {
        "rows_in": rows + bad.total(),
        "rows_out": output.rows,
        "dropped": {category: dropped[category] for category in dict.fromkeys(phrase.category for phrase in phrases)},
        "phrases": dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))),
        "languages": dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
        "bad_rows": dict(sorted(bad.items())),
    }
    write_report(args.output, report)
    notes = [f"; {count:,} dropped ({category})" for category, count in dropped.most_common()]
    notes += [f"; {counted(bad.total(), 'bad row')} skipped"] if bad else []
    print(printable(f"{rows:,} conversations, {output.rows:,} -> {args.output}{''.join(notes)}"), file=sys.stderr)
    for phrase, count in found.most_common(SHOWN):
        print(printable(f"  {count:,} with {phrase}"), file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
