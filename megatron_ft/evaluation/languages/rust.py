"""Rust programs: a crate that `rustc --test` or cargo builds, with the tests in a module."""

from collections.abc import Sequence

from megatron_ft.evaluation.problems import Problem

MAIN = "fn main(){}\n"
MAIN_NAME = "fn main()"


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer before a second `fn main()`, after `main` and lines of the declaration that it
    lacks. A line is looked up as a text anywhere in the answer."""
    missing = "" if MAIN_NAME in answer else MAIN
    for line in map(str.strip, problem.declaration.split("\n")):
        function = line.partition("(")[0]
        if line not in answer and not (line.startswith("fn") and function in answer):
            missing += f"{line}\n"
    return missing + MAIN_NAME.join(answer.split(MAIN_NAME)[:2])


def clean(problem: Problem, answer: str) -> str:
    """The answer, which begins with the prompt and so has `main` and the declaration."""
    return answer if MAIN_NAME in answer else MAIN + answer


def proving(test: str, nonce: str) -> str:
    """The tests, one function in one module, which writes the nonce at its end. Only print! and
    println! are captured by the test harness."""
    before, _, _ = test.rpartition("}")
    before, _, _ = before.rpartition("}")
    write = f'std::io::Write::write_all(&mut std::io::stdout(), b"\\n{nonce}\\n").unwrap();'
    return f"{before}    {write}\n    }}\n}}\n"
