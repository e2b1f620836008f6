"""Sandboxes and toolchains for the tests: skipped where this machine has none."""

import functools

import pytest

from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.records import Verdict
from megatron_ft.evaluation.runner import run_programs
from megatron_ft.evaluation.sandbox.probes import choose_sandbox
from megatron_ft.evaluation.sandbox.sandbox import Sandbox, SandboxError, ToolchainError
from megatron_ft.evaluation.toolchains.find import find_toolchain
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

CPU_S = 60.0  # for programs that end by themselves, on any machine; where it is reached, a test gives its own


@functools.cache
def working_sandbox() -> Sandbox | str:
    try:
        return choose_sandbox(None)[0]
    except (SandboxError, ToolchainError) as error:
        return str(error)


@functools.cache
def working_toolchain(language: str) -> Toolchain | str:
    try:
        return find_toolchain(language)
    except ToolchainError as error:
        return str(error)


def sandbox_or_skip() -> Sandbox:
    sandbox = working_sandbox()
    if isinstance(sandbox, str):
        pytest.skip(sandbox)
    return sandbox


def toolchain_or_skip(language: str) -> Toolchain:
    toolchain = working_toolchain(language)
    if isinstance(toolchain, str):
        pytest.skip(toolchain)
    return toolchain


def verdict_on(language: str, source: str, cpu_s: float = CPU_S, nonce: str | None = None) -> Verdict:
    """The verdict on one program."""
    sandbox, toolchain = sandbox_or_skip(), toolchain_or_skip(language)
    [(_, verdict)] = run_programs([Program(language, source, nonce)], toolchain, sandbox, 1, cpu_s)
    return verdict
