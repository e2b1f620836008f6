"""From the text a model generated to its answer: where the function ends, or the description.

Faithful mode cuts as the reference does (bigcode-evaluation-harness), so that scores can be
compared with published ones. Clean mode differs where the reference cuts right answers: it counts
no braces in comments and strings, no word of code ends an answer, and functions after the first
one are kept if the answer uses them.
"""

import re

from megatron_ft.evaluation.diffs import hunks_of, patched
from megatron_ft.evaluation.lexing import code_only
from megatron_ft.evaluation.problems import Problem
from megatron_ft.evaluation.prompts import check_style, start_of
from megatron_ft.evaluation.stopping import DIFF_STOP_WORDS, OPEN_BRACES, is_unindented, special_words, stop_words

MODES = ("faithful", "clean")
JAVA_MAIN = "public static void main"
SHORTEST_CODE_LINE = 21  # characters from which a line of the solution is deleted from a description

# Top-level definitions that an answer may need, at the start of a line: kind and name.
DEFINITIONS = {
    "python": re.compile(r"^(?:@[^\n]*\n)*(?:async +)?(?:def|class) +(?P<name>\w+)", re.MULTILINE),
    "cpp": re.compile(
        r"^(?:(?:struct|class) +(?P<type>\w+)[^;{}()]*|[\w:<>,&* \t]*?(?P<name>\w+)[ \t]*\([^;{}()]*\)\s*)\{",
        re.MULTILINE,
    ),
    "js": re.compile(
        r"^(?:(?:async +)?function *\*? *(?P<name>\w+)|class +(?P<type>\w+)|(?:const|let|var) +(?P<variable>\w+) *=[^;{}]*\{)",
        re.MULTILINE,
    ),
    "java": re.compile(
        r"^(?:(?:final|abstract|static) +)*(?:class|interface|enum|record) +(?P<name>\w+)", re.MULTILINE
    ),
    "go": re.compile(r"^(?:func +(?:\([^()\n]*\) *)?|type +)(?P<name>\w+)", re.MULTILINE),
    "rust": re.compile(
        r"^(?:#\[[^\n]*\n)*(?:pub(?:\([^()\n]*\))? +)?(?:(?:fn|struct|enum|trait) +|impl(?:<[^<>\n]*>)? +)(?P<name>\w+)",
        re.MULTILINE,
    ),
}


def cut(
    text: str, problem: Problem, task: str, style: str = "octocoder", mode: str = "faithful", eos: str | None = None
) -> str:
    """The answer in `text`, all that the model generated after its prompt.

    A function with its start, ready for `programs.program_of`, or the description for
    explaindescribe. A diff is applied to the buggy function. `eos` is the tokenizer's end token, if
    `text` may hold it. Raises UserError if the task or the style is unknown.
    """
    check_style(task, style)
    if task == "explaindescribe":
        return _description(text, problem, stop_words(problem.language, style, eos))
    if style in DIFF_STOP_WORDS:
        old = start_of(problem, task) + problem.buggy_solution
        return patched(old, diff_in(text, problem.language, style, mode, eos), style)
    if mode == "clean":
        body = before_words(text.rstrip(), special_words(style, eos))
        return problem.prompt.rstrip() + function_and_helpers(body, problem)
    body = before_words(text.rstrip(), stop_words(problem.language, style, eos))
    # The reference prompts explainsynthesize with the declaration, but continues the prompt.
    start = problem.prompt if task == "explainsynthesize" else start_of(problem, task)
    return start.rstrip() + first_function(body, problem.language)


def diff_in(text: str, language: str, style: str, mode: str = "faithful", eos: str | None = None) -> str:
    """The diff in an answer. The reference cuts diffs by the rules for functions, too, which leaves
    nothing of most."""
    body = before_words(text.rstrip(), stop_words(language, style, eos))
    if mode == "faithful":
        body = first_function(body, language)
    return hunks_of(body) if style == "diff-carper" else body


def before_words(text: str, words: list[str]) -> str:
    """`text` before the first of each word, cut word by word in their order."""
    for word in words:
        text = text.partition(word)[0]
    return text


def first_function(text: str, language: str) -> str:
    """`text` up to the end of the function that it is in, by the reference's rules."""
    if language == "python":
        lines = text.split("\n")
        return "\n".join(lines[: next((i for i, line in enumerate(lines) if is_unindented(line)), len(lines))])
    end = closing_brace(text, OPEN_BRACES[language])
    return _without_end(text, language) if end is None else text[:end]


def closing_brace(text: str, depth: int) -> int | None:
    """Where the brace ends that closes the outermost of `depth` open blocks; None if it never does.

    >>> closing_brace("if (a) { b; } } c", 1)
    15
    """
    for match in re.finditer("[{}]", text):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    return None


def _without_end(text: str, language: str) -> str:
    """What the reference makes of an answer whose braces do not close: it ends at the last one."""
    if language == "java":
        before, found, _ = text.partition(JAVA_MAIN)
        text = before + "}" if found else text
    if "}" in text:
        text = text[: text.rfind("}") + 1]
    if language == "java" and text.count("{") - 1 == text.count("}"):
        text += "\n}"
    return text


def function_and_helpers(text: str, problem: Problem) -> str:
    """Clean mode: the function that `text` is in, and the definitions after it that it uses."""
    code = code_only(text, problem.language)
    if problem.language == "python":
        end: int | None = _indented_end(code)
    else:
        end = closing_brace(code, OPEN_BRACES[problem.language])
    if end is None:
        return _without_end(text, problem.language)
    kept, helpers = text[:end].rstrip(), _definitions(code, end, problem.language)
    names = {problem.entry_point, "main", "Main"}  # of what must not be defined again
    needed: set[tuple[int, int]] = set()
    while found := next(
        (helper for helper in helpers if helper[0] not in names and _uses(code, end, needed, helper)), None
    ):
        needed.add(found[1:])
        helpers.remove(found)
    return kept + "".join("\n\n" + text[first:last].rstrip() for first, last in sorted(needed))


def _indented_end(code: str) -> int:
    """Where Python's first unindented line starts, after the first line break if there is one."""
    position = 0
    for line in code.split("\n"):
        if is_unindented(line):
            return position
        position += len(line) + 1
    return len(code)


def _definitions(code: str, start: int, language: str) -> list[tuple[str, int, int]]:
    """Name, start and end of the top-level definitions after `start`; of equal ones the first."""
    found: dict[str, tuple[str, int, int]] = {}
    while match := DEFINITIONS[language].search(code, start):
        if language == "python":
            header = code.find("\n", match.end())
            end: int | None = len(code) if header < 0 else header + _body_end(code[header:])
        else:
            opening = code.find("{", match.end() - 1)
            end = None if opening < 0 else closing_brace(code[opening:], 0)
            end = None if end is None else end + opening
        if end is None:
            break
        name = next(filter(None, match.groups()))
        found.setdefault(match.group(), (name, match.start(), end))
        start = end
    return list(found.values())


def _body_end(code: str) -> int:
    """As `_indented_end`, but lines that start with a closing bracket belong to the definition."""
    return _indented_end(re.sub(r"^[)\]}]", " ", code, flags=re.MULTILINE))


def _uses(code: str, end: int, needed: set[tuple[int, int]], helper: tuple[str, int, int]) -> bool:
    kept = code[:end] + "".join(code[first:last] for first, last in needed)
    return re.search(rf"\b{helper[0]}\b", kept) is not None


def _description(text: str, problem: Problem, words: list[str]) -> str:
    """A description as the reference takes it from the text: no longer than the docstring, and
    without lines of the solution."""
    described = before_words(text.strip()[: len(problem.docstring)], words).rstrip()
    for line in map(str.strip, problem.canonical_solution.split("\n")):
        if len(line) >= SHORTEST_CODE_LINE:
            described = described.replace(line, "")
    return described
