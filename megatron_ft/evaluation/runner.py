"""Run programs and give each its verdict.

Programs run in as many sandboxes at a time as there are workers; Rust's are compiled, and run, many
in one. Those that time out, or get no process where the user's processes are counted together, run
again, one at a time, once all others have ended: a verdict is a fact about the program, not about
the load.
"""

import hashlib
import os
import queue
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack

from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.records import Verdict
from megatron_ft.evaluation.sandbox.sandbox import (
    MEMORY,
    OUTPUT,
    PROCESSES,
    Job,
    Sandbox,
    SandboxError,
    StepReport,
    ToolchainError,
)
from megatron_ft.evaluation.toolchains import rust_batch
from megatron_ft.evaluation.toolchains.compile_server import CompileServer
from megatron_ft.evaluation.toolchains.toolchain import COMPILE_CPU_S, Toolchain

VERSION = 2  # of the rules below: part of a verdict's key
SHOWN = 2048  # bytes of output kept from its start, and from its end
OUT_OF_MEMORY = re.compile(
    rb"MemoryError|std::bad_alloc|heap out of memory|Array buffer allocation failed|OutOfMemoryError|"
    rb"(?:runtime|fatal error): out of memory|cannot allocate memory|memory allocation of \d+ bytes failed"
)
ASSERTION = re.compile(rb"AssertionError|[Aa]ssertion (?:`.*`?)? *failed|Assertion `|--- FAIL")
NO_PROCESS = re.compile(
    r"Resource temporarily unavailable|uv_thread_create|pthread_create|create (?:native|new OS) thread|can't start new"
)
PANIC = re.compile(rb"^panic: |\[recovered\]", re.MULTILINE)
SYNTAX = re.compile(rb"^(?:SyntaxError|IndentationError|TabError)\b", re.MULTILINE)


def default_workers() -> int:
    """One per core that this process may use: its affinity, and SLURM's CPUs per task."""
    cores = len(os.sched_getaffinity(0))
    allotted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(cores, int(allotted)) if allotted.isdigit() else cores)


def key_of(program: Program, toolchain: Toolchain, sandbox: Sandbox, cpu_s: float) -> str:
    """Digest of all that a verdict depends on."""
    limits = (cpu_s, COMPILE_CPU_S, MEMORY, OUTPUT, PROCESSES)
    parts = (VERSION, program.language, program.nonce, program.sha256, toolchain.version, sandbox.kind, *limits)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def run_programs(
    programs: Sequence[Program], toolchain: Toolchain, sandbox: Sandbox, workers: int, cpu_s: float
) -> Iterator[tuple[Program, Verdict]]:
    """The verdicts on programs of one language, as they come. `cpu_s` limits a run's CPU time."""
    worker = Worker(toolchain, sandbox, cpu_s)
    again = []
    with ExitStack() as stack:
        slots: queue.SimpleQueue = queue.SimpleQueue()
        for slot in range(workers):
            server = CompileServer(toolchain, sandbox, slot) if toolchain.language == "java" else None
            if server:
                stack.callback(server.close)
            slots.put((slot, server))

        def verdicts(batch: Sequence[Program]) -> list[tuple[Program, Verdict]]:
            slot, server = slots.get()
            try:
                return worker.verdicts(batch, slot, server)
            finally:
                slots.put((slot, server))

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        rust = toolchain.language == "rust"
        waiting = iter(rust_batch.batches(programs, workers) if rust else [[program] for program in programs])
        running = {pool.submit(verdicts, batch) for _, batch in zip(range(2 * workers), waiting, strict=False)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for program, result in [pair for future in done for pair in future.result()]:
                if workers > 1 and (result.status == "timeout" or NO_PROCESS.search(result.output)):
                    again.append(program)
                else:
                    yield program, result
            running |= {pool.submit(verdicts, batch) for _, batch in zip(done, waiting, strict=False)}
    for program in again:
        yield program, worker.verdict(program, 0, None)


class Worker:
    """Runs programs and judges them."""

    def __init__(self, toolchain: Toolchain, sandbox: Sandbox, cpu_s: float):
        self.toolchain, self.sandbox, self.cpu_s = toolchain, sandbox, cpu_s

    def verdicts(
        self, batch: Sequence[Program], slot: int, server: CompileServer | None
    ) -> list[tuple[Program, Verdict]]:
        """The verdicts on programs that may run in one sandbox; more than one for Rust only."""
        done = {}
        if len(batch) > 1:
            reports = rust_batch.run_together(batch, self.toolchain, self.sandbox, self.cpu_s, slot)
            done = {program: self._judged(program, steps, len(steps)) for program, steps in reports.items()}
        return [(program, done.get(program) or self.verdict(program, slot, server)) for program in batch]

    def verdict(self, program: Program, slot: int, server: CompileServer | None) -> Verdict:
        """The verdict on a program that runs by itself.

        Never raises for what a program or the machine does: that is its status."""
        try:
            job = self.toolchain.job(program.source, self.cpu_s)
            classes = server.classes(program.source) if server else None
            if classes is not None:
                job = Job(classes, job.steps[-1:], job.readable, job.environment)
            return self._judged(program, self.sandbox.run(job, slot), len(job.steps))
        except ToolchainError as error:
            return self._verdict(program, "toolchain_error", [], str(error))
        except SandboxError as error:
            return self._verdict(program, "sandbox_error", [], str(error))

    def _judged(self, program: Program, reports: list[StepReport], steps: int) -> Verdict:
        status = status_of(program, reports, steps, self.toolchain.completed)
        return self._verdict(program, status, reports)

    def _verdict(self, program: Program, status: str, reports: list[StepReport], message: str = "") -> Verdict:
        last = reports[-1] if reports else None
        output = last.stdout + last.stderr if last else message.encode()
        return Verdict(
            key=key_of(program, self.toolchain, self.sandbox, self.cpu_s),
            program_sha256=program.sha256,
            status=status,
            exit=(0 if last.exit == self.toolchain.completed else last.exit) if last else None,
            signal=last.signal if last else None,
            cpu_s=round(sum(report.cpu_s for report in reports), 3),
            wall_s=round(sum(report.wall_s for report in reports), 3),
            rss=max((report.rss for report in reports), default=0),
            output=head_and_tail(output),
            sandbox=self.sandbox.kind,
            toolchain=self.toolchain.version,
        )


def status_of(program: Program, reports: list[StepReport], steps: int, completed: int = 0) -> str:
    """The status of a program from the reports on its steps, of which there are `steps`.

    `completed` is the status with which a program ends that has run to its end.
    """
    last = reports[-1]
    output = last.stdout[-SHOWN:] + b"\n" + last.stderr[-SHOWN:]
    if last.reason:
        return "output_limit" if last.reason == "output" else last.reason
    if len(reports) < steps:
        return "memory" if OUT_OF_MEMORY.search(output) else "compile_error"
    exit_status = {completed: 0}.get(-1 if last.exit is None else last.exit, last.exit or 1)
    if last.signal is None and program.passed(exit_status, last.stdout, last.stderr):
        return "passed"
    if OUT_OF_MEMORY.search(output) or OUT_OF_MEMORY.search(last.stderr[:SHOWN]):  # Go's stacks follow it
        return "memory"
    if program.language in ("python", "js") and SYNTAX.search(output):
        return "compile_error"
    return "wrong_answer" if ASSERTION.search(output) and not PANIC.search(output) else "exception"


def head_and_tail(output: bytes) -> str:
    """The start and the end of an output."""
    if len(output) > 2 * SHOWN:
        omitted = f"\n... {len(output) - 2 * SHOWN:,} bytes ...\n".encode()
        output = output[:SHOWN] + omitted + output[-SHOWN:]
    return output.decode(errors="replace")
