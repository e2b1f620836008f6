"""The sandboxes hold against the probes, report what became of a program, and fail loudly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from sandboxes import sandbox_or_skip

from megatron_ft.evaluation.sandbox import probes, sandbox
from megatron_ft.evaluation.sandbox.sandbox import Job, Sandbox, SandboxError, Step, ToolchainError

SYSTEM_PYTHON = "/usr/bin/python3"
UNPRIVILEGED = 61_234


def run_python(code: str, cpu_s: float = 5.0, **job) -> sandbox.StepReport:
    box = sandbox_or_skip()
    command = (os.path.realpath(sys.executable), "-I", "-S", "-c", code)
    return box.run(Job(job.pop("files", {}), (Step(command, cpu_s),), **job))[-1]


def as_another_user(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code as a user who is not root, with the system's Python."""
    if os.getuid() != 0 or not shutil.which("setpriv") or not Path(SYSTEM_PYTHON).exists():
        pytest.skip("needs root, setpriv and a system Python")
    ids = [f"--reuid={UNPRIVILEGED}", f"--regid={UNPRIVILEGED}", "--clear-groups"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT), **environment}
    command = ["setpriv", *ids, SYSTEM_PYTHON, "-B", "-c", code]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    if "ModuleNotFoundError" in done.stderr or "can't open file" in done.stderr:
        pytest.skip("the checkout is not readable by other users")
    return done


def test_chosen_sandbox_refuses_all_probes():
    assert probes.permitted(sandbox_or_skip()) == []


@pytest.mark.parametrize("kind", ["bwrap", "restricted"])
def test_sandbox_of_a_user_without_privileges_refuses_all_probes(kind):
    code = "from megatron_ft.evaluation.sandbox.probes import *; print(permitted(Sandbox(%r)))"
    done = as_another_user(code.replace("%r", repr(kind)))
    if "Error: bwrap" in done.stderr and ("namespace" in done.stderr or "not found" in done.stderr):
        pytest.skip("no namespaces for users on this machine")
    assert done.stdout == "[]\n", done.stderr


def test_without_a_sandbox_the_probes_succeed():
    """What the two tests above would show if nothing were refused."""
    code = "from megatron_ft.evaluation.sandbox.probes import *; print(permitted(Sandbox('none')))"
    done = as_another_user(code)
    for probe in ("network", "read_files_of_the_user", "write_files_of_the_user", "signal_others"):
        assert probe in done.stdout, done.stderr


def test_program_sees_its_files_and_a_bare_environment():
    os.environ["SECRET_TOKEN"] = "hidden"
    try:
        report = run_python(
            "import os; print(open('a/b.txt').read(), os.listdir('.'), 'SECRET_TOKEN' in os.environ)",
            files={"a/b.txt": b"text"},
        )
    finally:
        del os.environ["SECRET_TOKEN"]
    assert report.stdout == b"text ['a'] False\n", report
    assert (report.exit, report.signal, report.reason) == (0, None, "")


@pytest.mark.skipif(os.getuid() != 0, reason="root's programs only")
def test_program_of_root_runs_as_another_user():
    report = run_python("import os; print(os.getuid(), os.getgid(), os.getgroups())")
    uid, gid, groups = report.stdout.split()
    assert int(uid) == int(gid) == sandbox.unprivileged_id(0) >= 60_000 and groups == b"[]", report
    assert len({sandbox.unprivileged_id(slot) for slot in range(100)}) == 100


def test_report_has_status_signal_times_and_memory():
    assert run_python("raise SystemExit(3)").exit == 3
    assert run_python("import os; os.kill(os.getpid(), 9)").signal == 9
    report = run_python("x = bytearray(200 << 20); sum(range(3_000_000)); print(1)")
    assert report.cpu_s > 0.02 and report.wall_s > 0.02 and report.rss > 200 << 20, report


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(600)"])
def test_program_that_computes_or_sleeps_too_long_is_stopped(code):
    report = run_python(code, cpu_s=1.0)
    assert report.reason == "timeout" and report.exit is None and report.cpu_s < 3, report


def test_steps_end_with_the_first_that_fails():
    box = sandbox_or_skip()
    steps = (Step(("/bin/true",), 5.0), Step(("/bin/false",), 5.0), Step(("/bin/true",), 5.0))
    assert [report.exit for report in box.run(Job({}, steps))] == [0, 1]


def test_missing_command_is_a_toolchain_error():
    with pytest.raises(ToolchainError, match="/no/such/compiler: No such file"):
        sandbox_or_skip().run(Job({}, (Step(("/no/such/compiler",), 1.0),)))


def test_wrong_bind_is_a_sandbox_error():
    box = sandbox_or_skip()
    if box.kind != "bwrap":
        pytest.skip("needs bubblewrap")
    with pytest.raises(SandboxError, match="bwrap: .*no/such/directory"):
        box.run(Job({}, (Step(("/bin/true",), 1.0),), readable=("/no/such/directory",)))


def test_broken_sandbox_is_a_sandbox_error(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'Creating new namespace failed' >&2\nexit 1\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="bwrap: Creating new namespace failed"):
        Sandbox("bwrap").run(Job({}, (Step(("/bin/true",), 1.0),)))
    fake.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")  # claims success, runs nothing
    with pytest.raises(SandboxError, match="no report"):
        Sandbox("bwrap").run(Job({}, (Step(("/bin/true",), 1.0),)))


def test_without_bubblewrap_the_fallback_is_used_and_announced():
    code = (
        "import shutil; shutil.which = lambda *a, **k: None\n"
        "from megatron_ft.evaluation.sandbox.probes import *\n"
        "box, notice = choose_sandbox(None); print(box.kind, notice)"
    )
    done = as_another_user(code)
    assert done.stdout.startswith("restricted no bubblewrap (bwrap: not found"), done.stderr


def test_home_and_root_are_never_readable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("/", str(tmp_path), str(tmp_path / "home")):
        with pytest.raises(SandboxError, match="would be readable"):
            sandbox.check_readable(path)
    sandbox.check_readable(str(tmp_path / "home" / ".rustup"))


def test_file_outside_the_working_directory_is_refused():
    with pytest.raises(SandboxError, match="outside the working directory"):
        sandbox_or_skip().run(Job({"../x": b""}, (Step(("/bin/true",), 1.0),)))
