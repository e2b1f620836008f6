"""An evaluation on disk: its manifest, the generated texts, and the verdicts on them.

    NAME/manifest.json                       what was asked of which model; the same for all shards
    NAME/generations/TASK-LANG.SHARD.jsonl   one `Generation` per line
    NAME/results/TASK-LANG.MODE.jsonl        one `Result` per line

Records are only ever appended, so that a killed program continues where it stopped. The last line
may be truncated: readers ignore it, and the next writer removes it.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import IO, Any, TypeVar, get_args

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file, sync_file, sync_path
from megatron_ft.files.json_file import KINDS, is_a, kind_of, read_json
from megatron_ft.files.jsonl_row import BadRow, parse_object, to_line
from megatron_ft.files.output import writing

FINISHES = ("stop", "eos", "length")
STATUSES = (
    "passed", "wrong_answer", "exception", "compile_error", "timeout", "memory", "output_limit", "empty",
    "sandbox_error", "toolchain_error",
)  # fmt: skip
NO_SCORE = ("sandbox_error", "toolchain_error")  # of the machine, not of the answer: no score with one of them
MANIFEST = "manifest.json"
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Generation:
    """One sample of a model for one problem.

    `text` is all that was generated, uncut; `tokens` its length. `finish` is one of FINISHES.
    `prompt_cut` tokens were cut from the left of a prompt longer than the model's positions.
    """

    task: str
    language: str
    problem: str
    sample: int
    seed: int
    prompt_sha256: str
    text: str
    tokens: int
    finish: str
    prompt_cut: int = 0

    def __post_init__(self):
        if self.finish not in FINISHES:
            raise ValueError(f"finish is {self.finish[:40]!r}, expected one of {', '.join(FINISHES)}")


@dataclass(frozen=True)
class Result:
    """The verdict on one sample. `status` is one of STATUSES; times are in seconds, `rss` in bytes;
    `exit` and `signal` are None if the process did not end that way. `output` is the start and the
    end of what it printed."""

    problem: str
    sample: int
    program_sha256: str
    status: str
    exit: int | None
    signal: int | None
    cpu_s: float
    wall_s: float
    rss: int
    output: str
    sandbox: str
    toolchain: str

    def __post_init__(self):
        check_status(self.status)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one program, with the fields of `Result`. `key` is a digest of all it depends
    on: program, toolchain, sandbox and limits."""

    key: str
    program_sha256: str
    status: str
    exit: int | None
    signal: int | None
    cpu_s: float
    wall_s: float
    rss: int
    output: str
    sandbox: str
    toolchain: str

    def __post_init__(self):
        check_status(self.status)


R = TypeVar("R", Generation, Result, Verdict)


def check_status(status: str) -> None:
    """Raise ValueError if it is not one of STATUSES."""
    if status not in STATUSES:
        raise ValueError(f"status is {status[:40]!r}, expected one of {', '.join(STATUSES)}")


def generations_file(directory: Path, task: str, language: str, shard: str = "1-of-1") -> Path:
    """Where a shard's samples go."""
    return directory / "generations" / f"{task}-{language}.{shard}.jsonl"


def results_file(directory: Path, task: str, language: str, mode: str) -> Path:
    """Where the verdicts go."""
    return directory / "results" / f"{task}-{language}.{mode}.jsonl"


def open_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write an evaluation's manifest, or check that the existing one is equal.

    Shards may start at the same time: the first one writes it. Raises UserError that names the
    first field that differs.
    """
    path = directory / MANIFEST
    content = json.dumps(manifest, ensure_ascii=False, indent=2)
    with writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(scratch, "wb") as file:
                file.write(content.encode() + b"\n")
                sync_file(file)
            with suppress(FileExistsError):
                os.link(scratch, path)  # unlike a rename, never over an existing one
                sync_path(directory)
        finally:
            scratch.unlink(missing_ok=True)
    found, wanted = read_json(path), json.loads(content)
    for key in dict.fromkeys([*wanted, *found]):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{path}: another evaluation is in this directory: its {key!r} is {_shown(found, key)}, "
                f"now {_shown(wanted, key)}; name another --output, or remove it"
            )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an evaluation; UserError if the directory has none."""
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory}: not an evaluation (no {MANIFEST}); expected the --output of generate.py")
    return read_json(directory / MANIFEST)


def _shown(manifest: Mapping, key: str) -> str:
    text = json.dumps(manifest[key], ensure_ascii=False) if key in manifest else "missing"
    return text if len(text) <= 60 else text[:57] + "..."


class RecordWriter:
    """Appends records to a file. A truncated last line is removed first.

    Raises UserError if another process is writing the file, or it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "ab+")
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path}: another process is writing this file; wait for it, or give each process its own --shard"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.truncate(_end_of_last_line(self._file))

    def append(self, records: Iterable[Generation | Result | Verdict]) -> None:
        """Write records; they are on disk when this returns."""
        with writing(self.path):
            self._file.write(b"".join(to_line(asdict(record)) for record in records))
            sync_file(self._file)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


def _end_of_last_line(file: IO[bytes]) -> int:
    """Position after the last newline; 0 if there is none."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - TAIL_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file, without a truncated last line; [] if the file does not exist.

    Raises UserError if another line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(_record(parse_object(line), kind))
        except ValueError as reason:
            what = kind.__name__.lower()
            raise UserError(f"{path}:{number}: {reason}; expected a {what}: remove the line and run again") from None
    return records


def _record(row: dict, kind: type[R]) -> R:
    values = {field.name: row[field.name] for field in fields(kind) if field.name in row}
    for field in fields(kind):
        if field.name not in row:
            if field.name == "prompt_cut":
                continue
            raise BadRow(f"no key {field.name!r}")
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        if not any(is_a(values[field.name], one) for one in kinds if isinstance(one, type)):
            expected = " or ".join(KINDS[one] for one in kinds)
            raise BadRow(f"{field.name!r} is {kind_of(values[field.name])}, not {expected}")
    return kind(**values)


def read_generations(directory: Path, task: str, language: str) -> dict[tuple[str, int], Generation]:
    """The samples of all shards by problem and sample.

    A sample may have been generated twice, as by runs with other numbers of shards: the first, in
    the order of the files' names, is used. Raises UserError if a line belongs to another task or
    language.
    """
    found: dict[tuple[str, int], Generation] = {}
    for path in sorted((directory / "generations").glob(f"{task}-{language}.*.jsonl")):
        for generation in read_records(path, Generation):
            if (generation.task, generation.language) != (task, language):
                other = f"{generation.task}-{generation.language}"
                raise UserError(f"{path}: holds generations of {other[:60]}, expected {task}-{language}")
            found.setdefault((generation.problem, generation.sample), generation)
    return found


def check_generations(
    generations: Mapping[tuple[str, int], Generation], prompts: Mapping[str, str], where: str | Path
) -> None:
    """Check that samples answer these prompts, given as the sha256 of each problem's.

    Raises UserError if a problem is not in `prompts`, or was asked by another prompt.
    """
    for (problem, sample), generation in generations.items():
        if problem not in prompts:
            raise UserError(f"{where}: problem {problem[:40]!r} is not in the data; name the --data it was made with")
        if generation.prompt_sha256 != prompts[problem]:
            raise UserError(
                f"{where}: sample {sample} of {problem} answers another prompt (sha256 {generation.prompt_sha256[:16]}, "
                f"expected {prompts[problem][:16]}): other data, another style, or changed texts; generate again"
            )


def missing_samples(found: Iterable[tuple[str, int]], problems: Iterable[str], samples: int) -> list[tuple[str, int]]:
    """Samples, numbered from 0, that are not in `found`, of `samples` per problem."""
    done = set(found)
    return [(problem, i) for problem in problems for i in range(samples) if (problem, i) not in done]


def read_lists(path: Path) -> list[list[str]]:
    """The generations of the reference harness: a JSON list of one list of texts per problem."""
    try:
        lists = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; expected a list with one list of texts per problem") from None
    if not isinstance(lists, list) or not lists:
        raise UserError(f"{path}: {kind_of(lists)}, expected a list with one list of texts per problem")
    for i, texts in enumerate(lists):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: item {i} is not a list of texts; expected one such list per problem")
    return lists


def write_lists(path: Path, lists: list[list[str]]) -> None:
    """Write cut texts as the reference harness reads them, one list per problem."""
    with writing(path):
        replace_file(path, json.dumps(lists).encode())
