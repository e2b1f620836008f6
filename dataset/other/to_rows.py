"""Turn instruction data of any usual shape into training rows of `inputs` and `outputs`.

    python dataset/other/to_rows.py --input chats.jsonl --output rows.jsonl

Shapes (--shape NAME; default: recognized by the keys of each file's first row, and printed):
{shapes}

Files: JSONL (also .gz, .zst), JSON arrays, parquet, Arrow, directories of JSONL and parquet, and
save_to_disk directories of the datasets library. OASST's messages may also be one per row.

Every answer of the assistant becomes a row, with all turns before it in the inputs; --first-turn
keeps only the first question and its first answer, as OctoPack does. Formats (--format NAME):
    question   Question: {{question}}\\n\\nAnswer:   then a space and the answer
    commit     <commit_before><commit_msg>{{question}}<commit_after>   then the answer
    alpaca     ... ### Instruction:\\n{{question}}\\n\\n### Response:\\n   then the answer
    starchat   ... <|user|>\\n{{question}}<|end|>\\n<|assistant|>\\n   then {{answer}}<|end|>
    text       the question as it is, then the answer
    chat       the chat template of --tokenizer-file, generation prompt included
question is what OctoCoder was trained on and what HumanEvalPack's octocoder prompts match. Evaluate
a model with the format it was trained on. End-of-text is not written: preprocess/tokenize.py
appends it, unless --no-append-eod is given, as for templates that end answers with it.

For a chat template, rows with messages of role and content need no conversion: with --messages-key,
preprocess/tokenize.py reads them, and learns every answer without repeating the turns before it.
Convert them with --format chat for the mtf engine, or to filter and mix answers one by one.

Answers without text or without a question, and those to a tool unless --format is chat, are
skipped; OUTPUT_report.json counts them. The keys {copied} are copied.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_row_flags
from megatron_ft.conversations.chat_template import ChatTemplate
from megatron_ft.conversations.recognize import ShapeFinder
from megatron_ft.conversations.records import join_trees, open_records, read_records
from megatron_ft.conversations.shapes import SHAPES, Shape
from megatron_ft.conversations.turns import Exchange
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.jsonl import shard_bytes
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.files.output import writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import Row, TableWriter
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress
from megatron_ft.prompts import ASSISTANT, CHAT_FORMATS, SYSTEM, USER, Turn

CHAT = "chat"
COPIED = ("id", "commit", "lang", "license", "repos", "source")
COLUMNS = dict.fromkeys(("inputs", "outputs", *COPIED), "string")
Format = Callable[[Sequence[Turn], str], tuple[str, str]]


def description() -> str:
    shapes = "\n".join(f"    {shape.name:21}{shape.keys}" for shape in SHAPES)
    return (__doc__ or "").format(shapes=shapes, copied=", ".join(COPIED))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=description(), formatter_class=Help, allow_abbrev=False)
    add_row_flags(parser, "files and directories as above; - for JSONL on stdin")
    add = parser.add_argument
    add("--shape", choices=[shape.name for shape in SHAPES], help="shape of all rows (default: recognized)")
    add("--format", choices=[*CHAT_FORMATS, CHAT], default="question", help="prompt format, as shown above")
    add("--tokenizer-file", type=Path, metavar="DIR", help="Hugging Face directory with the template of --format chat")
    add("--first-turn", action="store_true", help="keep only the first answer of each conversation")
    args = parser.parse_args(argv)
    if (args.format == CHAT) != (args.tokenizer_file is not None):
        raise UserError("--format chat needs --tokenizer-file DIR, and no other format uses it; give both or neither")
    return args


def main() -> None:
    args = parse_args()
    sources = open_records(args.input, [args.output])
    to_texts = ChatTemplate(args.tokenizer_file).texts if args.format == CHAT else CHAT_FORMATS[args.format]
    rows_in, answers, dropped, bad = Counter[str](), 0, Counter[str](), Counter[str]()
    shapes = ShapeFinder(args.shape, args.shard)
    with (
        TableWriter(args.output, COLUMNS) as output,
        writing(args.output),
        Progress("conversations to rows", shard_bytes(sources, args.shard), "B") as progress,
    ):
        for chunk in join_trees(read_records(sources, args.shard, bad if args.skip_bad_rows else None)):
            for row in chunk.rows:
                shape = shapes.shape_of(row)
                try:
                    found = convert(row, shape, to_texts, args)
                except BadRow as reason:
                    if not args.skip_bad_rows:
                        raise row.error(str(reason)) from None
                    bad[str(reason)] += 1
                    continue
                rows_in[shape.name] += 1
                answers += len(found)
                for converted in found:
                    if isinstance(converted, str):
                        dropped[converted] += 1
                    else:
                        output.write(converted)
            progress.update(chunk.consumed)
        if not output.rows and args.shard[1] == 1:
            raise UserError(
                f"{sources[0].name}: no question with an answer in {counted(rows_in.total(), 'row')}; try --shape NAME"
            )
        output.commit()
    report = {
        "rows_in": rows_in.total() + bad.total(),
        "answers": answers,
        "rows_out": output.rows,
        "shapes": dict(sorted(rows_in.items())),
        "dropped": dict(sorted(dropped.items())),
        "bad_rows": dict(sorted(bad.items())),
    }
    write_report(args.output, report)
    notes = [f"; {count:,} skipped ({reason})" for reason, count in sorted((dropped + bad).items())]
    print(printable(f"{counted(output.rows, 'row')} -> {args.output}{''.join(notes)}"), file=sys.stderr)


def convert(row: Row, shape: Shape, to_texts: Format, args: argparse.Namespace) -> list[dict[str, Any] | str]:
    """The training rows of one row, and for each answer that is skipped the reason."""
    copied = {key: row.fields[key] for key in COPIED if isinstance(row.fields.get(key), str)}
    exchanges: Iterable[Exchange] = shape.exchanges(row.fields)
    if args.first_turn:
        exchanges = itertools.islice(exchanges, 1)
    found: list[dict[str, Any] | str] = []
    for history, answer in exchanges:
        if reason := why_skipped(history, answer, args.format):
            found.append(reason)
            continue
        inputs, outputs = to_texts(history, answer)
        found.append({"inputs": inputs, "outputs": outputs, **copied})
    return found or ["no answer"]


def why_skipped(history: Sequence[Turn], answer: str, format: str) -> str:
    """Why an answer does not become a row; "" if it does."""
    if not answer.strip():
        return "empty answer"
    if not any(turn.role == USER and turn.text.strip() for turn in history):
        return "no question"
    if format != CHAT and any(turn.role not in (USER, ASSISTANT, SYSTEM) for turn in history):
        return "tool in the conversation"
    return ""


if __name__ == "__main__":
    run_program(main)
