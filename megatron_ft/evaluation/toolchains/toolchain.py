"""What all six toolchains have in common: how they are found, what they need, what they run."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.evaluation.sandbox.sandbox import Job, Step, ToolchainError

CACHE = "MEGATRON_FT_TOOLCHAIN_CACHE"
COMPILE_CPU_S = 60
BUILD_S = 1200
# CPU seconds of a program's run: the limits of the reference, there in seconds of wall-clock time.
RUN_CPU_S = {"python": 10.0, "cpp": 60.0, "js": 10.0, "java": 10.0, "go": 20.0, "rust": 300.0}


@dataclass(frozen=True)
class Toolchain:
    """How to build and run the programs of a language.

    `version`: one line that names all that may change a verdict. `files`: those of the working
    directory, from a program's source. `run` ends with the status `completed` if the program ran to
    its end. `readable` and `environment` are what the commands need in the sandbox.
    """

    language: str
    version: str
    files: Callable[[str], dict[str, bytes]]
    compile: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]
    completed: int = 0
    readable: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def job(self, source: str, cpu_s: float) -> Job:
        """The steps from a source file to its verdict; the last one is the run."""
        steps = [Step(command, COMPILE_CPU_S) for command in self.compile]
        return Job(self.files(source), (*steps, Step(self.run, cpu_s)), self.readable, self.environment)


def source_file(name: str) -> Callable[[str], dict[str, bytes]]:
    """A program that is one file."""
    return lambda source: {name: source.encode("utf-8", "surrogatepass")}


def find_command(name: str, install: str) -> str:
    """Absolute path of a command, links resolved. Raises ToolchainError with what installs it."""
    found = shutil.which(name)
    if not found:
        raise ToolchainError(f"{name}: not found; install {install}")
    return os.path.realpath(found)


def prefix_of(command: str) -> str:
    """The directory in which a command is installed: that above its bin/.

    >>> prefix_of("/opt/gcc/13/bin/g++")
    '/opt/gcc/13'
    """
    return os.path.dirname(os.path.dirname(command))


def output_of(
    *command: str, environment: Mapping[str, str] | None = None, cwd: str | Path = "/", seconds: int = 60
) -> str:
    """What a command of a toolchain prints. Raises ToolchainError if it fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no end within {seconds} s"
        raise ToolchainError(f"{command[0]}: {reason}") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        shown = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise ToolchainError(f"{' '.join(command)[:120]}: exit status {done.returncode}: {shown[:200]}")
    return done.stdout.decode(errors="replace")


def cache_directory() -> Path:
    """Where what is built once is kept. Programs under test read it, so root's is not in HOME."""
    if named := os.environ.get(CACHE):
        return Path(named).absolute()
    if os.getuid() == 0:
        return Path("/var/cache/megatron-ft")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-ft"


def build_once(name: str, key: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The directory that `build` fills, made when there is none yet for this key.

    Several processes may build it at the same time: the first to finish is used.
    """
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    directory = cache_directory() / f"{name}-{digest}"
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory.parent) as scratch:
            built = Path(scratch, "built")
            built.mkdir()
            build(built)
            try:
                built.rename(directory)
            except OSError:
                if not directory.is_dir():
                    raise
    except OSError as error:
        raise ToolchainError(f"{directory}: {error.strerror}; name another directory in {CACHE}") from None
    return directory
