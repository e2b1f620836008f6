"""Programs: an answer and the problem's tests as one source file, and when it has passed.

Faithful mode gives the reference's programs (bigcode-evaluation-harness), defects included. Clean
mode fixes what fails right answers, and its programs print a nonce after the tests, without which
they have not passed: an answer that ends the process early would otherwise pass.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.languages import cpp, go, java, js, python, rust
from megatron_ft.evaluation.problems import Problem

# Each has `faithful(problem, answer, earlier)` and `clean(problem, answer)`, the program before its
# tests, and `proving(test, nonce)`, the tests that print the nonce.
ASSEMBLERS: dict[str, ModuleType] = {
    "python": python,
    "cpp": cpp,
    "js": js,
    "java": java,
    "go": go,
    "rust": rust,
}
NONCE_DIGITS = 32


@dataclass(frozen=True)
class Program:
    """A source file. `nonce` is the line that it prints on stdout after its tests; None in faithful
    mode."""

    language: str
    source: str
    nonce: str | None

    @property
    def sha256(self) -> str:
        """Digest of the source, in hex: equal programs need to run only once."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    def passed(self, exit_status: int, stdout: bytes, stderr: bytes) -> bool:
        """Whether a completed run has passed its tests.

        In faithful mode Python must be run so that SystemExit gives another status than 0, as in
        the reference, and JavaScript passes if it prints nothing, whatever its status: there
        console.assert only prints.
        """
        if self.nonce is not None:
            return exit_status == 0 and self.nonce.encode() in stdout.split()
        if self.language == "js":
            return not stdout and not stderr
        return exit_status == 0


def program_of(
    problem: Problem, task: str, answer: str, mode: str = "faithful", earlier: Sequence[str] = ()
) -> Program:
    """The program for an answer: a function with its start, as `cutting.cut` returns it.

    `earlier` are the answers to the same problem before this one, in the order of their samples.
    They matter in faithful mode for Go only, where the reference's programs depend on them.
    """
    if task == "explaindescribe":
        raise UserError(f"{problem.task_id}: a description is not a program; explainsynthesize has the programs")
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: unknown; one of {', '.join(MODES)}")
    assembler = ASSEMBLERS[problem.language]
    if mode == "faithful":
        candidate = assembler.faithful(problem, answer, earlier)
        return Program(problem.language, f"{candidate}\n\n{problem.test}", None)
    candidate = assembler.clean(problem, answer)
    nonce = nonce_of(candidate, problem.test)
    return Program(problem.language, f"{candidate}\n\n{assembler.proving(problem.test, nonce)}", nonce)


def nonce_of(candidate: str, test: str) -> str:
    """NONCE_DIGITS hex digits that depend on the program, so that no answer can know its own and
    equal programs have the same."""
    return hashlib.sha256(f"nonce\0{candidate}\0{test}".encode("utf-8", "surrogatepass")).hexdigest()[:NONCE_DIGITS]
