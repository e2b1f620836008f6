"""One mutated input: how it is made, read by a program's entry in this process, and judged.

An input must end in success, or in status 2 with exactly one `error:` line, the last one, that is
printable. Anything else is a `Failure`.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType, ModuleType
from typing import Any

from mutations import ANY, Mutator

from megatron_ft.printable import MAX_CHARACTERS

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 512 << 20  # bytes of resident memory that one input may add
FORBIDDEN = "/etc/hostname"  # a path that mutations write into files
MUST_BE_REFUSED = "must be refused: "  # in the description of a hand-written input
ANY_FRACTION = 0.3  # of inputs, mutated as any file, whatever its format


@dataclass(frozen=True)
class Reader:
    """What is fuzzed. `make(directory)` writes an intact input, `read(directory)` reads it and
    raises UserError if it cannot.

    `files` are the mutated files and the mutators of their formats; `fixed` are hand-written inputs
    (file, description, content). With `exact`, what `read` returns for a mutated input must be what
    it returns for the intact one. `finish(directory, random)` is called after the mutation, to
    renew a checksum that would hide it. With `refuses` False, no input may be refused either.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[tuple[str, tuple[Mutator, ...]], ...]
    fixed: tuple[tuple[str, str, bytes], ...] = ()
    exact: bool = False
    count: int = 200
    finish: Callable[[Path, Random], None] | None = None
    refuses: bool = True
    inputs_per_worker: int = 50


@dataclass(frozen=True)
class Failure:
    """One input that ended wrongly. `kind` is equal for all of the same cause, as far as known."""

    number: int
    kind: str
    mutation: str
    detail: str = ""


def program(path: str, *words: str | Path) -> int | None:
    """Call `main` of a program of this project with a command line; UserError passes through."""
    module = _program(path)
    sys.argv = [path, *map(str, words)]
    return module.main()


@cache
def _program(path: str) -> ModuleType:
    first = sys.path[0]
    spec = importlib.util.spec_from_file_location("fuzzed_" + Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path[0] = first  # programs put the repository root there
    return module


def watch_opened_files() -> dict:
    """{"allowed": directory, "opened": what Python opened outside it}; with "allowed" None all may
    be opened. The hook cannot be removed, so one process calls this once."""
    watched: dict[str, Any] = {"allowed": None, "opened": []}
    writing = {
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "shutil.rmtree",
        "os.truncate",
    }

    def hook(event: str, arguments: tuple) -> None:
        if watched["allowed"] is None or (event != "open" and event not in writing):
            return
        path = arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return
        absolute = os.path.abspath(path)
        writes = event != "open" or (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if absolute == FORBIDDEN or (writes and not f"{absolute}/".startswith((watched["allowed"], "/dev/", "/proc/"))):
            watched["opened"].append(f"{event} {ascii(path)[:80]}")

    sys.addaudithook(hook)
    return watched


def run_input(
    reader: Reader,
    folder: Path,
    number: int | None,
    reference: Any,
    watched: dict,
    begin: Callable[[str], object] = len,
) -> Any:
    """Run one input, None for the intact one, and judge it: a Failure, or a dict of value, status,
    memory (bytes) and seconds. `begin` is called with the mutation before the input is read."""
    case = folder / ("intact" if number is None else f"input-{number}")
    directory = case / "in"
    if number is None:
        directory.mkdir(parents=True)
        reader.make(directory)
        shutil.copytree(directory, folder / "template")
        mutation = "none"
    else:
        shutil.copytree(folder / "template", directory)
        mutation = _mutate(reader, directory, number)
    bait = case / "outside"
    shutil.copy(folder / "template" / reader.files[0][0], bait)
    os.utime(bait, (0, 1000))  # reading it sets its access time, also in native code
    (case / "cwd").mkdir()
    os.chdir(case / "cwd")
    os.environ["TMPDIR"] = tempfile.tempdir = str(case)
    begin(mutation)
    stdout = open(case / "stdout", "w", encoding="utf-8")  # noqa: SIM115 - real files have a fileno
    stderr = open(case / "stderr", "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before, started = _memory("VmRSS"), time.monotonic()
    watched.update(allowed=str(case) + "/", opened=[])
    value, status, kind, detail = None, 0, "", ""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            value, status = _call(lambda: reader.read(directory))
        except BaseException as error:  # noqa: BLE001 - also panics of native code
            kind, detail = _describe(error)
    watched["allowed"] = None
    seconds, memory = time.monotonic() - started, _memory("VmHWM") - before
    stdout.close()
    stderr.close()
    printed, errors = ((case / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    kind = kind or _judge_output(status, printed, errors)
    if not kind and status == 2 and (number is None or not reader.refuses):
        kind = "refused"
    if not kind and MUST_BE_REFUSED in mutation and status == 0:
        kind = "not refused"
    if not kind and watched["opened"]:
        kind, detail = "opened outside its directory", "; ".join(watched["opened"][:3])
    if not kind and bait.stat().st_atime:
        kind = "read a file outside its directory"
    if not kind and memory > MEMORY:
        kind, detail = f"memory: more than {MEMORY >> 20} MiB", f"{memory >> 20} MiB"
    if (
        not kind
        and number is not None
        and reader.exact
        and number >= len(reader.fixed)
        and status == 0
        and value != reference
    ):
        kind, detail = "read as if intact, with other data", ""
    if "MEGATRON_FT_FUZZ_CASE" not in os.environ:
        os.chdir("/")
        shutil.rmtree(case, ignore_errors=True)
    if kind:
        detail = detail or errors.strip()[-300:]
        return Failure(-1 if number is None else number, kind, mutation, ascii(detail)[1:-1])
    return {"value": value if number is None else None, "status": status, "memory": memory, "seconds": seconds}


def _mutate(reader: Reader, directory: Path, number: int) -> str:
    """Change one file of the input; the seed is the reader's name and the number."""
    random = Random(f"{reader.name} {number}")
    if number < len(reader.fixed):
        file, description, content = reader.fixed[number]
        (directory / file).write_bytes(content)
    else:
        file, mutators = random.choice(reader.files)
        intact = (directory / file).read_bytes()
        content, description = random.choice(ANY if not mutators or random.random() < ANY_FRACTION else mutators)(
            random, intact
        )
        (directory / file).write_bytes(content)
    if reader.finish:
        reader.finish(directory, random)
    return f"{file}: {description}"


def _call(read: Callable[[], Any]) -> tuple[Any, int]:
    """What a program's main gives, and its exit status."""
    from megatron_ft.errors import run_program

    value = None

    def main() -> int:
        nonlocal value
        value = read()
        return 0

    try:
        run_program(main)
    except SystemExit as end:
        return value, end.code if isinstance(end.code, int) else 1 if end.code else 0
    return value, 0


def _judge_output(status: int, printed: str, errors: str) -> str:
    """What is wrong with the status and the output; empty if nothing is."""
    if status not in (0, 2):
        return f"exit status {status}"
    if "Traceback" in errors:
        return "a traceback on stderr"
    if odd := {c for c in printed + errors if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"}:
        return f"control characters in the output: {ascii(''.join(sorted(odd))[:5])}"
    if status == 0:
        return ""
    lines = errors.splitlines()
    if not lines or not lines[-1].startswith("error: ") or sum(line.startswith("error: ") for line in lines) != 1:
        return "status 2, but the last line of stderr is not the only error line"
    if not lines[-1].isprintable():
        return "an error line with unprintable characters"
    if len(lines[-1].removeprefix("error: ")) > MAX_CHARACTERS:
        return f"an error message of more than {MAX_CHARACTERS} characters"
    return ""


def _describe(error: BaseException) -> tuple[str, str]:
    """(type and innermost frame of this project, message)."""
    place = "?"
    frames: list[tuple[FrameType, int]] = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, AssertionError) and Path(frames[-1][0].f_code.co_filename).parent == Path(__file__).parent:
        return str(error) or "AssertionError of the test", ""
    for frame, line in frames:
        if is_ours(frame.f_code.co_filename):
            place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{line} ({frame.f_code.co_name})"
    with contextlib.suppress(Exception):
        return f"{type(error).__name__} at {place}", " ".join(str(error).split())[:300]
    return f"{type(error).__name__} at {place}", ""


def is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv")


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(name + ":")[2].split()[0]) << 10
