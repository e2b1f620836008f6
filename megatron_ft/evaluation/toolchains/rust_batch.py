"""Several Rust programs in one compilation, each a module of its own, and in one sandbox.

It only saves time: a start of rustc and a link take ten times as long as a program. Every program
runs in a process of its own. Programs are compiled together only if their text can name neither the
operating system nor what the module or crate they are in could change. Whatever neither passes its
tests nor fails them, and whatever fails to compile, is decided by a compilation of its own.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.sandbox.sandbox import Job, Sandbox, SandboxError, Step, StepReport, ToolchainError
from megatron_ft.evaluation.toolchains.rust import SOURCE
from megatron_ft.evaluation.toolchains.toolchain import COMPILE_CPU_S, Toolchain

PROGRAMS = 24  # per compilation
ROOT = "batch.rs"
RUN_CPU_S = 5.0  # per program; one that needs more runs by itself, with its own limit
PASSED, FAILED = 0, 101  # exit statuses of Rust's test harness
NEVER_BATCHED = re.compile(
    # Attributes other than those of the tests, macros and raw identifiers.
    r"#|\b(?:macro\w*|"
    # Code that can reach other modules, in the compiler or while running.
    r"unsafe|extern|crate|impl|include\w*|mod|super|"
    # The operating system, and the name of the module or file.
    r"process|fs|net|env|option_env|os|ffi|arch|\w*asm|alloc|ptr|thread|file|module_path|type_name\w*|"
    r"Location|Backtrace|\w*hook)\b"
)
# The start of HumanEvalPack's tests; once, as an answer may have its own.
TESTS = re.compile(r"#\[cfg\(test\)\]\s*mod tests \{\s*use super::\*;\s*(?://[^\n]*\s*)*#\[test\]")
ERROR_IN = re.compile(rb"^(p[0-9a-f]{64})\.rs:\d+:\d+: error", re.MULTILINE)
FILTERED_OUT = re.compile(rb"\d+ filtered out")


def is_batchable(program: Program) -> bool:
    """Whether a program behaves in a module of a crate as it does as a crate.

    >>> tests = "#[cfg(test)]\\nmod tests { use super::*; #[test] fn t() { assert!(f()) } }"
    >>> is_batchable(Program("rust", "fn main(){} fn f() -> bool { true }" + tests, None))
    True
    >>> is_batchable(Program("rust", "fn main(){} fn f() -> bool { std::fs::f() }" + tests, None))
    False
    """
    others = TESTS.sub("", program.source, count=1)
    return len(others) < len(program.source) and not NEVER_BATCHED.search(others)


def batches(programs: Sequence[Program], workers: int) -> list[list[Program]]:
    """The programs, grouped as they are compiled, with work for each worker."""
    batchable = [program for program in programs if is_batchable(program)]
    size = max(1, min(PROGRAMS, -(-len(batchable) // workers)))
    together = [batchable[start : start + size] for start in range(0, len(batchable), size)]
    return together + [[program] for program in programs if not is_batchable(program)]


def run_together(
    programs: Sequence[Program], toolchain: Toolchain, sandbox: Sandbox, cpu_s: float, slot: int
) -> dict[Program, list[StepReport]]:
    """The reports on programs that passed or failed their tests. The others have to run singly."""
    left = {module_of(program): program for program in programs}
    while len(left) > 1:
        try:
            compiled, *runs = sandbox.run(job_of(left, toolchain, min(cpu_s, RUN_CPU_S)), slot)
        except (SandboxError, ToolchainError):
            return {}
        if compiled.exit == 0 and not compiled.reason:
            part = replace(compiled, cpu_s=compiled.cpu_s / len(left), wall_s=compiled.wall_s / len(left))
            pairs = zip(left.items(), runs, strict=True)
            return {program: [part, as_if_single(run, name)] for (name, program), run in pairs if is_verdict(run)}
        wrong = {name.decode() for name in ERROR_IN.findall(compiled.stderr)} & left.keys()
        if not wrong:
            return {}
        left = {name: program for name, program in left.items() if name not in wrong}
    return {}


def module_of(program: Program) -> str:
    """The name of a program's module."""
    return f"p{program.sha256}"


def job_of(modules: dict[str, Program], toolchain: Toolchain, cpu_s: float) -> Job:
    """Compile the modules together, and run the tests of each by itself."""
    files = {f"{name}.rs": toolchain.files(program.source)[SOURCE] for name, program in modules.items()}
    files[ROOT] = "".join(f"mod {name};\n" for name in modules).encode()
    [command] = toolchain.compile
    compile_all = (*command[: command.index(SOURCE)], "--error-format=short", ROOT)
    runs = [Step((*toolchain.run, f"{name}::"), cpu_s, independent=True) for name in modules]
    return Job(files, (Step(compile_all, COMPILE_CPU_S), *runs), toolchain.readable, toolchain.environment)


def is_verdict(run: StepReport) -> bool:
    """Whether the tests ran to their end, within all limits."""
    return run.exit in (PASSED, FAILED) and not run.reason


def as_if_single(run: StepReport, name: str) -> StepReport:
    """A report whose output is that of the program by itself."""

    def renamed(output: bytes) -> bytes:
        output = output.replace(f"{name}::".encode(), b"").replace(f"{name}.rs".encode(), SOURCE.encode())
        return FILTERED_OUT.sub(b"0 filtered out", output)

    return replace(run, stdout=renamed(run.stdout), stderr=renamed(run.stderr))
