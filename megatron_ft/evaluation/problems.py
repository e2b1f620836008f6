"""HumanEvalPack's problems: the rows of a directory with one LANGUAGE.jsonl per language.

164 problems in six languages, each with a prompt, a correct and a buggy solution, and tests.
Source: OctoPack (arXiv 2308.07124), https://huggingface.co/datasets/bigcode/humanevalpack.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_small_file
from megatron_ft.files.jsonl_row import BadRow, keys_of, parse_object, text_of

# Key (the file's name) to the name that prompts use.
LANGUAGES = {"python": "Python", "cpp": "C++", "js": "JavaScript", "java": "Java", "go": "Go", "rust": "Rust"}
ID_PREFIXES = LANGUAGES | {"cpp": "CPP"}  # problem ids: "CPP/0"
ENVIRONMENT = "HUMANEVALPACK"
SOURCE = "https://huggingface.co/datasets/bigcode/humanevalpack"

# Problems whose verdicts say nothing of an answer; clean mode leaves them out of the score.
EXCLUDED = {
    "CPP/23": "the function is named strlen and calls bind to the C library's, so any answer that compiles passes",
    "Go/95": "the canonical solution is wrong, and passes or not by the order of a map, which Go makes random",
    "Rust/32": "the tests draw random polynomials, for which the canonical solution often does not terminate",
}


@dataclass(frozen=True)
class Problem:
    """One problem in one language. Texts are as in the dataset, line breaks included.

    A program is `prompt` (or `declaration`, which has no comment) followed by a solution and
    `test`. `imports` and `test_setup` are Go's and empty for the other languages.
    """

    language: str
    task_id: str
    prompt: str
    declaration: str
    canonical_solution: str
    buggy_solution: str
    bug_type: str
    failure_symptoms: str
    entry_point: str
    test: str
    signature: str
    docstring: str
    instruction: str
    imports: str
    test_setup: str


FIELDS = [name for name in Problem.__annotations__ if name not in ("language", "imports", "test_setup")]


def data_directory(flag: str | Path | None) -> Path:
    """The directory of the problems: `flag`, else HUMANEVALPACK of the environment."""
    name = flag or os.environ.get(ENVIRONMENT)
    if not name:
        raise UserError(f"no --data: name the directory with python.jsonl, ... of {SOURCE}, or set {ENVIRONMENT}")
    if not Path(name).is_dir():
        raise UserError(f"{name}: not a directory; expected HumanEvalPack's python.jsonl, ... in it (see {SOURCE})")
    return Path(name)


def data_file(directory: str | Path, language: str) -> Path:
    """The file of a language: LANGUAGE.jsonl, or where a clone of the Hub's repository has it."""
    check_language(language)
    directory = Path(directory)
    cloned = directory / "data" / language / "data" / "humanevalpack.jsonl"
    return cloned if cloned.is_file() else directory / f"{language}.jsonl"


def data_digest(directory: str | Path, language: str) -> str:
    """sha256 of a language's file, in hex."""
    return hashlib.sha256(read_small_file(data_file(directory, language))).hexdigest()


def load_problems(directory: str | Path, language: str) -> list[Problem]:
    """All problems of a language, in the order of its file.

    Raises UserError if the file is missing or damaged, a field is missing, or the ids are not
    PREFIX/0, PREFIX/1, ... in order.
    """
    path = data_file(directory, language)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected HumanEvalPack's (see {SOURCE})")
    lines = read_small_file(path).split(b"\n")
    if lines[-1]:
        raise UserError(f"{path}: the last line does not end in a newline; copy the file again")
    problems = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            problem = _problem(language, line)
            expected = f"{ID_PREFIXES[language]}/{number - 1}"
            if problem.task_id != expected:
                raise BadRow(
                    f"task_id is {problem.task_id[:40]!r}, expected {expected!r}: rows of one language, in order"
                )
        except BadRow as reason:
            raise UserError(f"{path}:{number}: {reason}; expected a row of HumanEvalPack") from None
        problems.append(problem)
    if not problems:
        raise UserError(f"{path}: empty; expected the rows of HumanEvalPack")
    return problems


def _problem(language: str, line: bytes) -> Problem:
    row = parse_object(line)
    for name in FIELDS:
        if name not in row:
            raise BadRow(f"no key {name!r}; {keys_of(row)}")
    texts = {name: text_of(row, name, line) for name in FIELDS}
    # Empty for the other languages, some files of which have the keys.
    names = {"imports": "import", "test_setup": "test_setup"}
    texts |= {field: text_of({key: "", **row}, key, line) for field, key in names.items()}
    return Problem(language=language, **texts)


def select(problems: list[Problem], task_ids: Iterable[str], asked_by: str) -> list[Problem]:
    """The problems of these ids, in the order of the ids; `asked_by` names their file or flag.

    Raises UserError if the data lacks one.
    """
    by_id = {problem.task_id: problem for problem in problems}
    found = []
    for task_id in task_ids:
        if task_id not in by_id:
            first, last = problems[0].task_id, problems[-1].task_id
            raise UserError(f"{asked_by}: problem {task_id[:40]!r} is not in the data, which has {first} to {last}")
        found.append(by_id[task_id])
    return found


def check_language(language: str) -> None:
    """Raise UserError if HumanEvalPack does not have a language."""
    if language not in LANGUAGES:
        raise UserError(f"language {language!r}: unknown; one of {', '.join(LANGUAGES)}, all")


def parse_languages(names: str) -> list[str]:
    """The languages of a flag, in the order given.

    >>> parse_languages("rust,python")
    ['rust', 'python']
    >>> parse_languages("all")
    ['python', 'cpp', 'js', 'java', 'go', 'rust']
    """
    if names == "all":
        return list(LANGUAGES)
    languages = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for language in languages:
        check_language(language)
    return languages
