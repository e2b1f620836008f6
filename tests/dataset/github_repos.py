"""Tables of BigQuery's github_repos with made-up rows, for the tests of the selection."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

REGULAR, EXECUTABLE, SYMLINK, SUBMODULE = 33188, 33261, 40960, 57344
STRUCT = [("old_mode", "int64"), ("new_mode", "int64"), ("old_path", "string"), ("new_path", "string")]
DIFFERENCE = pyarrow.struct([*STRUCT, ("old_sha1", "string"), ("new_sha1", "string")])
SCHEMAS = {
    "commits": pyarrow.schema(
        [
            *(("commit", "string"), ("tree", "string"), ("subject", "string"), ("message", "string")),
            ("repo_name", pyarrow.list_(pyarrow.string())),
            ("difference", pyarrow.list_(DIFFERENCE)),
            ("difference_truncated", "bool"),
        ]
    ),
    "licenses": pyarrow.schema([("repo_name", "string"), ("license", "string")]),
    "languages": pyarrow.schema(
        [
            ("repo_name", "string"),
            ("language", pyarrow.list_(pyarrow.struct([("name", "string"), ("bytes", "int64")]))),
        ]
    ),
}


def modified(path: str, mode: int = REGULAR, new_mode: int = 0, new_path: str = "", blobs: str = "ab") -> dict:
    """An entry of a commit's difference; `blobs` are the digits of the ids before and after."""
    return {
        **{"old_mode": mode, "new_mode": new_mode or mode, "old_path": path, "new_path": new_path or path},
        **{"old_sha1": blobs[0] * 40, "new_sha1": blobs[1] * 40},
    }


def added(path: str) -> dict:
    return {name: None if name.startswith("old") else value for name, value in modified(path).items()}


def commit(id: str, subject: str, *difference: dict, repos: Sequence[str], message: str = "", **fields) -> dict:
    row = {"commit": id, "subject": subject, "message": message or subject + "\n", "repo_name": list(repos)}
    return row | {"difference": list(difference), "difference_truncated": False} | fields


def write_parquet(directory: Path, table: str, rows: list[dict], name: str = "") -> Path:
    path = directory / f"{name or table}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMAS[table]), path)
    return path


def write_bigquery_json(directory: Path, table: str, rows: list[dict], name: str = "") -> Path:
    """As BigQuery exports JSON: integers as strings, what is NULL or empty left out."""

    def exported(value):
        if isinstance(value, dict):
            return {key: exported(inner) for key, inner in value.items() if inner is not None and inner != []}
        if isinstance(value, list):
            return [exported(inner) for inner in value]
        return str(value) if type(value) is int else value

    path = directory / f"{name or table}.jsonl"
    path.write_text("".join(json.dumps(exported(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read_parquet(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()
