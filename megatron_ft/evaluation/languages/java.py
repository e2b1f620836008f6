"""Java programs: class Solution with the answer, class Main with the tests."""

from collections.abc import Sequence

from megatron_ft.evaluation.problems import Problem

EMPTY_MAIN = "public class Main {\n    }"


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer without an empty class Main, which the tests define."""
    return answer.replace(EMPTY_MAIN, "").strip()


def clean(problem: Problem, answer: str) -> str:
    """The same program as in faithful mode."""
    return faithful(problem, answer, ())


def proving(test: str, nonce: str) -> str:
    """The tests, whose `main`, the last method of the last class, prints the nonce at its end."""
    before, _, _ = test.rpartition("}")
    before, _, _ = before.rpartition("}")
    return f'{before}    System.out.println("\\n{nonce}");\n    }}\n}}\n'
