"""Time scoring against the plain way: one process per program, and one compiler start per program.

    python bench/score.py --data humanevalpack/
    python bench/score.py --data DIR --languages python --generations generations.json

Programs are HumanEvalPack's canonical solutions. Times are CPU seconds of all processes, so that
other jobs on the machine matter little; what is built once is built before. The plain way has no
sandbox; Rust's builds its crates once, as the reference does. With --generations, lists of the
reference harness, running equal programs once is compared with running each, for the first
--programs problems.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import load_problems, parse_languages
from megatron_ft.evaluation.programs import Program, program_of
from megatron_ft.evaluation.records import read_lists
from megatron_ft.evaluation.runner import run_programs
from megatron_ft.evaluation.sandbox.probes import choose_sandbox
from megatron_ft.evaluation.sandbox.sandbox import Job, Sandbox, Step
from megatron_ft.evaluation.toolchains.find import find_toolchain
from megatron_ft.evaluation.toolchains.rust import write_project
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

CPU_S = 10.0
FILES = {"python": "test.py", "cpp": "test.cpp", "js": "test.js", "java": "Main.java", "go": "main_test.go"}
GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode"}


def main() -> None:
    parser = Parser(prog="bench/score.py", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl")
    add("--languages", default="all", help="languages, separated by commas, or all")
    add("--programs", type=int, default=20, help="programs per language, and problems of --generations")
    add("--generations", type=Path, metavar="FILE", help="fixtests-python lists of the reference harness")
    args = parser.parse_args()
    sandbox, _ = choose_sandbox(None)
    print(
        f"{len(os.sched_getaffinity(0))} cores; sandbox: {sandbox.kind}, {overhead(sandbox) * 1000:.0f} ms per program"
    )
    for language in parse_languages(args.languages):
        compare(language, args.data, args.programs, sandbox)
    if args.generations:
        duplicates(args.generations, args.data, args.programs, sandbox)


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of this process and all it starts."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    work()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True))


def overhead(sandbox: Sandbox, times: int = 20) -> float:
    """CPU seconds that a sandbox adds to a program that does nothing."""
    job = Job({}, (Step(("/bin/true",), CPU_S),))
    inside = cpu_of(lambda: [sandbox.run(job) for _ in range(times)])
    return (inside - cpu_of(lambda: [subprocess.run(["/bin/true"], check=True) for _ in range(times)])) / times


def compare(language: str, data: str, count: int, sandbox: Sandbox) -> None:
    problems = load_problems(data, language)
    chosen = [problem for problem in problems if problem.task_id not in ("Go/27", "Go/95", "Rust/32")][:count]
    answers = [cut(f"\n{problem.canonical_solution}", problem, "synthesize") for problem in chosen]
    programs = [program_of(p, "synthesize", answer) for p, answer in zip(chosen, answers, strict=True)]
    toolchain = find_toolchain(language)
    run_all(programs[:1], toolchain, sandbox)  # reads the toolchain from disk
    with tempfile.TemporaryDirectory() as folder:
        plainly(programs[0], toolchain, Path(folder, "first"), Path(folder))  # warms go's cache
        plain = cpu_of(
            lambda: [plainly(one, toolchain, Path(folder, str(i)), Path(folder)) for i, one in enumerate(programs)]
        )
    start = time.monotonic()
    ours = cpu_of(lambda: run_all(programs, toolchain, sandbox))
    print(
        f"{language:7} {60 * len(programs) / ours:6.0f} programs per CPU minute, plain {60 * len(programs) / plain:5.0f}: "
        f"{plain / ours:.1f}x; {ours / len(programs):.3f} s against {plain / len(programs):.3f} s per program, "
        f"{time.monotonic() - start:.0f} s of wall-clock time"
    )


def run_all(programs: list[Program], toolchain: Toolchain, sandbox: Sandbox) -> None:
    for program, verdict in run_programs(programs, toolchain, sandbox, 1, CPU_S):
        assert verdict.status == "passed", (program.source, verdict)


def plainly(program: Program, toolchain: Toolchain, directory: Path, scratch: Path) -> None:
    """Run a program as the reference does: each step a new process."""
    directory.mkdir()
    name = FILES.get(program.language, "test.rs")
    (directory / name).write_text(program.source, encoding="utf-8")
    environment = {**os.environ, **toolchain.environment}
    commands = {
        "python": [[sys.executable, name]],
        "cpp": [["g++", "-std=c++11", name, "-lcrypto", "-lssl"], ["./a.out"]],
        "js": [["node", name]],
        "java": [["javac", name], ["java", "-cp", ".", "Main"]],
        "go": [["go", "test", name]],
        "rust": [["cargo", "check", "--offline", "--bin", "test"], ["cargo", "test", "--offline", "--bin", "test"]],
    }
    if program.language == "go":
        environment = {**os.environ, **GO, "GOCACHE": str(scratch / "cache")}
    if program.language == "rust":
        project = cargo_project(scratch)
        (project / "src/bin").mkdir(parents=True, exist_ok=True)
        (project / "src/bin/test.rs").write_text(program.source, encoding="utf-8")
        directory = project
    for command in commands[program.language]:
        subprocess.run(command, cwd=directory, env=environment, capture_output=True, check=True)


def cargo_project(scratch: Path) -> Path:
    """The reference's cargo project, whose crates are built with the first program."""
    project = scratch / "project"
    if not project.exists():
        write_project(project)
    return project


def duplicates(path: Path, data: str, count: int, sandbox: Sandbox) -> None:
    lists = zip(load_problems(data, "python"), read_lists(path), strict=True)
    samples = [[program_of(problem, "fixtests", text) for text in texts] for problem, texts in lists]
    toolchain = find_toolchain("python")

    def seconds(programs: list[Program]) -> float:
        return cpu_of(lambda: list(run_programs(programs, toolchain, sandbox, 1, CPU_S)))

    programs = [program for of_problem in samples[:count] for program in of_problem]
    once = list({program.sha256: program for program in programs}.values())
    all_s, once_s = seconds(programs), seconds(once)
    distinct = {program.sha256 for of_problem in samples for program in of_problem}
    print(
        f"equal programs: {len(programs):,} samples in {all_s:.1f} s, {len(once):,} programs in {once_s:.1f} s: "
        f"{all_s / once_s:.1f}x; {len(distinct):,} programs in all {sum(map(len, samples)):,} samples"
    )


if __name__ == "__main__":
    run_program(main)
