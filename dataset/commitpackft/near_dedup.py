"""Remove near-duplicates: of rows that are at least 85% equal, the one with the smallest id stays.

    python dataset/commitpackft/near_dedup.py --input commits.jsonl --output distinct.jsonl

Compared are the sets of all 5 consecutive words of the old and new contents and the subject
together: what a model is trained on, so that the same change under another subject, or the same
subject for another change, counts as a new row as far as it is new. --fields names other fields,
such as inputs outputs. Rows with the same texts are removed whatever their size. What is found,
and which row stays, do not depend on the order of rows or files.

Larger data take three steps. The first one and the last one run in an array of jobs, the one in the
middle on a single node; it reads all rows, but looks only at those that may be near-duplicates:

    near_dedup.py --input rows/ --step signatures --shard 1/2 --output 1.parquet    (also 2/2)
    near_dedup.py --input rows/ --step join --signatures 1.parquet 2.parquet --output gone.jsonl
    near_dedup.py --input rows/ --step apply --removed gone.jsonl --shard 1/2 --output part-1.jsonl

The output has the lines that stay, unchanged. Its _report.json has the number of rows, copies and
near-duplicates, the sizes of clusters and samples. Memory is bounded by --memory and about 300 MiB.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

from megatron_ft.commits.minhash import bands, method, shingles
from megatron_ft.commits.near_duplicates import SIGNATURE_COLUMNS, NearDuplicates
from megatron_ft.config.parser import Help, Parser
from megatron_ft.config.row_flags import add_shard_flag
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.json_file import read_json
from megatron_ft.files.jsonl import STDIN, Source, shard_bytes
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, text_of, to_line
from megatron_ft.files.output import STANDARD_OUTPUT, check_not_input, scratch_directory, writing
from megatron_ft.files.report import report_path, write_report
from megatron_ft.files.tables import Row, TableWriter, open_tables, read_table
from megatron_ft.printable import counted
from megatron_ft.progress import Progress

FIELDS = ("old_contents", "new_contents", "subject")
REMOVED_COLUMNS = {"row": "int64", "id": "string", "kept": "string"}  # `row` counts from 0
ID_BYTES, TEXT_BYTES, LINE_BYTES = 20, 16, 8  # of hashes; an id is as long as a commit's
NONE = (-1, -1)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL or parquet files, or directories of them")
    add("--output", required=True, metavar="FILE", help="file to write: .parquet, else JSONL, .gz and .zst compressed")
    add("--step", choices=("all", "signatures", "join", "apply"), default="all", help="see above")
    add("--signatures", nargs="+", metavar="FILE", help="join: outputs of all shards of --step signatures, in order")
    add("--removed", metavar="FILE", help="apply: output of --step join")
    add_shard_flag(parser, "signatures, apply: only the I-th of N parts")
    add("--fields", nargs="+", default=list(FIELDS), metavar="KEY", help="keys of the texts that are compared")
    add("--id", default="commit", metavar="KEY", help="key of the id; a row without one gets the hash of its texts")
    add("--threshold", type=float, default=0.85, help="Jaccard index from which on rows are near-duplicates")
    add("--skip-bad-rows", action="store_true", help="leave out and count bad rows; the same in all steps")
    add("--memory", type=int, default=512, metavar="MIB", help="memory of DuckDB")
    add("--temporary-directory", type=Path, metavar="DIR", help="for scratch files (default: directory of the output)")
    args = parser.parse_args(argv)
    if not 0.5 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: must be from 0.5 to 1; bands find no pairs below")
    if args.memory < 64:
        raise UserError(f"--memory {args.memory}: must be at least 64 MiB")
    if args.shard != (1, 1) and args.step in ("all", "join"):
        raise UserError("--shard is for --step signatures and --step apply; omit it")
    for step, flag in (("join", "signatures"), ("apply", "removed")):
        if (args.step == step) != (getattr(args, flag) is not None):
            raise UserError(f"--{flag} belongs to --step {step}; see --help")
    return args


def main() -> None:
    args = parse_args()
    check_not_input(args.output, [*(args.signatures or ()), args.removed])
    sources = open_tables(args.input, [args.output, *(args.signatures or ()), *filter(None, [args.removed])])
    if args.step != "signatures" and any(source.path == STDIN for source in sources):
        raise UserError("--input -: the rows are read more than once; give files")
    report = {"signatures": write_signatures, "join": join, "apply": apply, "all": all_steps}[args.step](args, sources)
    write_report(args.output, report)
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in report.items() if isinstance(count, int)]
    print(f"{', '.join(counts)} -> {args.output}", file=sys.stderr)


def write_signatures(args: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """--step signatures: SIGNATURE_COLUMNS of each row. Returns the report, as all steps do."""
    bad: Counter[str] = Counter()
    with TableWriter(args.output, SIGNATURE_COLUMNS) as output, writing(args.output):
        for signatures in signatures_of(args, sources, bad):
            for signature in signatures:
                output.write(signature)
        output.commit()
    return {"rows": output.rows, "bad_rows": dict(bad)}


def join(args: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """--step join: REMOVED_COLUMNS of each row to remove."""
    with scratch(args) as directory, NearDuplicates(directory, args.memory) as found:
        rows = []
        for source in open_tables(args.signatures):
            rows.append(0)
            for chunk in read_table([source]):
                signatures = [signature(row, args) for row in chunk.rows]
                found.add(signatures)
                rows[-1] += len(signatures)
        report = search(args, sources, found)
        with TableWriter(args.output, REMOVED_COLUMNS) as output, writing(args.output):
            for row, id, kept in found.removed():
                output.write({"row": row, "id": id, "kept": kept})
            output.commit()
    return {**report, "signatures": rows}


def signature(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a row of a signature table; UserError if it is of another table or method."""
    if missing := [name for name in SIGNATURE_COLUMNS if name not in row.fields]:
        raise row.error(f"not a signature: no {missing[0]!r}; expected the output of --step signatures")
    if row.fields["method"] != method_of(args):
        raise row.error(f"made by {row.fields['method']!r}, not {method_of(args)!r}; make all signatures again")
    return row.fields


def apply(args: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """--step apply: write the rows that stay."""
    rows = read_json(report_path(args.removed), remedy="expected the report of --step join").get("signatures")
    if not isinstance(rows, list) or not all(isinstance(count, int) for count in rows):
        raise UserError(f"{report_path(args.removed)}: not the report of --step join; give its output as --removed")
    index, shards = args.shard
    if shards not in (1, len(rows)):
        raise UserError(
            f"--shard {index}/{shards}: {args.removed} is for {len(rows)} shards of signatures; give one of "
            f"1/{len(rows)} to {len(rows)}/{len(rows)}, or no shard"
        )
    first, count = (0, sum(rows)) if shards == 1 else (sum(rows[: index - 1]), rows[index - 1])
    table = open_tables([args.removed], allow_empty=True)
    removed = (row.fields["row"] for chunk in read_table(table) for row in chunk.rows)
    return write_kept(args, sources, (row - first for row in removed if row >= first), count)


def all_steps(args: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """The three steps in one process."""
    with scratch(args) as directory, NearDuplicates(directory, args.memory) as found:
        for signatures in signatures_of(args, sources, Counter()):
            found.add(signatures)
        report = search(args, sources, found)
        return {**report, **write_kept(args, sources, (row for row, _, _ in found.removed()), found.num_rows)}


def search(args: argparse.Namespace, sources: list[Source], found: NearDuplicates) -> dict[str, Any]:
    """Decide which of the rows go whose signatures were added; returns the report."""
    found.search()
    store_shingles(args, sources, found)
    clusters = found.cluster(args.threshold)
    sizes = found.sizes()
    return {
        "rows": found.num_rows,
        "copies": found.copies,
        "near_duplicates": sum((size - 1) * count for size, count in sizes.items()) - found.copies,
        "clusters": sum(sizes.values()),
        "candidates": found.num_candidates,
        "compared_pairs": clusters.compared,
        "given_up": clusters.given_up,
        "cluster_sizes": {str(size): count for size, count in sizes.items()},
        "samples": [
            {"removed": found.id_of(removed), "kept": found.id_of(kept), "similarity": round(similarity, 4)}
            for removed, kept, similarity in clusters.samples
        ],
    }


def store_shingles(args: argparse.Namespace, sources: list[Source], found: NearDuplicates) -> None:
    """Read all rows again; store the shingles of the candidates."""
    candidates = found.candidates()
    wanted, number = next(candidates, NONE)
    position = 0
    for rows in rows_and_texts(args, sources, Counter(), "compare"):
        chosen: dict[int, str] = {}
        for _, text in rows:
            if position == wanted:
                chosen[number] = text
                wanted, number = next(candidates, NONE)
            position += 1
        hashes, offsets = shingles(list(chosen.values()))
        for i, candidate in enumerate(chosen):
            found.set_shingles(candidate, hashes[offsets[i] : offsets[i + 1]])
    check_count(position, found.num_rows)


def write_kept(args: argparse.Namespace, sources: list[Source], removed: Iterator[int], count: int) -> dict[str, Any]:
    """Write all of `count` rows but those whose numbers are in `removed`, in ascending order."""
    bad: Counter[str] = Counter()
    gone, position = next(removed, -1), 0
    with TableWriter(args.output) as output, writing(args.output):
        for rows in rows_and_texts(args, sources, bad, "write"):
            for row, _ in rows:
                if position == gone:
                    gone = next(removed, -1)
                else:
                    output.write(row.fields, row.line)
                position += 1
        check_count(position, count)
        output.commit()
    return {"rows": position, "removed": position - output.rows, "kept": output.rows, "bad_rows": dict(bad)}


def check_count(found: int, expected: int) -> None:
    """UserError unless a step reads as many rows as the step before it."""
    if found != expected:
        raise UserError(
            f"--input has {counted(found, 'row')}, but there are signatures of {expected:,}; give all steps the same --input, "
            "--fields, --skip-bad-rows and number of shards"
        )


def signatures_of(args: argparse.Namespace, sources: list[Source], bad: Counter[str]) -> Iterator[list[dict[str, Any]]]:
    """SIGNATURE_COLUMNS of the rows of a shard."""
    name = method_of(args)
    for rows in rows_and_texts(args, sources, bad, "signatures"):
        hashes = bands([text for _, text in rows])
        yield [
            {
                "id": id_text(row.fields.get(args.id)) or digest(text.encode("utf-8", "replace"), ID_BYTES),
                "text": digest(text.encode("utf-8", "replace"), TEXT_BYTES),
                "line": digest(row.line or to_line(row.fields), LINE_BYTES),
                "bands": of_row,
                "method": name,
            }
            for (row, text), of_row in zip(rows, hashes, strict=True)
        ]


def id_text(id: Any) -> str:
    """The id of a row, without lone surrogates, which no table can hold; "" if it has none."""
    return str(id or "").encode("utf-8", "backslashreplace").decode()


def rows_and_texts(
    args: argparse.Namespace, sources: list[Source], bad: Counter[str], task: str
) -> Iterator[list[tuple[Row, str]]]:
    """The rows of a shard and their compared texts, without bad rows: the same in all steps."""
    with Progress(task, shard_bytes(sources, args.shard), "B") as progress:
        for chunk in read_table(sources, args.shard, bad if args.skip_bad_rows else None):
            found = []
            for row in chunk.rows:
                try:
                    found.append((row, "\n".join(text_at(row, name) for name in args.fields)))
                except BadRow as reason:
                    if not args.skip_bad_rows:
                        raise row.error(str(reason)) from None
                    bad[str(reason)] += 1
            yield found
            progress.update(chunk.consumed)


def text_at(row: Row, name: str) -> str:
    """A field of a row; BadRow if it is missing or not a string."""
    if name not in row.fields:
        raise BadRow(f"{NO_KEY} {name!r}; {keys_of(row.fields)}; --fields names others")
    return text_of(row.fields, name, row.line)


def method_of(args: argparse.Namespace) -> str:
    return f"{method()}, of {' '.join(args.fields)}"


def digest(data: bytes, size: int) -> str:
    """A hash of `size` bytes, in hexadecimal digits."""
    return blake2b(data, digest_size=size).hexdigest()


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    """A directory for scratch files, removed at the end; UserError if its disk is full."""
    parent = Path(tempfile.gettempdir()) if args.output in STANDARD_OUTPUT else Path(args.output).parent
    parent = args.temporary_directory or parent
    with writing(parent), scratch_directory(parent, ".near_dedup") as directory:
        yield directory


if __name__ == "__main__":
    run_program(main)
