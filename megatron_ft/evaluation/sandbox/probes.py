"""Hostile probes: what a sandbox really refuses on this machine decides which one is used."""

import json
import os
import secrets
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_ft.evaluation.sandbox.sandbox import (
    MEMORY,
    PROCESSES,
    Job,
    Sandbox,
    SandboxError,
    Step,
    ToolchainError,
)

# Each probe tries what a program must not be able to do, and raises if it is refused.
PROBE = """\
import json, os, socket, subprocess, sys, time
port, parent, secret, python, marker, memory, processes = json.loads(sys.argv[1])

def network():
    socket.create_connection(("127.0.0.1", port), 2).close()

def read_files_of_the_user():
    open(secret).read()

def write_files_of_the_user():
    open(secret, "w").close()

def write_system_files():
    for directory in ("/", "/usr", "/usr/lib", "/etc", "/var", "/home", "/dev/shm"):
        try:
            open(os.path.join(directory, marker), "w").write("x" * 100_000)
        except OSError:
            continue
        os.remove(os.path.join(directory, marker))
        return
    raise OSError

def read_the_environment_of_others():
    if "megatron" not in open(f"/proc/{parent}/environ").read() + open(f"/proc/{parent}/cmdline").read():
        raise OSError

def signal_others():
    os.kill(parent, 0)
    if os.stat(f"/proc/{parent}").st_uid is None:
        raise OSError

def allocate():
    bytearray(memory + (64 << 20))

def fork_without_limit():
    read, write = os.pipe()
    for _ in range(processes + 8):
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)

subprocess.Popen([python, "-I", "-S", "-c", "import time; time.sleep(600)", marker], start_new_session=True)
refused = []
for probe in (network, read_files_of_the_user, write_files_of_the_user, write_system_files,
              read_the_environment_of_others, signal_others, allocate, fork_without_limit):
    try:
        probe()
    except (OSError, MemoryError):
        refused.append(probe.__name__)
print(json.dumps(refused), flush=True)
"""
PROBES = (
    "network",
    "read_files_of_the_user",
    "write_files_of_the_user",
    "write_system_files",
    "read_the_environment_of_others",
    "signal_others",
    "allocate",
    "fork_without_limit",
)
OUTLIVE = "outlive_the_run"
CPU_S = 30.0


def permitted(sandbox: Sandbox) -> list[str]:
    """The probes that a sandbox does not refuse; [] if it holds.

    Raises SandboxError or ToolchainError if it cannot run them.
    """
    marker = f"megatron-probe-{secrets.token_hex(8)}"
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text(marker, encoding="utf-8")
        secret.chmod(0o666)
        Path(folder).chmod(0o777)
        python = os.path.realpath(sys.executable)
        facts = (server.getsockname()[1], os.getpid(), str(secret), python, marker, MEMORY, PROCESSES)
        job = Job({}, (Step((python, "-I", "-S", "-c", PROBE, json.dumps(facts)), CPU_S),))
        report = sandbox.run(job)[-1]
    try:
        refused = json.loads(report.stdout)
    except ValueError:
        last = report.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxError(f"{sandbox.kind}: the probes did not run: {report.reason or ''.join(last)}") from None
    return [probe for probe in PROBES if probe not in refused] + ([OUTLIVE] if is_running(marker) else [])


def is_running(marker: str) -> bool:
    """Whether a process has this word in its command line."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if marker.encode() in Path(f"/proc/{process}/cmdline").read_bytes() and int(process) != os.getpid():
                return True
    return False


def choose_sandbox(kind: str | None) -> tuple[Sandbox, str]:
    """The sandbox of a kind, or the best one that holds on this machine, and a notice or "".

    Raises SandboxError if it does not hold, ToolchainError if it cannot start Python.
    """
    if kind == "none":
        return Sandbox(kind), "no sandbox: programs can use the network, and read and write your files"
    if kind is not None:
        return checked(kind), ""
    try:
        return checked("bwrap"), ""
    except (SandboxError, ToolchainError) as error:
        reason = str(error)
    try:
        return checked("restricted"), f"no bubblewrap ({reason}); using Landlock and seccomp (restricted)"
    except (SandboxError, ToolchainError) as error:
        raise SandboxError(f"{reason}; {error}; to run programs without protection, type --sandbox none") from None


def checked(kind: str) -> Sandbox:
    """A sandbox that refuses all probes."""
    sandbox = Sandbox(kind)
    if failed := permitted(sandbox):
        raise SandboxError(f"{kind}: does not refuse to {', '.join(failed).replace('_', ' ')}")
    return sandbox
