"""Verdicts: the right status in each language, whatever the load, and each program once."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_problems import BUGS, SOLUTIONS, made_problem
from sandboxes import CPU_S, sandbox_or_skip, toolchain_or_skip, verdict_on

from megatron_ft.evaluation import runner
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.programs import Program, program_of
from megatron_ft.evaluation.records import Verdict
from megatron_ft.evaluation.runner import default_workers, head_and_tail, key_of, run_programs
from megatron_ft.evaluation.sandbox.sandbox import Sandbox
from megatron_ft.evaluation.toolchains import smoke
from megatron_ft.evaluation.toolchains.python import without_unused_numpy
from megatron_ft.evaluation.toolchains.toolchain import Toolchain
from megatron_ft.evaluation.verdicts import VerdictCache

SLOW = {"cpp": "int main(){ for(;;); }", "js": "for (;;);", "python": "while True: pass"}
SLOW |= {"java": "public class Main { public static void main(String[] a) { int i = 0; while (true) i++; } }"}
SLOW |= {"go": 'package main\nimport "testing"\nfunc TestX(t *testing.T) {\n\tfor {\n\t}\n}\n'}
SLOW |= {"rust": "fn main(){}\n#[test]\nfn t() { loop { std::hint::spin_loop() } }"}
THROWS = {"cpp": '#include<stdexcept>\nint main(){ throw std::runtime_error("x"); }', "js": "null.x"}
THROWS |= {"java": "public class Main { public static void main(String[] a) { Object o = null; o.hashCode(); } }"}
THROWS |= {"go": 'package main\nimport "testing"\nfunc TestX(t *testing.T) {\n\tvar p *int\n\t*p = 1\n}\n'}
THROWS |= {"rust": "fn main(){}\n#[test]\nfn t() { let v: Vec<i32> = vec![]; let _ = v[std::env::args().count()]; }"}
THROWS |= {"python": "[][0]"}


def program(language: str, solution: str, mode: str, directory: Path) -> Program:
    problem = made_problem(directory, language)
    return program_of(problem, "fixdocs", cut("\n" + solution.strip("\n"), problem, "fixdocs", mode=mode), mode)


@pytest.mark.parametrize("language", LANGUAGES)
def test_statuses_of_each_language(language, tmp_path):
    sources = {
        "passed": program(language, SOLUTIONS[language], "clean", tmp_path),
        "wrong_answer": program(language, BUGS[language], "clean", tmp_path),
        "compile_error": program(language, "    )(", "clean", tmp_path),
        "exception": Program(language, THROWS[language], None),
    }
    toolchain, sandbox = toolchain_or_skip(language), sandbox_or_skip()
    runs = list(run_programs(list(sources.values()), toolchain, sandbox, 2, CPU_S))
    sources["timeout"] = Program(language, SLOW[language], None)
    runs += run_programs([sources["timeout"]], toolchain, sandbox, 2, 1.0)
    verdicts = {one.sha256: verdict for one, verdict in runs}
    assert {status: verdicts[one.sha256].status for status, one in sources.items()} == {s: s for s in sources}
    assert all(verdict.cpu_s > 0 and verdict.rss > 0 for verdict in verdicts.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_smoke_test_passes_and_notices_a_broken_toolchain(language):
    toolchain, sandbox = toolchain_or_skip(language), sandbox_or_skip()
    smoke.check(toolchain, sandbox)
    broken = Toolchain(**{**vars(toolchain), "run": ("/bin/true",), "completed": 0})
    with pytest.raises(Exception, match="a (right|wrong) program ends as"):
        smoke.check(broken, sandbox)


def test_verdicts_do_not_depend_on_workers_or_load():
    """Four times as many busy processes as cores: a program of one second of CPU time passes its
    limit of two, one of three seconds does not."""
    burn = "import time\nwhile time.process_time() < %s: pass"
    programs = [Program("python", burn % seconds, None) for seconds in (0.1, 0.2, 0.3, 1.0, 4.0)]
    toolchain, sandbox = toolchain_or_skip("python"), sandbox_or_skip()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * default_workers())]
    try:
        found = [
            {one.source: verdict.status for one, verdict in run_programs(programs, toolchain, sandbox, workers, 2.0)}
            for workers in (1, 8)
        ]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert found[0] == found[1]
    assert list(found[0][one.source] for one in programs) == ["passed"] * 4 + ["timeout"]


def test_timeouts_run_again_alone(monkeypatch):
    runs: list[str] = []
    original = runner.Worker.verdict

    def counted(self, program, slot, server) -> Verdict:
        runs.append(program.source)
        return original(self, program, slot, server)

    monkeypatch.setattr(runner.Worker, "verdict", counted)
    slow, fast = Program("python", "while True: pass", None), Program("python", "pass", None)
    list(run_programs([slow, fast], toolchain_or_skip("python"), sandbox_or_skip(), 2, 1.0))
    assert sorted(runs) == ["pass", slow.source, slow.source] and runs[-1] == slow.source


def test_missing_interpreter_is_a_toolchain_error_and_a_failing_sandbox_a_sandbox_error():
    toolchain = toolchain_or_skip("python")
    gone = Toolchain(**{**vars(toolchain), "run": ("/no/such/python",)})
    [(_, verdict)] = run_programs([Program("python", "pass", None)], gone, sandbox_or_skip(), 1, 1.0)
    assert verdict.status == "toolchain_error" and "/no/such/python" in verdict.output
    unreadable = Toolchain(**{**vars(toolchain), "readable": ("/",)})
    if sandbox_or_skip().kind == "bwrap":
        [(_, verdict)] = run_programs([Program("python", "pass", None)], unreadable, sandbox_or_skip(), 1, 1.0)
        assert verdict.status == "sandbox_error" and "would be readable" in verdict.output


def test_java_compiled_by_the_server_and_by_javac_has_the_same_verdicts(tmp_path):
    toolchain, sandbox = toolchain_or_skip("java"), sandbox_or_skip()
    programs = [program("java", text, "clean", tmp_path) for text in (SOLUTIONS["java"], BUGS["java"], ")(")]
    worker = runner.Worker(toolchain, sandbox, CPU_S)
    served = {one.source: verdict.status for one, verdict in run_programs(programs, toolchain, sandbox, 1, CPU_S)}
    assert served == {one.source: worker.verdict(one, 0, None).status for one in programs}


def test_numpy_is_imported_only_where_the_program_may_use_it(tmp_path):
    without = program("python", SOLUTIONS["python"], "faithful", tmp_path).source
    assert "numpy" not in without_unused_numpy(without)
    assert len(without_unused_numpy(without).split("\n")) == len(without.split("\n"))
    for use in ("np.sum([1])", "numpy.sum([1])", "eval('n' + 'p')", "globals()['n' + 'p']", "sys.modules['nu' 'mpy']"):
        used = without.replace("max(numbers)", f"max(numbers, {use})")
        assert without_unused_numpy(used) == used
    assert verdict_on("python", without.replace("max(numbers)", "int(np.max(numbers))")).status == "passed"


def test_key_depends_on_program_toolchain_sandbox_and_limit():
    python = toolchain_or_skip("python")
    other = Toolchain(**{**vars(python), "version": "Python 4"})
    one, two = Program("python", "1", None), Program("python", "2", None)
    bwrap, none = Sandbox.__new__(Sandbox), Sandbox.__new__(Sandbox)
    bwrap.kind, none.kind = "bwrap", "none"
    keys = [(one, python, bwrap, 1.0), (two, python, bwrap, 1.0), (one, other, bwrap, 1.0), (one, python, none, 1.0)]
    keys += [(one, python, bwrap, 2.0), (Program("python", "1", "nonce"), python, bwrap, 1.0)]
    assert len({key_of(*parts) for parts in keys}) == len(keys)


def test_cache_keeps_verdicts_but_none_of_the_machine(tmp_path):
    verdict = verdict_on("python", "pass")
    with VerdictCache(tmp_path, "python") as cache:
        cache.add(verdict)
        for status in ("sandbox_error", "toolchain_error"):
            cache.add(Verdict(**{**vars(verdict), "key": status, "status": status}))
        cache.add(Verdict(**{**vars(verdict), "key": "random"}), keep=False)
    with VerdictCache(tmp_path, "python") as cache:
        assert cache.known == {verdict.key: verdict}


def test_long_output_keeps_its_start_and_end():
    assert head_and_tail(b"short") == "short"
    text = head_and_tail(b"start" + b"x" * 10_000 + b"end")
    assert text.startswith("start") and text.endswith("end") and "bytes ..." in text and len(text) < 4200


def test_workers_follow_slurm_and_affinity(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert default_workers() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "100000")
    assert default_workers() < 100000
