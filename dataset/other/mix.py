"""Mix rows of several sources by quotas: the same rows whatever their order and their files.

    python dataset/other/mix.py mix.yaml --output mixed.jsonl
    python dataset/other/mix.py octocoder --source commitpackft=commits.jsonl \\
        --source oasst=oasst.jsonl --output mixed.jsonl

SPEC is a YAML file, or a preset ({presets}), whose files are given by --source:
{spec}
A source has one of rows (a number, or all), quotas (numbers of rows by the value of the key `by`),
and weight (a part of rows at the top). Names are compared without regard to case.

Of each quota the rows with the smallest hashes of seed and texts are taken, so 5,000 rows are the
first of 10,000. Equal rows of a source are taken once: the one whose line sorts first. The mix is
shuffled by the same hashes, and lines are not changed. A quota that is larger than its source is
an error.

The sources are read twice; --memory bounds the rows in memory, others are spilled to disk.
OUTPUT_report.json has counts, and the sha256 of all inputs and of the output. --dry-run prints the
counts and writes nothing.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.checksum import describe_file
from megatron_ft.files.hash_order import Buckets, key_of
from megatron_ft.files.jsonl import STDIN, Source
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, text_of, to_line
from megatron_ft.files.output import STANDARD_OUTPUT, check_not_input, scratch_directory, writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import Row, TableWriter, open_tables, read_table
from megatron_ft.mixing import spec as mix_spec
from megatron_ft.mixing.select import Selection
from megatron_ft.mixing.spec import MixSpec, read_spec
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress

PRESETS = Path(__file__).with_name("mixes")
SOURCE_BYTES = 2  # number of its source, in front of each spilled line
TEXTS = (("inputs",), ("outputs", "targets"))
ARROW = {str: "string", int: "int64", float: "double", bool: "bool"}
SHOWN_VALUES = 1000  # of `by` without a quota, kept for messages


def description() -> str:
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    spec = (mix_spec.__doc__ or "").partition("\n\n")[2]
    return (__doc__ or "").format(presets=presets, spec=spec)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=description(), formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("spec", metavar="SPEC", help="YAML file, or the name of a preset")
    add("--output", metavar="FILE", help="file to write: JSONL, .gz and .zst compressed, or .parquet; - for stdout")
    add(
        "--source",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="file or directory of a source, instead of those in SPEC; again for more files or sources",
    )
    add("--seed", type=int, help="seed of choice and order (default: that of SPEC)")
    add("--dry-run", action="store_true", help="print what would be taken and write nothing")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    add("--memory", type=int, default=512, metavar="MIB", help="memory for rows, in MiB")
    add(
        "--temporary-directory",
        type=Path,
        metavar="DIR",
        help="where rows are spilled (default: directory of the output)",
    )
    args = parser.parse_args(argv)
    if args.output is None and not args.dry_run:
        raise UserError("give --output FILE, or --dry-run to see what would be taken")
    if args.memory < 1:
        raise UserError(f"--memory {args.memory}: must be at least 1 MiB")
    args.given = {}
    for text in args.source:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise UserError(f"--source {text}: expected NAME=FILE, for example oasst=rows.jsonl")
        args.given.setdefault(name, []).append(file)
    return args


def main() -> None:
    args = parse_args()
    path = Path(args.spec)
    if not path.exists() and (PRESETS / f"{args.spec}.yaml").is_file():
        path = PRESETS / f"{args.spec}.yaml"
    if args.output:
        check_not_input(args.output, [path])
    mix = read_spec(path, args.given, args.seed)
    outputs = [args.output] if args.output else []
    sources = {source.name: open_tables(source.files, outputs) for source in mix.sources}
    if any(file.path == STDIN for files in sources.values() for file in files):
        raise UserError("standard input (-) cannot be read twice, as a mix is; give files")
    chooser = Chooser(mix, sources, args.skip_bad_rows)
    chooser.choose()
    if args.dry_run:
        print_counts(chooser)
        return
    counts = write_mix(chooser, args)
    rows_out = sum(counts)
    report = {
        "seed": mix.seed,
        "rows_in": chooser.rows,
        "rows_out": rows_out,
        "sources": {
            selection.spec.name: {
                "rows_out": counts[i],
                "quotas": {
                    group or "rows": {"rows_in": smallest.rows, "quota": smallest.count or "all"}
                    for group, smallest in selection.groups.items()
                },
                "files": {file.name: describe_file(file.path) for file in sources[selection.spec.name]},
            }
            for i, selection in enumerate(chooser.selections)
        },
        "bad_rows": dict(sorted(chooser.bad.items())),
    }
    if args.output not in STANDARD_OUTPUT:
        report["output"] = describe_file(Path(args.output))
    write_report(args.output, report)
    by_source = ", ".join(f"{count:,} of {source.name}" for count, source in zip(counts, mix.sources, strict=True))
    note = f"; {counted(chooser.bad.total(), 'bad row')} skipped" if chooser.bad else ""
    print(printable(f"{counted(rows_out, 'row')} ({by_source}) -> {args.output}{note}"), file=sys.stderr)


class Chooser:
    """Reads the sources of a mix and chooses rows: `choose` first, then `chosen` yields them."""

    def __init__(self, mix: MixSpec, sources: dict[str, list[Source]], skip_bad: bool):
        firsts = itertools.accumulate((len(spec.quotas) for spec in mix.sources), initial=0)
        self.selections = [Selection(spec, first) for spec, first in zip(mix.sources, firsts, strict=False)]
        self.rows, self.bad = 0, Counter[str]()
        self.columns: dict[str, str] = {}  # types of the keys of all rows, as TableWriter names them
        self._seed, self._sources, self._skip_bad = mix.seed, sources, skip_bad

    def choose(self) -> None:
        """Determine which rows are taken; UserError if a quota is larger than its source."""
        for selection in self.selections:
            others = Counter[str]()
            for row, key in self._rows(selection, "choose"):
                self.rows += 1
                group = selection.spec.group_of(row.fields)
                if group is not None:
                    selection.add(group, key)
                    self._note_columns(row)
                elif selection.spec.by and len(others) < SHOWN_VALUES:
                    others[str(row.fields.get(selection.spec.by))[:40]] += 1
            selection.check(dict(others.most_common()))

    def chosen(self) -> Iterator[tuple[int, bytes, bytes]]:
        """The rows that are taken, each as the number of its source, its key and its line."""
        for source, selection in enumerate(self.selections):
            for row, key in self._rows(selection, "take", again=True):
                group = selection.spec.group_of(row.fields)
                order = None if group is None else selection.order_of(group, key)
                if order is not None:
                    line = row.line if row.line is not None else to_line(row.fields)
                    yield source, order, line

    def _rows(self, selection: Selection, task: str, again: bool = False) -> Iterator[tuple[Row, int]]:
        """The good rows of a source, with the keys of their texts; bad ones are counted once."""
        bad = Counter[str]() if again else self.bad
        files = self._sources[selection.spec.name]
        with Progress(f"{task} {selection.spec.name}", sum(file.size for file in files), "B") as progress:
            for chunk in read_table(files, bad=bad if self._skip_bad else None):
                for row in chunk.rows:
                    try:
                        key = key_of(texts_of(row), self._seed)
                    except BadRow as reason:
                        if not self._skip_bad:
                            raise row.error(str(reason)) from None
                        bad[str(reason)] += 1
                        continue
                    yield row, int.from_bytes(key)
                progress.update(chunk.consumed)

    def _note_columns(self, row: Row) -> None:
        for name, value in row.fields.items():
            if name not in self.columns and value is not None:
                listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
                self.columns[name] = "list:string" if listed else ARROW.get(type(value), "")


def texts_of(row: Row) -> list[str]:
    """Inputs and outputs of a row; BadRow if one is missing or not a text."""
    texts = []
    for names in TEXTS:
        name = next((name for name in names if name in row.fields), None)
        if name is None:
            raise BadRow(f"{NO_KEY} {' or '.join(map(repr, names))}; {keys_of(row.fields)}")
        texts.append(text_of(row.fields, name, row.line))
    return texts


def write_mix(chooser: Chooser, args: argparse.Namespace) -> list[int]:
    """Write the chosen rows in the order of their keys; returns the number of each source's."""
    parquet = args.output.endswith(".parquet")
    if parquet and (strange := [name for name, kind in chooser.columns.items() if not kind]):
        raise UserError(f"{args.output}: no column of parquet holds {strange[0]!r} of these rows; write .jsonl instead")
    spill_parent = args.temporary_directory or (
        Path(tempfile.gettempdir()) if args.output in STANDARD_OUTPUT else Path(args.output).parent
    )
    counts = [0] * len(chooser.selections)
    with ExitStack() as stack:
        output = stack.enter_context(TableWriter(args.output, chooser.columns))
        stack.enter_context(writing(args.temporary_directory or args.output))
        buckets = Buckets(stack.enter_context(scratch_directory(spill_parent, ".mix")), depth=0)
        for source, order, line in chooser.chosen():
            buckets.add(order, source.to_bytes(SOURCE_BYTES) + line)
        with Progress("write", None, " rows") as progress:
            for record in buckets.in_order(args.memory << 20, progress, smallest=True):
                counts[int.from_bytes(record[:SOURCE_BYTES])] += 1
                line = record[SOURCE_BYTES:]
                output.write_line(line)
        for selection, count in zip(chooser.selections, counts, strict=True):
            needed = [smallest.count for smallest in selection.groups.values()]
            if None not in needed and count != sum(map(int, filter(None, needed))):
                raise UserError(f"source {selection.spec.name}: its files changed while they were read; run it again")
        output.commit()
    return counts


def print_counts(chooser: Chooser) -> None:
    """One line per quota on stdout: source, quota, rows it has, rows it gives."""
    table: list[tuple[Any, ...]] = [("source", "quota", "rows", "taken")]
    for selection in chooser.selections:
        for group, smallest in selection.groups.items():
            taken = "all" if smallest.count is None else f"{smallest.count:,}"
            table.append((selection.spec.name, group or "-", f"{smallest.rows:,}", taken))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for name, group, rows, taken in table:
        print(printable(f"{name:{widths[0]}}  {group:{widths[1]}}  {rows:>{widths[2]}}  {taken:>{widths[3]}}"))


if __name__ == "__main__":
    run_program(main)
