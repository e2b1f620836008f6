"""Rust programs that are compiled together have the verdicts and outputs of single programs."""

import re

import pytest
from sandboxes import sandbox_or_skip, toolchain_or_skip

from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.runner import Worker, run_programs
from megatron_ft.evaluation.toolchains import rust_batch
from megatron_ft.evaluation.toolchains.rust_batch import batches, is_batchable, run_together

TESTS = """
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_f() {
        assert_eq!(f(1), 2, "f of one");
    }
}
"""
RIGHT = "fn main(){}\nfn f(x: i32) -> i32 { x + 1 }\n"
ANSWERS = {
    "right": RIGHT,
    "uses a crate": "fn main(){}\nuse rand::Rng;\nfn f(x: i32) -> i32 { x + rand::thread_rng().gen_range(1, 2) }\n",
    "wrong": 'fn main(){}\nfn f(x: i32) -> i32 { println!("{}", x); x - 1 }\n',
    "panics": "fn main(){}\nfn f(x: i32) -> i32 { let v: Vec<i32> = vec![]; v[x as usize] }\n",
    "does not parse": "fn main(){}\nfn f(x: i32) -> i32 { x + 1 }}\n",
    "unknown name": "fn main(){}\nfn f(x: i32) -> i32 { y + 1 }\n",
    "wrong type": 'fn main(){}\nfn f(x: i32) -> i32 { "2" }\n',
    "borrowed twice": "fn main(){}\nfn f(x: i32) -> i32 { let mut v = vec![x]; let r = &v; v.push(1); r[0] }\n",
    "lacks f": "fn main(){}\n",
    "does not end": "fn main(){}\nfn f(x: i32) -> i32 { loop { std::hint::spin_loop() } }\n",
    "overflows its stack": "fn main(){}\nfn f(x: i32) -> i32 { if x < 0 { 2 } else { f(x) + f(x) } }\n",
}
IN_A_CRATE_ONLY = {
    "glob import of the parent": "use super::*;\n" + RIGHT,
    "its own tests": TESTS + RIGHT,
    "path from the root": RIGHT.replace("x + 1", "crate::g(x)") + "fn g(x: i32) -> i32 { x + 1 }\n",
    "attribute of the crate": "#![allow(unused)]\n" + RIGHT,
    "attribute with a space": "# [no_mangle]\npub fn malloc() {}\n" + RIGHT,
    "raw identifier": RIGHT + "fn g() { std::r#process::exit(0) }\n",
    "ends the process": RIGHT.replace("x + 1", "std::process::exit(0)"),
    "unsafe code": RIGHT + "unsafe fn g() {}\n",
    "implementation": RIGHT + "struct S; impl From<S> for i32 { fn from(_: S) -> i32 { 1 } }\n",
    "name of its file": RIGHT.replace("x + 1", "{ println!(file!()); x + 1 }"),
    "no tests": RIGHT.replace("fn f", "fn g"),
}


def program(answer: str) -> Program:
    return Program("rust", f"{answer}\n{TESTS}", None)


@pytest.mark.parametrize("name", IN_A_CRATE_ONLY)
def test_what_a_crate_changes_is_compiled_by_itself(name):
    answer = IN_A_CRATE_ONLY[name]
    one = Program("rust", answer, None) if name == "no tests" else program(answer)
    assert not is_batchable(one)
    together = [program(ANSWERS[name]) for name in ("right", "wrong", "panics")]
    assert batches([together[0], one, *together[1:]], 1) == [together, [one]]


def test_each_worker_has_a_batch_and_no_batch_is_too_large():
    together = [program(f"{RIGHT}// {number}\n") for number in range(100)]
    assert all(map(is_batchable, together))
    assert [len(batch) for batch in batches(together[:10], 4)] == [3, 3, 3, 1]
    assert max(map(len, batches(together, 1))) == rust_batch.PROGRAMS
    assert [one for batch in batches(together, 3) for one in batch] == together
    assert batches([], 2) == []


def test_verdicts_and_outputs_are_those_of_single_programs(monkeypatch):
    monkeypatch.setattr(rust_batch, "RUN_CPU_S", 2.0)
    toolchain, sandbox = toolchain_or_skip("rust"), sandbox_or_skip()
    names = {program(answer): name for name, answer in ANSWERS.items()}
    worker = Worker(toolchain, sandbox, 3.0)
    together = {names[one]: verdict for one, verdict in run_programs(list(names), toolchain, sandbox, 1, 3.0)}
    single = {name: worker.verdict(one, 0, None) for one, name in names.items()}
    for name in ANSWERS:
        same = ("key", "status", "exit", "signal")
        assert [getattr(together[name], field) for field in same] == [getattr(single[name], field) for field in same]
        assert steady(together[name].output) == steady(single[name].output), name
    assert {name: verdict.status for name, verdict in single.items() if verdict.status == "passed"} == {
        "right": "passed",
        "uses a crate": "passed",
    }
    assert "f of one" in together["wrong"].output and "program.rs" in together["wrong"].output


def test_programs_that_do_not_compile_leave_the_others_in_their_batch():
    toolchain, sandbox = toolchain_or_skip("rust"), sandbox_or_skip()
    names = {program(answer): name for name, answer in ANSWERS.items() if name != "does not end"}
    settled = run_together(list(names), toolchain, sandbox, 3.0, 0)
    assert {names[one] for one in settled} == {"right", "uses a crate", "wrong", "panics"}


def steady(output: str) -> str:
    """Output without times, process ids and addresses."""
    return re.sub(r"finished in [\d.]+s|thread '[^']*' \(\d+\)", "", output)
