"""JavaScript programs."""

from collections.abc import Sequence

from megatron_ft.evaluation.problems import Problem

# node's own only writes to stderr. Installed after the answer, which may have replaced it.
ASSERT = """\
console.assert = (holds, ...message) => {
  if (!holds) throw new Error(["assertion failed", ...message].join(" "));
};"""


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer itself."""
    return answer


def clean(problem: Problem, answer: str) -> str:
    """The answer itself."""
    return answer


def proving(test: str, nonce: str) -> str:
    """The tests, in which a failed assertion throws, and then the nonce on stdout."""
    return f'{ASSERT}\n{test}\nrequire("fs").writeSync(1, "\\n{nonce}\\n");\n'
