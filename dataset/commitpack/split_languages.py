"""Sort commit rows into one folder per language, in shards of at most 500 MiB, as CommitPack is
published.

    python dataset/commitpack/split_languages.py --input scraped/ --output commitpack \\
        --licenses licenses.jsonl --opt-out owners.txt --plot languages.svg

Writes OUTPUT/python/python-0001.jsonl and so on. A row's language is its `lang`, if that is one of
CommitPack's, else the language of its file name; its license is looked up by repository. Rows whose
text does not change are written as they were read. OUTPUT_report.json has rows, shards and
megabytes per language. OUTPUT appears when it is complete, and may not exist before.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import io
import shutil
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import IO, Any

from megatron_ft.commits.languages import NAMES, directory_name, language_of
from megatron_ft.commits.licenses import UNKNOWN
from megatron_ft.commits.opt_out import has_opted_out, read_owners
from megatron_ft.commits.row import CommitRow
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.extras import require
from megatron_ft.files.atomic import rename_directory, replace_file, sync_file, sync_path
from megatron_ft.files.jsonl import Source, shard_bytes
from megatron_ft.files.jsonl_row import NO_KEY, keys_of, to_line
from megatron_ft.files.output import scratch_directory, writing
from megatron_ft.files.report import write_report
from megatron_ft.files.tables import Row, TableWriter, open_tables, read_table
from megatron_ft.printable import counted
from megatron_ft.progress import Progress

OPEN_FILES = 64  # at a time, whatever the number of languages
PLOT_FORMATS = (".png", ".pdf", ".svg")
PLOTTED = 40  # languages
COLUMNS = {column.name: "string" for column in fields(CommitRow)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="commit rows: JSONL (also .gz, .zst) or parquet files, directories of them, or - for stdin",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="directory to create")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="format of the shards")
    add("--shard-mib", type=int, default=500, metavar="MIB", help="JSONL text per shard, in MiB")
    add("--licenses", metavar="FILE", help='JSONL of {"repos": "a/b,c/d", "license": "mit"} (default: keep the rows\')')
    add("--opt-out", metavar="FILE", help="owners of repositories, one per line, whose rows are dropped")
    add("--plot", type=Path, metavar="FILE", help="megabytes per language as .png, .pdf or .svg")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    args = parser.parse_args(argv)
    if args.shard_mib < 1:
        raise UserError(f"--shard-mib {args.shard_mib}: must be at least 1")
    if args.plot and args.plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
    if args.licenses == "-" and "-" in args.input:
        raise UserError("standard input (-) can be read only once; give --licenses a file")
    with writing(args.output):
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise UserError(f"--output {args.output}: exists; remove it, or choose another directory")
    return args


def main() -> None:
    args = parse_args()
    if args.plot:
        require("matplotlib", "plots")
    if args.format == "parquet":
        require("pyarrow", "dataset")
    owners = read_owners(args.opt_out) if args.opt_out else frozenset()
    licenses = read_licenses(args.licenses) if args.licenses else {}
    sources = open_tables(args.input)
    output = args.output.resolve()
    counts: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    with writing(args.output), scratch_directory(output.parent, f".{output.name}") as scratch:
        shards = Shards(scratch, args.shard_mib << 20)
        split(sources, shards, licenses, owners, counts, bad if args.skip_bad_rows else None)
        shards.close()
        if not shards.languages:
            raise UserError(f"{sources[0].name}: no row to write of {counts['rows_in']:,}; expected rows of CommitPack")
        if args.format == "parquet":
            to_parquet(shards)
        table = shards.table()
        if output.exists():
            output.rmdir()  # empty
        for language in shards.languages:
            sync_path(scratch / directory_name(language))
        rename_directory(scratch, output)
    rows_out = sum(entry["rows"] for entry in table.values())
    report = {"rows_in": counts["rows_in"], "rows_out": rows_out, "dropped": {"opt_out": counts["opt_out"]}}
    report |= {"unknown_license": counts["unknown_license"], "bad_rows": dict(bad), "languages": table}
    write_report(output, report)
    if args.plot:
        with writing(args.plot):
            replace_file(args.plot, plot_of(table, args.plot.suffix[1:]))
    for line in lines_of(table):
        print(line, file=sys.stderr)
    notes = [f"; {counts['opt_out']:,} of owners who opted out dropped"] if counts["opt_out"] else []
    notes += [f"; {counted(bad.total(), 'bad row')} skipped"] if bad else []
    summary = f"{counted(counts['rows_in'], 'row')}, {rows_out:,} in {len(table)} languages -> {args.output}"
    print(summary + "".join(notes), file=sys.stderr)


def read_licenses(path: str) -> dict[str, str]:
    """License per repository, in lower case; the first entry of a repository counts."""
    licenses: dict[str, str] = {}
    for chunk in read_table(open_tables([path])):
        for row in chunk.rows:
            repos, license = row.fields.get("repos"), row.fields.get("license")
            if not isinstance(repos, str) or not isinstance(license, str):
                raise row.error('expected {"repos": "owner/name,...", "license": "mit"}')
            for repo in repos.split(","):
                licenses.setdefault(repo.strip().lower(), license)
    return licenses


def split(
    sources: list[Source],
    shards: "Shards",
    licenses: dict[str, str],
    owners: frozenset[str],
    counts: Counter[str],
    bad: Counter[str] | None,
) -> None:
    """Write each row to the shard of its language, and count."""
    with Progress("split", shard_bytes(sources), "B") as progress:
        for chunk in read_table(sources, bad=bad):
            for row in chunk.rows:
                if reason := why_bad(row.fields):
                    if bad is None:
                        raise row.error(reason)
                    bad[reason] += 1
                    continue
                counts["rows_in"] += 1
                if owners and has_opted_out(row.fields.get("repos"), owners):
                    counts["opt_out"] += 1
                    continue
                changed = completed(row, licenses)
                counts["unknown_license"] += changed["license"] == UNKNOWN
                unchanged = row.line is not None and changed == row.fields
                shards.add(changed["lang"], row.line if unchanged and row.line else to_line(changed))
            progress.update(chunk.consumed)


def why_bad(row: dict[str, Any]) -> str | None:
    """Why a row cannot be sorted; None if it can."""
    if not isinstance(row.get("new_file"), str):
        return "'new_file' is not a string" if "new_file" in row else f"{NO_KEY} 'new_file'; {keys_of(row)}"
    for name in COLUMNS:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name!r} is not a string"
        try:
            if value and not value.isascii():
                value.encode()
        except UnicodeEncodeError:
            return "lone surrogate"
    return None


def completed(row: Row, licenses: dict[str, str]) -> dict[str, Any]:
    """The fields with `lang` and `license`, CommitPack's keys first and in its order."""
    fields = row.fields
    repos = (fields.get("repos") or "").split(",")
    found = (licenses.get(repo.strip().lower()) for repo in repos) if licenses else ()
    license = next(filter(None, found), None) or fields.get("license") or UNKNOWN
    lang = fields.get("lang")
    if lang not in NAMES:
        lang = language_of(fields["new_file"])
    if lang == fields.get("lang") and license == fields.get("license"):
        return fields
    fields = {**fields, "lang": lang, "license": license}
    return {name: fields[name] for name in COLUMNS if name in fields} | fields


@dataclass
class Language:
    """What was written of a language: its last shard has `size` bytes so far."""

    shards: int = 0
    rows: int = 0
    size: int = 0


class Shards:
    """JSONL files DIRECTORY/LANGUAGE/LANGUAGE-0001.jsonl of at most `limit` bytes, unless a single
    row has more; no more than OPEN_FILES are open at a time."""

    def __init__(self, directory: Path, limit: int):
        self.directory, self.limit = directory, limit
        self.suffix = ".jsonl"
        self.languages: dict[str, Language] = {}
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()  # least recently used first

    def add(self, language: str, line: bytes) -> None:
        """Append a line to the last shard of a language, or to a new one if that is full."""
        entry = self.languages.setdefault(language, Language())
        if not entry.shards or entry.size + len(line) > self.limit:
            self._close(language)
            entry.shards += 1
            entry.size = 0
        self._file(language).write(line)
        entry.rows += 1
        entry.size += len(line)

    def paths(self, language: str) -> list[Path]:
        """The shards of a language."""
        name = directory_name(language)
        numbers = range(1, self.languages[language].shards + 1)
        return [self.directory / name / f"{name}-{number:04}{self.suffix}" for number in numbers]

    def _file(self, language: str) -> IO[bytes]:
        if language not in self._open:
            if len(self._open) == OPEN_FILES:
                self._close(next(iter(self._open)))
            path = self.paths(language)[-1]
            path.parent.mkdir(exist_ok=True)
            self._open[language] = open(path, "ab", buffering=1 << 18)
        self._open.move_to_end(language)
        return self._open[language]

    def _close(self, language: str) -> None:
        if file := self._open.pop(language, None):
            with file:
                sync_file(file)

    def close(self) -> None:
        """Write everything to disk."""
        for language in list(self._open):
            self._close(language)

    def table(self) -> dict[str, dict[str, Any]]:
        """Directory, rows, shards and megabytes (10^6 bytes) per language, the largest first."""
        sizes = {name: sum(path.stat().st_size for path in self.paths(name)) for name in self.languages}
        return {
            name: {
                "directory": directory_name(name),
                "rows": self.languages[name].rows,
                "shards": self.languages[name].shards,
                "megabytes": round(sizes[name] / 1e6, 3),
            }
            for name in sorted(sizes, key=lambda name: (-sizes[name], name))
        }


def to_parquet(shards: Shards) -> None:
    """Replace each shard by a parquet file of CommitPack's ten columns, one after the other."""
    with Progress("write parquet", sum(entry.rows for entry in shards.languages.values()), " rows") as progress:
        for language in shards.languages:
            for path in shards.paths(language):
                with TableWriter(path.with_suffix(".parquet"), COLUMNS) as output:
                    for chunk in read_table(open_tables([path])):
                        for row in chunk.rows:
                            output.write(row.fields)
                            progress.update(1)
                    output.commit()
                path.unlink()
    shards.suffix = ".parquet"


def lines_of(table: dict[str, dict[str, Any]], most: int = 20) -> list[str]:
    """The table for the terminal."""
    width = min(40, shutil.get_terminal_size().columns // 2)
    lines = [f"{'language':{width}} {'rows':>14} {'shards':>8} {'MB':>14}"]
    for name, entry in list(table.items())[:most]:
        lines.append(f"{name:{width}} {entry['rows']:>14,} {entry['shards']:>8,} {entry['megabytes']:>14,.1f}")
    if len(table) > most:
        lines.append(f"and {len(table) - most} more languages in the report")
    return lines


def plot_of(table: dict[str, dict[str, Any]], image_format: str) -> bytes:
    """Megabytes of the largest languages as bars, as an image in "png", "pdf" or "svg"."""
    require("matplotlib", "plots").use("Agg")
    plots = require("matplotlib.pyplot", "plots")
    names = list(table)[:PLOTTED][::-1]
    figure, axes = plots.subplots(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    axes.barh(names, [table[name]["megabytes"] for name in names], color="tab:blue")
    rows = sum(entry["rows"] for entry in table.values())
    axes.set(xscale="log", xlabel="MB", title=f"{rows:,} rows in {len(table)} languages")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.01)
    image = io.BytesIO()
    figure.savefig(image, format=image_format, dpi=150)
    plots.close(figure)
    return image.getvalue()


if __name__ == "__main__":
    run_program(main)
