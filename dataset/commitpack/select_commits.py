"""Select CommitPack's commits, those that modified exactly one file, by the SQL stages in sql/.

    python dataset/commitpack/select_commits.py --output selected \\
        --commits tables/commits.parquet --licenses tables/licenses.parquet \\
        --languages tables/languages.parquet

The tables have the columns of BigQuery's github_repos, in parquet or JSONL: commits_table.py makes
them from local repositories, and BigQuery exports them. DuckDB runs the stages on this machine;
each writes a table and is skipped when its table exists. The result,
selected/commits_table_final.parquet, is the input of scrape_github.py: commit, subject, message,
repos, license (that of the first repository), licenses, old_file, new_file, old_sha1, new_sha1.

    python dataset/commitpack/select_commits.py --engine bigquery --project my-project \\
        --dataset commitpack

prints the commands that run the same stages on BigQuery's public tables, whose data end in 2023;
--run runs them, and --dry-run asks for the bytes that they would scan. The dataset must exist, in
the location US.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
from collections.abc import Sequence

from megatron_ft.commits.licenses import parse_licenses
from megatron_ft.commits.selection.bigquery_stages import BigQuery
from megatron_ft.commits.selection.github_tables import TABLES
from megatron_ft.commits.selection.local_stages import run_stages
from megatron_ft.commits.selection.stages import FINAL, PUBLIC_DATASET, Stage, load_stages, read_list
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.tables import open_tables

SQL = Path(__file__).resolve().parent / "sql"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--engine", choices=("duckdb", "bigquery"), default="duckdb", help="where the stages run")
    for table in TABLES:
        add(f"--{table}", nargs="+", metavar="FILE", help=f"{table} table: parquet or JSONL files, or a directory")
    add("--output", type=Path, metavar="DIR", help="directory of the stages' tables")
    add("--memory", type=int, metavar="MIB", help="memory for DuckDB (default: three quarters of the job's)")
    add("--allowed-licenses", default="published", help="comma-separated list, or permissive, or published")
    add("--repository-languages", type=Path, default=SQL / "languages.txt", metavar="FILE", help="one per line")
    add("--noise-subjects", type=Path, default=SQL / "noise_subjects.txt", metavar="FILE", help="one per line")
    bigquery = parser.add_argument_group("BigQuery").add_argument
    bigquery("--project", help="project that pays")
    bigquery("--dataset", help="existing dataset for the tables of the stages")
    bigquery("--source", default=PUBLIC_DATASET, help="PROJECT.DATASET of the tables that are read")
    bigquery("--export-uri", metavar="URI", help="gs://BUCKET/PATH-*.parquet for the result")
    bigquery("--max-bytes-billed", type=int, metavar="N", help="refuse a stage that scans more")
    bigquery("--dry-run", action="store_true", help="estimate the bytes scanned, run nothing")
    bigquery("--run", action="store_true", help="run the commands instead of printing them")
    args = parser.parse_args(argv)
    needed = ("output", *TABLES) if args.engine == "duckdb" else ("project", "dataset")
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise UserError(f"--engine {args.engine} needs {', '.join(missing)}")
    if args.memory is not None and args.memory < 64:
        raise UserError(f"--memory {args.memory}: must be at least 64 MiB")
    return args


def main() -> None:
    args = parse_args()
    stages = load_stages(
        SQL,
        {
            "licenses": sorted(parse_licenses(args.allowed_licenses, "--allowed-licenses")),
            "languages": read_list(args.repository_languages),
            "noise_subjects": [subject.lower() for subject in read_list(args.noise_subjects)],
        },
    )
    if args.engine == "bigquery":
        on_bigquery(args, stages)
        return
    inputs = {table: open_tables(getattr(args, table)) for table in TABLES}
    result = run_stages(stages, inputs, args.output, args.memory and args.memory << 20)
    print(f"selected commits -> {result}", file=sys.stderr)


def on_bigquery(args: argparse.Namespace, stages: list[Stage]) -> None:
    """Print the commands of the stages and of the export, or run them."""
    bigquery = BigQuery(args.project, args.dataset, args.source, args.dry_run, args.max_bytes_billed)
    export = bigquery.export(FINAL, args.export_uri or "gs://BUCKET/commits-*.parquet")
    if not args.run:
        print(*(bigquery.command(stage) for stage in stages), export, sep="\n")
        return
    bigquery.run(stages)
    if args.export_uri and not args.dry_run:
        bigquery.execute(export, "export")
    elif not args.dry_run:
        print(f"--export-uri was not given; this exports the result:\n{export}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
