"""check_toolchains.py, and what is built once."""

import os
import threading
from pathlib import Path

import pytest
from conftest import run_program
from sandboxes import sandbox_or_skip, toolchain_or_skip

from megatron_ft.evaluation.sandbox.sandbox import ToolchainError
from megatron_ft.evaluation.toolchains import go, toolchain
from megatron_ft.evaluation.toolchains.toolchain import build_once, find_command, output_of

CHECK = "evaluation/run/check_toolchains.py"


def test_check_prints_sandbox_and_versions():
    sandbox_or_skip()
    version = toolchain_or_skip("python").version
    done = run_program(CHECK, "--languages", "python")
    assert "sandbox bwrap: " in done.stdout and "sandbox restricted: " in done.stdout
    assert f"python: {version}, works" in done.stdout


def test_check_prints_what_installs_a_missing_toolchain(tmp_path):
    sandbox_or_skip()
    (tmp_path / "bwrap").symlink_to("/usr/bin/bwrap")
    done = run_program(CHECK, "--languages", "go,js", ok=False, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "go: error: go: not found; install Go and testify" in done.stdout
    assert "missing or broken: go, js" in done.stderr and "apt-get install" in done.stderr


def test_build_once_builds_once_and_leaves_nothing_of_a_failed_build(tmp_path, monkeypatch):
    monkeypatch.setenv(toolchain.CACHE, str(tmp_path / "cache"))
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "file").write_text("built", encoding="utf-8")

    def fail(directory: Path) -> None:
        build(directory)
        raise ToolchainError("no compiler")

    with pytest.raises(ToolchainError, match="no compiler"):
        build_once("x", ("key",), fail)
    assert list((tmp_path / "cache").iterdir()) == []
    threads = [threading.Thread(target=build_once, args=("x", ("key",), build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    directory = build_once("x", ("key",), fail)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    assert (directory / "file").read_text(encoding="utf-8") == "built"
    assert build_once("x", ("other key",), build) != directory


def test_cache_that_cannot_be_written_is_a_toolchain_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(toolchain.CACHE, str(tmp_path / "file"))
    with pytest.raises(ToolchainError, match=f"name another directory in {toolchain.CACHE}"):
        build_once("x", ("key",), lambda directory: None)


def test_failing_and_missing_commands_are_toolchain_errors():
    with pytest.raises(ToolchainError, match="no-such-compiler: not found; install one"):
        find_command("no-such-compiler", "one")
    with pytest.raises(ToolchainError, match="exit status 3: some error"):
        output_of("/bin/sh", "-c", "echo some error >&2; exit 3")
    with pytest.raises(ToolchainError, match="no end within 1 s"):
        output_of("/bin/sleep", "60", seconds=1)


def test_go_tests_are_found_as_go_test_finds_them():
    source = (
        "func TestAdd(t *testing.T) {}\nfunc Test(t *testing.T) {}\nfunc Test_x(t *testing.T) {}\n"
        "func Testify(t *testing.T) {}\nfunc TestMain(m *testing.M) {}\nfunc TestTwo(t *testing.T, x int) {}\n"
    )
    main = go.files(source, {})["main.go"].decode()
    assert main.count("_test.Test") == 4 and "_test.TestMain(m)" in main
    assert all(f'"{name}"' in main for name in ("TestAdd", "Test", "Test_x"))
